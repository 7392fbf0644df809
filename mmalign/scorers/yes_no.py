"""Yes or no: does an answer to a question say what is right (0 or 1)? The rules of POPE, MME and lmms-eval, and one without a default.

    words     the set of the answer's words: yes alone or no alone; both or neither is unparsed (as VLMEvalKit's extraction)
    pope      AoiDragon/POPE evaluate.py at 08d957b: the first sentence says no if it has the word No, no or not, else yes
    mme       MME's eval_tool: yes or no within the first four characters, yes first; else unparsed
    lmms_mme  lmms-eval tasks/mme at 75571cf: as mme after stripping and dropping full stops; a lone y or n counts

An unparsed answer is the model's and is wrong; it is counted (part `unparsed`) and never made a yes, except by the rule that does so
("pope": "", "nothing" and "Maybe" are yes).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmalign.types import Failure, Sample, Score, Value, digest

VERSION = 1
Rule = Literal["words", "pope", "mme", "lmms_mme"]
Said = Literal["yes", "no", "unparsed"]
PREFIX = 4


@dataclass(frozen=True)
class Config:
    """`rule`: how an answer is read."""

    rule: Rule = "words"


def load(config: Config = Config(), device: str = "cpu") -> YesNo:
    return YesNo(config)


@dataclass(frozen=True)
class YesNo:
    """The scorer. The truth is meta["label"], yes or no in any case; parts: `yes` (the answer says yes) and `unparsed`."""

    config: Config
    name: str = "yes_no"
    range: tuple[float, float] = (0.0, 1.0)

    @property
    def fingerprint(self) -> str:
        return digest("yes_no", VERSION, self.config.rule)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Score:
        label = str(sample.request.prompt.meta.get("label", "")).lower()
        if label not in ("yes", "no"):
            return Failure("score", "missing", f"The prompt {sample.request.prompt.id} has no label yes or no in its metadata.")
        if sample.answer is None:
            return Failure("score", "missing", f"The sample {sample.request.id} holds no answer.")
        said = read(sample.answer, self.config.rule)
        return Value(float(said == label), {"yes": float(said == "yes"), "unparsed": float(said == "unparsed")}, detail=said)


def read(answer: str, rule: Rule = "words") -> Said:
    """What an answer says by one of the rules."""
    if rule == "pope":
        words = answer.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "no", "not"} & set(words) else "yes"
    if rule == "words":
        found = {"yes", "no"} & set(re.findall(r"[a-z]+", answer.lower()))
        return "unparsed" if len(found) != 1 else "yes" if "yes" in found else "no"
    text = answer.lower()
    if rule == "lmms_mme":
        text = text.strip().replace(".", "")
        if text in ("y", "n"):
            return "yes" if text == "y" else "no"
    start = text[:PREFIX]
    return "yes" if "yes" in start else "no" if "no" in start else "unparsed"
