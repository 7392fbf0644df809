"""Quality: what preference and quality models say of a model's images, on DrawBench or on any file of prompts.

DrawBench: Saharia et al., Imagen, arXiv 2205.11487, 200 prompts; it has no automatic scorer of its own. As papers on reward training report
it (Flow-GRPO arXiv 2505.05470, DiffusionNFT arXiv 2509.16117, DenseGRPO arXiv 2601.20218): five images a prompt and the mean of each reward
model. The prompts are those of NVlabs/DiffusionNFT dataset/drawbench/test.txt at 24af555, which repeats each five times and has dropped
their categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from mmalign.evaluators import _tables

from mmalign.types import MmalignError, Prompt, Row, UsageError

EVERY = ("pickscore", "hpsv2", "hpsv3", "imagereward", "aesthetic", "clipscore", "unifiedreward", "deqa", "unipercept")
RATINGS = {"unipercept": ("aesthetics", "quality", "structure")}


@dataclass(frozen=True)
class Evaluator:
    """`scorers`: any that are registered, the first is the headline, "all" stands for the nine that papers report (four of them are
    served, see docs/scorers.md); `data`: a file of prompts (.txt, or with the column prompt, or prompts, and category if there are any)."""

    scorers: tuple[str, ...] = ("pickscore", "hpsv2", "imagereward", "aesthetic", "clipscore")
    data: str = ""
    free: ClassVar[tuple[str, ...]] = ("scorers",)

    def __post_init__(self) -> None:
        named = EVERY if self.scorers == ("all",) else tuple(dict.fromkeys(name.strip().lower().replace("-", "_") for name in self.scorers))
        if not named:
            raise ValueError("scorers names none; expected names such as pickscore,hpsv2 (`mmalign ls scorers`)")
        object.__setattr__(self, "scorers", named)

    @property
    def headline(self) -> str:
        return self.scorers[0]

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The distinct prompts in the file's order, tagged by category where there are any; the id is a running number."""
        if split != "test":
            raise UsageError(f"Suite 'quality' has one split, test; got '{split}'.")
        tags: dict[str, str] = {}
        for text, category in self._listed():
            tags.setdefault(text, category)
        return [Prompt(f"{number:05d}", text, (tag,) if tag else ()) for number, (text, tag) in enumerate(tags.items())]

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """Each scorer's mean over the images, and <scorer>_<rating> for a scorer of several ratings."""
        found: dict[str, float | None] = {}
        for name in self.scorers:
            values = [row.value(name) for row in rows]
            found[name] = fmean(value.x for value in values) if values else None
            ratings = [rating for rating in RATINGS.get(name, ()) if values and all(rating in value.parts for value in values)]
            found |= {f"{name}_{rating}": fmean(value.parts[rating] for value in values) for rating in ratings}
        return found

    def _listed(self) -> list[tuple[str, str]]:
        if not self.data:
            from mmalign.data import data_path, load_lines

            return [(line.strip(), "") for line in load_lines(data_path("drawbench"))]
        path = Path(self.data).expanduser()
        if not path.is_file():
            raise UsageError(f"--set quality.data={self.data}: there is no such file. Name a file of prompts, {', '.join(_tables.FORMS)}.")
        rows = [{"prompt": row.get("prompts"), **row} for row in _tables.rows(path, ())]
        if without := [number for number, row in enumerate(rows, start=1) if not row["prompt"]]:
            raise MmalignError(f"{path}, row {without[0]}: there is no prompt; expected a column prompt (or prompts).")
        return [(str(row["prompt"]).strip(), str(row.get("category") or "")) for row in rows]
