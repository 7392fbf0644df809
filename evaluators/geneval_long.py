"""GenEval with long prompts: its 553 prompts as a language model rewrote them for Bagel, under the same verdicts.

Prompts: ByteDance-Seed/Bagel eval/gen/geneval/prompts/evaluation_metadata_long.jsonl at 056b5fd; verdicts and aggregation of GenEval
(arXiv 2310.11513). Papers that report "GenEval with a rewriter" mean this kind of prompt; the numbers run higher than GenEval's and never
stand beside them. UniWorld and Show-o2 rewrote the prompts in words of their own: give such a file as `source`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmalign.evaluators import _geneval

from mmalign.types import Prompt, Row


@dataclass(frozen=True)
class Evaluator:
    """`source`: `geneval-rewritten`, or the path of a .jsonl file in GenEval's metadata format."""

    source: str = "geneval-rewritten"
    scorers: ClassVar[tuple[str, ...]] = ("geneval",)

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The prompts in the file's order; the id is the index in five digits, the metadata goes to the scorer whole."""
        return _geneval.read(self.source, "geneval_long", split)

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """overall, the six tasks, images, prompts, strict and soft; see `_geneval.means`."""
        return _geneval.means(rows)

    def alarms(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """What makes the numbers suspect, as sentences."""
        return _geneval.alarms(rows)
