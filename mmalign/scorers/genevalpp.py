"""GenEval++: a strict judge says whether every object, count, colour, place and size that a prompt asks for is in the image (0 or 1).

Paper: Ye et al., Echo-4o, arXiv 2508.09987; yejy53/Echo-4o test_scripts/Eval-gpt-4.1-geneval++.py at 28f36d7, judged by gpt-4.1 on a JPEG.
The judge gets a checklist made from the prompt's metadata; the wording around it is read from the official file (`mmalign data add
genevalpp-judge`). Changed under compat "fixed": a reply that breaks off inside its reason still gives its verdict, "1" and true are 1, and
a reply that cannot be read is a failure. "upstream" reads as the official code does: only the number 1 in whole JSON is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmalign.judge import ImageKind, Question
from mmalign.scorers import _official
from mmalign.scorers._judged import Judged, JudgeOptions
from mmalign.scorers._samples import Item
from mmalign.types import Failure, Value

NEEDS = ("endpoint",)
VERSION = 1
Compat = Literal["fixed", "upstream"]
FIELDS = {"instruction": "prompt", "explanation": "checklist"}
VERDICT = re.compile(r'"correct"\s*:\s*"?(-?\d+|true|false)', re.IGNORECASE)
SAID = {"1": 1.0, "true": 1.0, "0": 0.0, "false": 0.0}


@dataclass(frozen=True)
class Config(JudgeOptions):
    """`question`: "official", or a text file with {prompt} and {checklist}; `compat`: how replies are read."""

    model: str = "gpt-4.1"
    max_tokens: int = 200
    image: ImageKind = "jpeg75"
    compat: Compat = "fixed"


def load(config: Config = Config(), device: str = "cpu") -> Judged:
    """The device is the judge's."""
    system, question = _wording(config.question)

    def ask(item: Item) -> Mapping[str, Question] | Failure:
        prompt = item.sample.request.prompt
        try:
            texts = {"prompt": prompt.text.strip(), "checklist": checklist(prompt.meta)}
        except (KeyError, TypeError, AttributeError) as error:
            return Failure("score", "missing", f"The prompt {prompt.id} has no GenEval++ metadata ({type(error).__name__}: {error}).")
        return {"verdict": Question(question.fill(texts), (item.pixels,), system, is_text_first=True)}

    def value(item: Item, said: Mapping[str, float]) -> Value:
        return Value(said["verdict"])

    return Judged("genevalpp", VERSION, config, (system, question), ask, lambda text: verdict(text, config.compat), value)


def checklist(meta: Mapping[str, Any]) -> str:
    """What the judge ticks off: a line for each clause, the plural made by an s alone, as in the official checklist ("glasss")."""
    lines = [f"- {_wanted(clause)}." for clause in meta["include"]]
    for clause in meta.get("exclude", ()):
        count = clause.get("count", 1)
        lines.append(f"- No more than {count - 1} {_noun(clause['class'], count)} should appear.")
    return "\n".join(["This image should contain:", *lines])


def verdict(text: str, compat: Compat = "fixed") -> float:
    """1 or 0; ValueError (never under "upstream") for a reply that says neither."""
    if compat == "upstream":
        try:
            return float(_whole(text).get("correct", 0) == 1)
        except (ValueError, AttributeError):
            return 0.0
    found = VERDICT.search(text)
    if found is None or found[1].lower() not in SAID:
        raise ValueError("it gives no verdict 'correct' of 1 or 0")
    return SAID[found[1].lower()]


def _whole(text: str) -> Any:
    text = re.sub(r"\s*```$", "", re.sub(r"^```json\s*", "", text.strip()))
    found = re.search(r"\{[\s\S]*\}", text)
    if found is None:
        raise ValueError("it holds no JSON object")
    return json.loads(found[0])


def _wanted(clause: Mapping[str, Any]) -> str:
    count = clause.get("count", 1)
    colour, size, region = (clause.get(name) for name in ("color", "size", "region"))
    words = [f"{colour}-colored" if colour else "", size or "", f"{count} {_noun(clause['class'], count)}"]
    place = f"located in the {region} part of the image" if region else "present in the image"
    return " ".join(word for word in (*words, place) if word)


def _noun(name: str, count: int) -> str:
    return f"{name}s" if count > 1 else name


def _wording(question: str) -> tuple[str, _official.Template]:
    if question != "official":
        return "", _official.own(Path(question).expanduser(), tuple(FIELDS.values()), "genevalpp.question")
    from mmalign.data import data_path

    path = data_path("genevalpp-judge")
    return _official.constant(path, "SYSTEM_PROMPT"), _official.texts(path, "process_sample", FIELDS)[0]
