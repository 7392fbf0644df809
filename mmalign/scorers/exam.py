"""Exam: is the answer to a question with options, or to an open one, right (0 or 1)? The rules of MMMU, MMT-Bench, SEED-Bench and GQA.

A question with options has meta["options"], letter -> text, and its letter in meta["answer"]; an open one has the right answers there, one
or a list. Rules of reading: `_choices.py` and `_open_answers.py`. An answer that names no option is wrong and counted (part `unparsed`).
The scripts of MMMU and lmms-eval take an option at random then: compat "upstream" does so too, drawn from the request's own seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mmalign.scorers import _choices, _open_answers
from mmalign.types import Failure, Sample, Score, Value, digest

VERSION = 1
GUESSING = ("mmmu", "lmms_mmmu", "lmms_mmt")


@dataclass(frozen=True)
class Config:
    """`choice` and `open`: how answers to the two kinds of questions are read."""

    choice: _choices.Rule = "mmmu"
    open: _open_answers.Rule = "mmmu"
    compat: Literal["fixed", "upstream"] = "fixed"


def load(config: Config = Config(), device: str = "cpu") -> Exam:
    return Exam(config)


@dataclass(frozen=True)
class Exam:
    """The scorer. `detail` is the letter read (or "unparsed"), or the open answer as it was compared."""

    config: Config
    name: str = "exam"
    range: tuple[float, float] = (0.0, 1.0)

    @property
    def fingerprint(self) -> str:
        return digest("exam", VERSION, self.config)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Score:
        prompt = sample.request.prompt
        options, answer = prompt.meta.get("options"), prompt.meta.get("answer")
        is_letter = isinstance(options, Mapping) and isinstance(answer, str) and answer in options
        if not (is_letter if options is not None else answer):
            wanted = "its letter among its options" if options is not None else "a right answer"
            return Failure("score", "missing", f"The prompt {prompt.id} needs {wanted} in its metadata; got {answer!r}.")
        if sample.answer is None:
            return Failure("score", "missing", f"The sample {sample.request.id} holds no answer.")
        if options is None:
            return self._open(sample.answer, [answer] if isinstance(answer, str) else list(answer or ()))
        letter = _choices.read(sample.answer, options, self.config.choice)
        parts, detail = {"unparsed": float(letter is None)}, letter or "unparsed"
        if letter is None and self.config.compat == "upstream" and self.config.choice in GUESSING:
            letter = random.Random(sample.request.seed).choice(sorted(options))
        return Value(float(letter == answer), parts, detail=detail)

    def _open(self, text: str, right: Sequence[str]) -> Value:
        correct = _open_answers.is_right(text, right, self.config.open)
        detail = _open_answers.plain(text, self.config.open)
        return Value(float(correct), {"unparsed": float(not detail.strip())}, detail=detail)
