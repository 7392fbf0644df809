"""Visual text, as in Flow-GRPO: how exactly does the quoted text of a prompt stand in the image? 1,018 prompts, mean OCR accuracy.

Flow-GRPO (arXiv 2505.05470): yifan123/flow_grpo dataset/ocr/test.txt at ac4c86e; its `eval_reward_ocr` is the reported text accuracy, one
image per prompt. The rule is in the scorer `ocr`, whose reader is RapidOCR where the paper's is PaddleOCR 2.9.1: another reader reads other
letters, so the result names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from mmalign.types import MmalignError, Prompt, Row, UsageError


@dataclass(frozen=True)
class Evaluator:
    """No options."""

    scorers: ClassVar[tuple[str, ...]] = ("ocr",)

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The lines in the file's order, tagged by the number of words to be written; the id is the line's index in five digits."""
        from mmalign.data import data_path, load_lines

        if split != "test":
            raise UsageError(f"Suite 'ocr_text' has one split, test; got '{split}'.")
        path = data_path("ocr_text")
        return [_prompt(index, line, str(path)) for index, line in enumerate(load_lines(path))]

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """accuracy: mean of 1 - edit distance per letter; exact: share of images that hold the whole text; words_*: by number of words.
        None where there is no image.
        """
        values = [row.value("ocr").x for row in rows]
        by_words: dict[str, list[float]] = {f"words_{count}": [] for count in ("1", "2", "3", "4", "5+")}
        for row in rows:
            by_words[row.tag].append(row.value("ocr").x)
        return {
            "accuracy": _mean(values),
            "exact": _mean([float(value == 1.0) for value in values]),
            **{name: _mean(some) for name, some in by_words.items()},
        }


def _prompt(index: int, line: str, path: str) -> Prompt:
    parts = line.split('"')
    if len(parts) != 3 or not parts[1].strip():
        raise MmalignError(f"{path}, line {index + 1}: expected one text in straight double quotes; got {line[:200]!r}.")
    count = len(parts[1].split())
    return Prompt(f"{index:05d}", line, (f"words_{count if count < 5 else '5+'}",), {"target": parts[1]})


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
