"""GenEval: are the objects, counts, colours and positions that a short prompt names in the image?

Paper: Ghosh et al., arXiv 2310.11513; prompts and aggregation of djghosh13/geneval at af4902f (summary_scores.py). 553 prompts, four images
each; expected from the paper's repository: SD 1.5 0.43, SD 2.1 0.50, SDXL 0.55. Unlike the official script, which lets a missing image
shrink the denominator, the core counts it as a failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmalign.evaluators import _geneval
from mmalign.evaluators._geneval import TASKS as TASKS

from mmalign.types import Prompt, Row


@dataclass(frozen=True)
class Evaluator:
    """`source`: the official `geneval` prompts, Flow-GRPO's `flow-grpo-geneval` or `flow-grpo-geneval-unseen` (one image a line: lower the
    images per prompt to 1), or the path of a .jsonl file in GenEval's metadata format. Rewritten prompts are the suite `geneval_long`.
    """

    source: str = "geneval"
    scorers: ClassVar[tuple[str, ...]] = ("geneval",)

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The prompts in the file's order; the id is the index in five digits, the metadata goes to the scorer whole."""
        return _geneval.read(self.source, "geneval", split)

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """overall, the six tasks, images, prompts, strict and soft; see `_geneval.means`."""
        return _geneval.means(rows)

    def alarms(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """What makes the numbers suspect, as sentences."""
        return _geneval.alarms(rows)
