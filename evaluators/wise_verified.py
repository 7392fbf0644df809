"""WISE-Verified: does the image show what one must know to understand the prompt? 1,000 revised prompts, one yes or no each.

PKU-YuanGroup/WISE data_verified/ and calculate_verified.py at eb51174 (the repository's protocol since April 2026). Culture 400, five more
groups of 120; one image per prompt; overall is the sum of the groups' shares of right images under the prompts' shares. Half of the prompts
are not in the paper's files and the judge is another: no number here may stand beside one of the suite `wise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmalign.evaluators._wise import Group, means, read

from mmalign.types import Prompt, Row, UsageError

FILES = ("wise-verified-culture", "wise-verified-space-time", "wise-verified-science")
GROUPS = {
    "culture": Group(1, 400, 0.4),
    "time": Group(401, 520, 0.12),
    "space": Group(521, 640, 0.12),
    "biology": Group(641, 760, 0.12),
    "physics": Group(761, 880, 0.12),
    "chemistry": Group(881, 1000, 0.12),
}


@dataclass(frozen=True)
class Evaluator:
    """No options."""

    scorers: ClassVar[tuple[str, ...]] = ("wise_verified",)

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The prompts by id; the id is the prompt's number, as in the official image names."""
        from mmalign.data import data_path

        if split != "test":
            raise UsageError(f"Suite 'wise_verified' has one split, test; got '{split}'.")
        return read([data_path(name) for name in FILES], GROUPS)

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """overall: weighted share of right images, None while a group is empty; unweighted: the groups' plain mean; groups."""
        return means(rows, GROUPS, "wise_verified")
