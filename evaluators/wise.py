"""WISE, as in its paper: does the image show what one must know to understand the prompt? 1,000 prompts, the WiScore.

Paper: Niu et al., arXiv 2503.07265; PKU-YuanGroup/WISE WISE_legacy/ at eb51174 (Calculate.py). Culture 400, time 167, space 133, biology,
physics and chemistry 100 each; one image per prompt. Overall is the sum of the groups' mean WiScores under the prompts' shares.
WISE-Verified is another protocol on other prompts: suite `wise_verified`. Unlike the official script, a prompt whose reply cannot be read
is a hole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from mmalign.evaluators._wise import Group, means, read

from mmalign.types import Prompt, Row, UsageError

FILES = ("wise-culture", "wise-space-time", "wise-science")
GROUPS = {
    "culture": Group(1, 400, 0.4),
    "time": Group(401, 567, 0.167),
    "space": Group(568, 700, 0.133),
    "biology": Group(701, 800, 0.1),
    "physics": Group(801, 900, 0.1),
    "chemistry": Group(901, 1000, 0.1),
}
RATINGS = ("consistency", "realism", "aesthetic_quality")


@dataclass(frozen=True)
class Evaluator:
    """`rewritten`: draw from prompts in which a language model has spelled the answer out; the judge still sees the original."""

    rewritten: bool = False
    scorers: ClassVar[tuple[str, ...]] = ("wise",)

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The prompts by id; the id is the prompt's number, as in the official image names."""
        from mmalign.data import data_path

        if split != "test":
            raise UsageError(f"Suite 'wise' has one split, test; got '{split}'.")
        rewritten = [data_path(f"{name}-rewritten") for name in FILES] if self.rewritten else []
        return read([data_path(name) for name in FILES], GROUPS, rewritten)

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """overall: weighted WiScore, None while a group is empty; unweighted: Bagel's plain mean of groups; groups; ratings over 2."""
        ratings = {name: fmean(row.value("wise").parts[name] for row in rows) if rows else None for name in RATINGS}
        return {**means(rows, GROUPS, "wise"), **ratings}
