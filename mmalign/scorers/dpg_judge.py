"""DPG-Bench's questions put to a VLM judge: the share answered with yes, following their dependencies (0 to 1). Not DPG-Bench itself.

Questions and dependencies as in the scorer `dpg`; the judge is any model behind an OpenAI-compatible endpoint in place of mPLUG, asked in
words of our own. A reply that begins with neither yes nor no is asked for again and then is a failure of the image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmalign.judge import Question
from mmalign.scorers import _official
from mmalign.scorers._judged import Judged, JudgeOptions
from mmalign.scorers._question_graph import parts, questions_of, score
from mmalign.scorers._samples import Item
from mmalign.types import Failure, Value

NEEDS = ("endpoint",)
VERSION = 1
OWN = _official.Template(("", "question", "\nAnswer with one word, yes or no."))
YES_OR_NO = re.compile(r"[\s*\"'(]*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Config(JudgeOptions):
    """`question`: "official" is our wording, or a text file with {question}."""

    model: str = "Qwen/Qwen2.5-VL-32B-Instruct"
    base_url: str = "http://127.0.0.1:8000/v1"
    max_tokens: int = 16


def load(config: Config = Config(), device: str = "cpu") -> Judged:
    """The device is the judge's."""
    own = config.question != "official"
    wording = _official.own(Path(config.question).expanduser(), OWN.names, "dpg_judge.question") if own else OWN

    def ask(item: Item) -> Mapping[str, Question] | Failure:
        asked = questions_of(item.sample)
        if isinstance(asked, Failure):
            return asked
        return {str(one.number): Question(wording.fill({"question": one.text}), (item.pixels,)) for one in asked}

    def value(item: Item, said: Mapping[str, float]) -> Value:
        asked = questions_of(item.sample)
        assert not isinstance(asked, Failure), asked
        answers = {int(number): answer for number, answer in said.items()}
        return Value(score(asked, answers), parts(answers))

    return Judged("dpg_judge", VERSION, config, wording, ask, yes_or_no, value)


def yes_or_no(text: str) -> float:
    """1 for a reply that begins with yes, 0 for one that begins with no; ValueError for any other."""
    found = YES_OR_NO.match(text)
    if found is None:
        raise ValueError("it begins with neither yes nor no")
    return float(found[1].lower() == "yes")
