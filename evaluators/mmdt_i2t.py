"""MMDT safety, image to text: how often does a model write what an unsafe picture asks for? Typography, illustration and jailbreak.

Paper: Xu et al., MMDT, arXiv 2503.14827 (ICLR 2025); AI-secure/MMDT mmdt/perspectives/safety/eval_image_to_text.py and mmdt/summarize.py at
68be1c8. One greedy answer of at most 128 tokens to each picture and its request; the score is the mean harmful-content rate of the three
scenarios, lower is better. Text to image is the suite `mmdt`. The data are unsafe and not shipped: take AI-Secure/MMDecodingTrust-I2T from
its authors. Changed: where an answer could not be made, there is a hole; the official script judges the answer before it once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mmalign.evaluators import _mmdt, _tables
from mmalign.evaluators._pictures import unpacked

from mmalign.types import MmalignError, Prompt, Row, UsageError, Value

NEEDS = ("folder: mmdt_i2t",)
SCENARIOS = ("typography", "illustration", "jailbreak")
SOURCE = "the three splits of the config safety of https://huggingface.co/datasets/AI-Secure/MMDecodingTrust-I2T"


@dataclass(frozen=True)
class Evaluator:
    """`data`: the folder with a file for each scenario (columns prompts, image and scenario, the harm's category), such as a copy of the
    data set; an image is a picture's bytes, as Parquet files hold them, or its path from the file."""

    data: str = ""
    scorers: ClassVar[tuple[str, ...]] = ("mmdt_i2t",)
    sampling_options: ClassVar[Mapping[str, Any]] = {"max_tokens": 128}
    free: ClassVar[tuple[str, ...]] = ("data",)
    refused: ClassVar[Mapping[str, Value]] = {"mmdt_i2t": Value(0.0, {"harmful": 0.0, "bypass": 0.0})}
    higher_is_better: ClassVar[dict[str, bool]] = _mmdt.names(SCENARIOS)
    task: ClassVar[str] = "answer"

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The scenarios' requests in the files' order, tagged by scenario and category; the id is the scenario and the row's index."""
        if split != "test":
            raise UsageError(f"Suite 'mmdt_i2t' has one split, test; got '{split}'.")
        folder = _tables.place(self.data, "mmdt_i2t", SOURCE)
        folder = folder / "safety" if (folder / "safety").is_dir() else folder
        return [prompt for scenario in SCENARIOS for prompt in self._scenario(scenario, folder)]

    def _scenario(self, scenario: str, folder: Path) -> list[Prompt]:
        columns = ("prompts", "image", "scenario")
        listed = [(path, row) for path in _tables.parts(folder, scenario, "mmdt_i2t") for row in _tables.rows(path, columns)]
        return [
            Prompt(
                f"{scenario}-{index}",
                row["prompts"],
                (scenario, row["scenario"]),
                {"category": row["scenario"], "images": [_picture(row["image"], path)]},
            )
            for index, (path, row) in enumerate(listed)
        ]

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """overall and the scenarios: harmful-content rates; bypass: rates of answers without a phrase of refusal."""
        return _mmdt.rates(rows, "mmdt_i2t", SCENARIOS)


def _picture(found: object, path: Path) -> str:
    """The picture's path: of one that lies beside the file, or of one that the file holds, which is unpacked."""
    content = found.get("bytes") if isinstance(found, dict) else found
    if isinstance(content, bytes):
        return unpacked(content, "mmdt_i2t")
    if isinstance(content, str) and (path.parent / content).is_file():
        return str((path.parent / content).resolve())
    raise MmalignError(f"{path}: an image is neither a picture's bytes nor the path of a file beside it: {str(content)[:200]}.")
