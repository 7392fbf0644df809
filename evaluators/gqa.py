"""GQA: 12,578 questions on scenes (testdev, balanced), answered in a word or a phrase.

Paper: Hudson and Manning, arXiv 1902.09506; eval.py of gqadataset.org's download page. Accuracy over the balanced questions, of binary and
open ones, and by structural and semantic type; `distribution` is the chi-square distance of answers from the truth within groups of
questions (lower is better). Consistency needs all questions, validity and plausibility need the choices, which testdev has not. Models
that write answers are asked for one word and read as LLaVA does it: `--set exam.open=exact` takes eval.py's own equality.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from mmalign.evaluators._pictures import folder

from mmalign.types import MmalignError, Prompt, Row, UsageError

NEEDS = ("folder: gqa-images",)
STRUCTURAL = ("verify", "query", "choose", "logical", "compare")
SEMANTIC = {"obj": "object", "attr": "attribute", "cat": "category", "rel": "relation", "global": "scene"}
OPEN = "query"
SUFFIX = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Evaluator:
    """`images`: the folder of GQA's pictures (<imageId>.jpg); `suffix`: after each question."""

    images: str = ""
    suffix: str = SUFFIX
    scorers: ClassVar[tuple[str, ...]] = ("exam",)
    scorer_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"exam": {"open": "llava"}}
    task: ClassVar[str] = "answer"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"distribution": False, "unparsed": False}

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The balanced questions in the file's order, by their ids; the tags are structural and semantic type."""
        from mmalign.data import data_path

        if split != "test":
            raise UsageError(f"Suite 'gqa' has one split, test (the benchmark's testdev); got '{split}'.")
        place = folder(self.images, "gqa", "GQA's images, <imageId>.jpg")
        path = data_path("gqa")
        questions = json.loads(path.read_text(encoding="utf-8"))
        return [self._prompt(name, one, place, path) for name, one in questions.items() if one.get("isBalanced", True)]

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """accuracy, binary, open, the types, unparsed: shares, None where there is no question; distribution."""
        groups: dict[str, list[float]] = {"accuracy": [], "binary": [], "open": []}
        groups |= {name: [] for name in (*STRUCTURAL, *SEMANTIC.values(), "unparsed")}
        for row in rows:
            structural, semantic = row.request.prompt.tags
            value = row.value("exam")
            for name in ("accuracy", "open" if structural == OPEN else "binary", structural, SEMANTIC[semantic]):
                groups[name].append(value.x)
            groups["unparsed"].append(value.parts["unparsed"])
        shares = {name: fmean(values) if values else None for name, values in groups.items()}
        return shares | {"distribution": distribution(rows)}

    def _prompt(self, name: str, one: Mapping[str, Any], place: Path, path: Path) -> Prompt:
        try:
            tags = str(one["types"]["structural"]), str(one["types"]["semantic"])
            meta = {"images": [str(place / f"{one['imageId']}.jpg")], "answer": str(one["answer"]), "group": one["groups"]["global"]}
            text = str(one["question"])
        except (KeyError, TypeError) as error:
            raise MmalignError(f"{path}, question {name}: GQA's fields are expected; {error} is missing.") from error
        if tags[0] not in STRUCTURAL or tags[1] not in SEMANTIC:
            raise MmalignError(f"{path}, question {name}: the types {' and '.join(tags)} are not GQA's.")
        return Prompt(name, text + self.suffix, tags, meta)


def distribution(rows: Sequence[Row]) -> float | None:
    """eval.py's chi-square over the true answers of each group, groups weighed by size, over 100; None without a group.

    A question weighs one, however many answers of it there are.
    """
    answers: dict[str, int] = defaultdict(int)
    for row in rows:
        answers[row.request.prompt.id] += 1
    true: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    given: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        prompt = row.request.prompt
        if (group := prompt.meta["group"]) is not None:
            true[group][prompt.meta["answer"]] += 1 / answers[prompt.id]
            given[group][row.value("exam").detail] += 1 / answers[prompt.id]
    sizes = {group: sum(counts.values()) for group, counts in true.items()}
    if not sizes:
        return None
    distances = {group: sum((given[group][one] - count) ** 2 / count for one, count in counts.items()) for group, counts in true.items()}
    return sum(distances[group] * size for group, size in sizes.items()) / sum(sizes.values()) / 100
