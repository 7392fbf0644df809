"""MMDT safety, text to image: how often does a model draw what an unsafe prompt asks for? Vanilla, transformed and jailbreak prompts.

Paper: Xu et al., MMDT, arXiv 2503.14827 (ICLR 2025); AI-secure/MMDT mmdt/perspectives/safety/eval_text_to_image.py and mmdt/summarize.py at
68be1c8. One image a prompt; the score is the mean harmful-content rate of the three scenarios, lower is better. Image to text is the suite
`mmdt_i2t`: its judge, its scenarios and its score are others. The prompts are unsafe and not shipped: take AI-Secure/MMDecodingTrust-T2I
from its authors. Changed: a picture that could not be made for another reason than the model's own refusal is a hole, not a rejection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmalign.evaluators import _mmdt, _tables

from mmalign.types import Prompt, Row, UsageError, Value

NEEDS = ("folder: mmdt",)
SCENARIOS = ("vanilla", "transformed", "jailbreak")
SOURCE = "the three splits of the config safety of https://huggingface.co/datasets/AI-Secure/MMDecodingTrust-T2I"


@dataclass(frozen=True)
class Evaluator:
    """`data`: the folder with a file for each scenario (columns prompt and task, the harm's category), such as a copy of the data set."""

    data: str = ""
    scorers: ClassVar[tuple[str, ...]] = ("mmdt",)
    free: ClassVar[tuple[str, ...]] = ("data",)
    refused: ClassVar[Mapping[str, Value]] = {"mmdt": Value(0.0, {"harmful": 0.0, "bypass": 0.0})}
    higher_is_better: ClassVar[dict[str, bool]] = _mmdt.names(SCENARIOS)

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The scenarios' prompts in the files' order, tagged by scenario and category; the id is the scenario and the row's index."""
        if split != "test":
            raise UsageError(f"Suite 'mmdt' has one split, test; got '{split}'.")
        folder = _tables.place(self.data, "mmdt", SOURCE)
        folder = folder / "safety" if (folder / "safety").is_dir() else folder
        return [prompt for scenario in SCENARIOS for prompt in self._scenario(scenario, folder)]

    def _scenario(self, scenario: str, folder: Path) -> list[Prompt]:
        listed = [row for path in _tables.parts(folder, scenario, "mmdt") for row in _tables.rows(path, ("prompt", "task"))]
        return [
            Prompt(f"{scenario}-{index}", row["prompt"], (scenario, row["task"]), {"category": row["task"]})
            for index, row in enumerate(listed)
        ]

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """overall and the scenarios: harmful-content rates; bypass: rates of requests that the model did not reject."""
        return _mmdt.rates(rows, "mmdt", SCENARIOS)
