"""POPE: does a model say that things are in a picture which are not? 9,000 yes-or-no questions, balanced, in three kinds.

Paper: Li et al., arXiv 2305.10355; AoiDragon/POPE at 08d957b. Questions on random, popular and adversarial objects; yes is the positive
class; each number is reported by kind and as the mean of the kinds, F1 first, as papers quote it. Answers are read without a default: the
official script takes whatever does not say no for a yes (`--set yes_no.rule=pope` reads so, for equal numbers).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

from mmalign.evaluators._pictures import folder

from mmalign.types import MmalignError, Prompt, Row, UsageError

NEEDS = ("folder: pope-images",)
KINDS = ("random", "popular", "adversarial")
MEASURES = ("f1", "accuracy", "precision", "recall", "yes_ratio", "unparsed")
PICTURES = {"coco": "COCO val2014", "aokvqa": "COCO val2014", "gqa": "GQA's images"}


@dataclass(frozen=True)
class Evaluator:
    """`pictures`: on which the questions are (coco is the paper's); `images`: the folder that holds them; `suffix`: after each question.

    LLaVA and many after it append "\\nAnswer the question using a single word or phrase."; POPE itself does not.
    """

    pictures: Literal["coco", "aokvqa", "gqa"] = "coco"
    images: str = ""
    suffix: str = ""
    scorers: ClassVar[tuple[str, ...]] = ("yes_no",)
    task: ClassVar[str] = "answer"

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The questions of the three kinds in the files' order; the id is the kind and the question's number."""
        from mmalign.data import data_path

        if split != "test":
            raise UsageError(f"Suite 'pope' has one split, test; got '{split}'.")
        place = folder(self.images, "pope", PICTURES[self.pictures])
        made = []
        for kind in KINDS:
            path = data_path(f"pope-{self.pictures}-{kind}")
            made += [self._prompt(kind, row, place, path) for row in _rows(path)]
        return made

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """f1, accuracy, precision, recall, yes_ratio and unparsed: means over the kinds, None while one is undefined; then by kind."""
        by_kind = {kind: _measures([row for row in rows if row.tag == kind]) for kind in KINDS}
        found: dict[str, float | None] = {}
        for name in MEASURES:
            known = [value for kind in KINDS if (value := by_kind[kind][name]) is not None]
            found[name] = fmean(known) if len(known) == len(KINDS) else None
        return found | {f"{name}_{kind}": by_kind[kind][name] for kind in KINDS for name in MEASURES}

    def _prompt(self, kind: str, row: dict[str, Any], place: Path, path: Path) -> Prompt:
        if {"question_id", "image", "text", "label"} - set(row):
            raise MmalignError(f"{path}: a question of POPE needs question_id, image, text and label; got {str(row)[:200]}.")
        meta = {"images": [str(place / row["image"])], "label": row["label"]}
        return Prompt(f"{kind}-{row['question_id']}", row["text"] + self.suffix, (kind,), meta)


def _measures(rows: Sequence[Row]) -> dict[str, float | None]:
    """Of one kind; what divides by nothing is None. An unparsed answer is no yes: it misses a positive and makes no false one."""
    counts = {(label, said): 0 for label in ("yes", "no") for said in (0.0, 1.0)}
    for row in rows:
        counts[str(row.request.prompt.meta["label"]).lower(), row.value("yes_no").parts["yes"]] += 1
    hits, misses, alarms = counts["yes", 1.0], counts["yes", 0.0], counts["no", 1.0]
    precision, recall = _share(hits, hits + alarms), _share(hits, hits + misses)
    return {
        "f1": _share(2 * hits, 2 * hits + alarms + misses),
        "accuracy": _share(sum(row.value("yes_no").x for row in rows), len(rows)),
        "precision": precision,
        "recall": recall,
        "yes_ratio": _share(hits + alarms, len(rows)),
        "unparsed": _share(sum(row.value("yes_no").parts["unparsed"] for row in rows), len(rows)),
    }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _rows(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line (COCO), or one array (A-OKVQA and GQA)."""
    from mmalign.data import load_json_lines

    return json.loads(path.read_text(encoding="utf-8")) if path.read_bytes()[:1] == b"[" else load_json_lines(path)
