"""SEED-Bench: 14,232 multiple-choice questions on pictures in nine dimensions, answered by the likeliest option.

Paper: Li et al., arXiv 2307.16125; AILab-CVC/SEED-Bench at 991e849 (eval.py). The official protocol asks for no letter: the model's answer
is the option whose words have the least mean loss after the question. `protocol=generated` is what papers on chat models report: the
options are listed, a letter is asked for, and the first character of the reply counts (lmms-eval at 75571cf, tasks/seedbench/utils.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

from mmalign.evaluators._pictures import folder

from mmalign.types import MmalignError, Prompt, Row, UsageError

NEEDS = ("folder: seed_bench-images",)
DIMENSIONS = {
    1: "scene_understanding",
    2: "instance_identity",
    3: "instance_attributes",
    4: "instance_location",
    5: "instances_counting",
    6: "spatial_relation",
    7: "instance_interaction",
    8: "visual_reasoning",
    9: "text_understanding",
}
LETTERS = ("A", "B", "C", "D")
REQUEST = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Evaluator:
    """`images`: the folder SEED-Bench-image; `protocol`: the likeliest option, or the letter that the model writes."""

    protocol: Literal["ranked", "generated"] = "ranked"
    images: str = ""
    scorers: ClassVar[tuple[str, ...]] = ("exam",)
    scorer_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"exam": {"choice": "first"}}

    @property
    def task(self) -> str:
        return "choose" if self.protocol == "ranked" else "answer"

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The questions on pictures (dimensions 1 to 9; 10 to 12 are on videos) in the file's order, by their ids."""
        from mmalign.data import data_path

        if split != "test":
            raise UsageError(f"Suite 'seed_bench' has one split, test; got '{split}'.")
        place = folder(self.images, "seed_bench", "SEED-Bench-image")
        path = data_path("seed_bench")
        content = json.loads(path.read_text(encoding="utf-8"))
        questions = content["questions"] if isinstance(content, dict) else content
        return [self._prompt(one, place, path) for one in questions if one.get("question_type_id") in DIMENSIONS]

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """overall (over questions) and the nine dimensions: shares of right answers, None where there is no question; unparsed."""
        groups: dict[str, list[float]] = {"overall": [], **{name: [] for name in (*DIMENSIONS.values(), "unparsed")}}
        for row in rows:
            value = row.value("exam")
            for name in ("overall", row.tag):
                groups[name].append(value.x)
            groups["unparsed"].append(value.parts["unparsed"])
        return {name: fmean(values) if values else None for name, values in groups.items()}

    def _prompt(self, one: Mapping[str, Any], place: Path, path: Path) -> Prompt:
        try:
            options = {letter: str(one[f"choice_{letter.lower()}"]) for letter in LETTERS}
            name, text, picture, answer = str(one["question_id"]), str(one["question"]), str(one["data_id"]), str(one["answer"])
        except KeyError as error:
            raise MmalignError(f"{path}: a question of SEED-Bench lacks {error}: {str(one)[:200]}") from error
        if answer not in options:
            raise MmalignError(f"{path}, question {name}: expected an answer among A, B, C and D; got {answer!r}.")
        if self.protocol == "generated":
            text = "\n".join([text, *(f"{letter}. {option}" for letter, option in options.items()), REQUEST])
        meta = {"images": [str(place / picture)], "options": options, "answer": answer}
        return Prompt(name, text, (DIMENSIONS[one["question_type_id"]],), meta)
