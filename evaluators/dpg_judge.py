"""DPG-Bench judged by a VLM: the prompts and question graphs of DPG-Bench, answered by a model behind an endpoint in place of mPLUG.

Paper: Hu et al., ELLA, arXiv 2403.05135; data of TencentQQGYLab/ELLA at 3c228f1. Not DPG-Bench as published: the suite `dpg` is, and no
number here may stand beside one of it.
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
    scorers: ClassVar[tuple[str, ...]] = ("dpg_judge",)

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The prompts by id, with their question graphs in the metadata."""
        from mmalign.data import data_path

        if split != "test":
            raise UsageError(f"Suite 'dpg_judge' has one split, test; got '{split}'.")
        return _dpg.read(data_path("dpg"), data_path("dpg-questions"), self.compat)

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """overall, five broad categories and the narrow ones present, in 0 to 100; see `_dpg.means`."""
        return _dpg.means(rows, "dpg_judge", self.compat)
