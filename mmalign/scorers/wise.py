"""WISE, as in its paper: a judge rates how an image realises the knowledge behind its prompt (consistency, realism, aesthetics).

Paper: Niu et al., arXiv 2503.07265; PKU-YuanGroup/WISE WISE_legacy/gpt_eval.py at eb51174, judged by gpt-4o-2024-05-13. Three ratings of 0
to 2 make the WiScore (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2; parts are the ratings over 2. The question is read from
the official file (`mmalign data add wise-judge`). Changed under compat "fixed": asterisks and a full-width colon between name and rating
are read, a rating above 2 is not; "upstream" reads as the official code does. A reply that cannot be read is asked for again, as there,
and then is a failure, where the official script leaves the prompt out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmalign.judge import Question
from mmalign.scorers import _official
from mmalign.scorers._judged import Judged, JudgeOptions
from mmalign.scorers._samples import Item
from mmalign.types import Failure, Value

NEEDS = ("endpoint",)
VERSION = 1
Compat = Literal["fixed", "upstream"]

RATINGS = ("consistency", "realism", "aesthetic_quality")
HIGHEST = 2
FIELDS = {"prompt_data['Prompt']": "prompt", "prompt_data['Explanation']": "explanation"}
_NAMES = "(Consistency|Realism|Aesthetic Quality)"
LABELLED = {
    "upstream": re.compile(rf"\*{{0,2}}{_NAMES}\*{{0,2}}\s*[:]?\s*(\d)", re.IGNORECASE),
    "fixed": re.compile(rf"{_NAMES}(?:\s*\(0-2\))?[\s*]*[:：]?[\s*]*(\d+(?:\.\d+)?)", re.IGNORECASE),
}
BARE = re.compile(r"(?m)^\s*([0-2])\s*$")


@dataclass(frozen=True)
class Config(JudgeOptions):
    """`question`: "official", or a text file with {prompt} and {explanation}; `compat`: how replies are read."""

    model: str = "gpt-4o-2024-05-13"
    max_tokens: int = 2000
    compat: Compat = "fixed"


def load(config: Config = Config(), device: str = "cpu") -> Judged:
    """The device is the judge's."""
    system, question = wording(config.question, "wise-judge", "wise.question")

    def ask(item: Item) -> Mapping[str, Question] | Failure:
        return questions(item, system, question)

    def value(item: Item, said: Mapping[str, Mapping[str, float]]) -> Value:
        ratings = said["rating"]
        return Value(wiscore(ratings), {name: ratings[name] / HIGHEST for name in RATINGS})

    return Judged("wise", VERSION, config, (system, question), ask, lambda text: whole(ratings_of(text, config.compat)), value)


def wording(question: str, source: str, option: str) -> tuple[str, _official.Template]:
    """The judge's system message and its question: the official ones, or "" and the user's own."""
    if question != "official":
        return "", _official.own(Path(question).expanduser(), tuple(FIELDS.values()), option)
    from mmalign.data import data_path

    system, asked = _official.texts(data_path(source), "build_evaluation_messages", FIELDS)
    return system.fill({}), asked


def questions(item: Item, system: str, question: _official.Template) -> Mapping[str, Question] | Failure:
    """The one question about an image; the prompt's metadata must explain it."""
    prompt = item.sample.request.prompt
    if not prompt.meta.get("explanation"):
        return Failure("score", "missing", f"The prompt {prompt.id} has no 'explanation' in its metadata, which the judge must be shown.")
    text = question.fill({"prompt": str(prompt.meta.get("prompt", prompt.text)), "explanation": str(prompt.meta["explanation"])})
    return {"rating": Question(text, (item.pixels,), system, is_text_first=True)}


def ratings_of(text: str, compat: Compat = "fixed") -> dict[str, float]:
    """The ratings that a reply gives, all or some of them: labelled, else the first three lines that are a bare 0, 1 or 2."""
    found = {name.lower().replace(" ", "_"): float(rating) for name, rating in LABELLED[compat].findall(text)}
    bare = BARE.findall(text)
    if not found and len(bare) >= len(RATINGS):
        found = dict(zip(RATINGS, map(float, bare), strict=False))
    if compat == "fixed" and (wrong := {name: rating for name, rating in found.items() if rating not in (0, 1, 2)}):
        raise ValueError(f"it gives ratings that are not 0, 1 or 2: {wrong}")
    return found


def whole(ratings: Mapping[str, float]) -> Mapping[str, float]:
    """The ratings, if all three are there."""
    if absent := [name for name in RATINGS if name not in ratings]:
        raise ValueError(f"it gives no {absent[0].replace('_', ' ')}")
    return ratings


def wiscore(ratings: Mapping[str, float]) -> float:
    """(0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2, summed in this order."""
    return (0.7 * ratings["consistency"] + 0.2 * ratings["realism"] + 0.1 * ratings["aesthetic_quality"]) / HIGHEST
