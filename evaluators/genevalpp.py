"""GenEval++: are three or more objects with counts, colours, places and sizes drawn exactly as a prompt says? 280 prompts, seven tasks.

Paper: Ye et al., Echo-4o, arXiv 2508.09987; yejy53/Echo-4o test_scripts/ at 28f36d7. 40 prompts a task, one image each; overall is the mean
of the tasks' accuracies. Unlike the official script, a reply that cannot be read is a hole and not a wrong image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from mmalign.types import MmalignError, Prompt, Row, UsageError

TASKS = (
    "color_attr",
    "spatial_count_attr",
    "color_spatial_attr",
    "color_count_attr",
    "multi_object_count_attr",
    "size_spatial_attr",
    "counting",
)


@dataclass(frozen=True)
class Evaluator:
    """`is_rounded`: each accuracy to four digits before and after the mean, as the official script has it."""

    is_rounded: bool = False
    scorers: ClassVar[tuple[str, ...]] = ("genevalpp",)

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The prompts in the file's order; the id is the line's number from 1, as in the official image names."""
        from mmalign.data import data_path, load_json_lines

        if split != "test":
            raise UsageError(f"Suite 'genevalpp' has one split, test; got '{split}'.")
        path = data_path("genevalpp")
        prompts = []
        for number, row in enumerate(load_json_lines(path), start=1):
            if row.get("tag") not in TASKS or not row.get("include") or not row.get("prompt"):
                raise MmalignError(f"{path}, line {number}: expected a tag of GenEval++, 'include' and 'prompt'; got {str(row)[:200]}.")
            prompts.append(Prompt(str(number), row["prompt"], (row["tag"],), row))
        return prompts

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """overall: mean of the accuracies of the tasks present; images: over all images; tasks. None where there is no image."""
        by_task: dict[str, list[float]] = {task: [] for task in TASKS}
        for row in rows:
            by_task[row.tag].append(row.value("genevalpp").x)
        tasks = {task: self._mean(values) for task, values in by_task.items()}
        overall = self._mean([mean for mean in tasks.values() if mean is not None])
        return {"overall": overall, **tasks, "images": self._mean([x for values in by_task.values() for x in values])}

    def _mean(self, values: Sequence[float]) -> float | None:
        if not values:
            return None
        return round(fmean(values), 4) if self.is_rounded else fmean(values)
