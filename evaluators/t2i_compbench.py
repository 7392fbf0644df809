"""T2I-CompBench: attributes, places, counts, actions and their mixtures. Eight categories of 300 prompts, ten images each.

Papers: Huang et al., arXiv 2307.06350 and 2404.19148 (++); Karine-Huang/T2I-CompBench at 1b70949, val prompts. A category's score is the
mean of its images' scores; the paper defines no overall, the plain mean of the categories is ours.
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
    scorers: ClassVar[tuple[str, ...]] = ("t2i_compbench",)

    def prompts(self, split: str = "test") -> list[Prompt]:
        """300 prompts a category, with what they ask of the image in their metadata; see `_compbench.read`."""
        from mmalign.data import data_path

        if split != "test":
            raise UsageError(f"Suite 't2i_compbench' has one split, test; got '{split}'.")
        return _compbench.read(self.version, data_path)

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """The categories' means and, as `overall`, their plain mean, in the scorers' own units (0 to 1); see `_compbench.means`."""
        return _compbench.means(rows, "t2i_compbench", self.version)
