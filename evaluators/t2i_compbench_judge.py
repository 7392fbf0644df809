"""T2I-CompBench by a VLM judge, as SeGroS and RecA report it: eight categories of 300 prompts, one image each, rated 0 to 100.

Prompts of Karine-Huang/T2I-CompBench at 1b70949; judge and scale as in arXiv 2603.19807, whose question is not published. Another benchmark
than the suite `t2i_compbench`, on the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmalign.evaluators import _compbench

from mmalign.types import Prompt, Row, UsageError


@dataclass(frozen=True)
class Evaluator:
    """`version`: the eight categories of T2I-CompBench++, or the six of version 1 (no 3d_spatial, no numeracy)."""

    version: _compbench.Version = "++"
    scorers: ClassVar[tuple[str, ...]] = ("t2i_compbench_judge",)

    def prompts(self, split: str = "test") -> list[Prompt]:
        """300 prompts a category, with what they ask of the image in their metadata; see `_compbench.read`."""
        from mmalign.data import data_path

        if split != "test":
            raise UsageError(f"Suite 't2i_compbench_judge' has one split, test; got '{split}'.")
        return _compbench.read(self.version, data_path)

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """The categories' means and, as `overall`, their plain mean, in 0 to 100; see `_compbench.means`."""
        return _compbench.means(rows, "t2i_compbench_judge", self.version, scale=100.0)
