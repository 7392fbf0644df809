"""DPG-Bench: how much of a dense prompt does the image show? 1,065 prompts of 67 words, four images each, questions with parents.

Paper: Hu et al., ELLA, arXiv 2403.05135; TencentQQGYLab/ELLA dpg_bench/ at 3c228f1. The score is 100 times the mean over images of the
share of questions that mPLUG answers with yes. By default two faults of the official script are mended: it drops the first question of
its file, and takes categories from the last of the four images alone (`compat` "upstream" keeps both). Categories ignore dependencies,
as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmalign.evaluators import _dpg

from mmalign.types import Prompt, Row, UsageError


@dataclass(frozen=True)
class Evaluator:
    """`compat`: the official script's dropped question and last-image categories ("upstream"), or neither ("fixed")."""

    compat: _dpg.Compat = "fixed"
    scorers: ClassVar[tuple[str, ...]] = ("dpg",)

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The prompts by id, with their question graphs in the metadata."""
        from mmalign.data import data_path

        if split != "test":
            raise UsageError(f"Suite 'dpg' has one split, test; got '{split}'.")
        return _dpg.read(data_path("dpg"), data_path("dpg-questions"), self.compat)

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """overall, five broad categories and the narrow ones present, in 0 to 100; see `_dpg.means`."""
        return _dpg.means(rows, "dpg", self.compat)
