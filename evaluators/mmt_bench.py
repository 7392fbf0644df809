"""MMT-Bench: 3,127 multiple-choice questions (VAL) in 32 meta-tasks and 162 subtasks, from recognition to navigation.

Paper: Ying et al., arXiv 2404.16006; OpenGVLab/MMT-Bench at 84012c9 (vlmeval/evaluate/multiple_choice.py, report_acc_MMT). Overall is the
share of right answers over all questions; a meta-task is the mean of its subtasks' shares. Answers are matched by the official rules up to
where the official script asks a language model, and at random after that: here such an answer is wrong and counted in `unparsed`, as in
its own exact matching.
"""

from __future__ import annotations

import ast
import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

from mmalign.evaluators._pictures import unpacked

from mmalign.types import MmalignError, Prompt, Row, UsageError

TASKS = {
    "visual_recognition": "VR",
    "localization": "Loc",
    "ocr": "OCR",
    "counting": "Count",
    "hallucination": "HLN",
    "image_retrieval": "IR",
    "threed": "3D",
    "visual_captioning": "VC",
    "visual_grounding": "VG",
    "doc_understanding": "DU",
    "action_recognition": "AR",
    "pixel_level_perception": "PLP",
    "image-to-image_translation": "I2IT",
    "relation_reasoning": "RR",
    "intelligence_quotient_test": "IQT",
    "emotion": "Emo",
    "visual_illusion": "VI",
    "meme_understanding": "MemU",
    "visual_prompt_understanding": "VPU",
    "anomaly_detection": "AND",
    "keypoint_detection": "KD",
    "visual_commonsense_reasoning": "VCR",
    "image_evaluation_judgement": "IEJ",
    "multiple_image_analysis": "MIA",
    "cross_image_matching": "CIM",
    "temporal_understanding": "TU",
    "visual_code": "VP",
    "medical_understanding": "MedU",
    "autonomous_driving": "AUD",
    "discipline_knowledge_reasoning": "DKR",
    "embodied_ai": "EA",
    "gui_navigation": "GN",
}
LETTERS = "ABCDEFGHI"
REQUEST = "Please select the correct answer from the options above. \n"
COLUMNS = frozenset({"index", "question", "answer", "image", "category", "l2-category"})
LEAST_PICTURE = 64  # a shorter cell names the row whose picture it shares


@dataclass(frozen=True)
class Evaluator:
    """`images`: of a question with several pictures, the official merged one (VAL) or each for itself (VAL_MI)."""

    images: Literal["merged", "separate"] = "merged"
    scorers: ClassVar[tuple[str, ...]] = ("exam",)
    scorer_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"exam": {"choice": "can_infer"}}
    task: ClassVar[str] = "answer"

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The questions in the file's order, by its index; rows without a picture are left out, as the official reader does."""
        from mmalign.data import data_path

        if split != "test":
            raise UsageError(f"Suite 'mmt_bench' has one split, test (the benchmark's VAL); got '{split}'.")
        path = data_path("mmt_bench" if self.images == "merged" else "mmt_bench-separate")
        rows = _rows(path)
        cells = {row["index"]: row["image"] for row in rows}
        return [_prompt(row, cells, path) for row in rows if row["image"]]

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """overall (over questions), the 32 meta-tasks by their codes (means of subtasks, None where empty), unparsed (share)."""
        by_task: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            task, subtask = row.request.prompt.tags
            by_task.setdefault(task, {}).setdefault(subtask, []).append(row.value("exam").x)
        return {
            "overall": fmean(row.value("exam").x for row in rows) if rows else None,
            **{code: fmean(map(fmean, by_task[code].values())) if code in by_task else None for code in TASKS.values()},
            "unparsed": fmean(row.value("exam").parts["unparsed"] for row in rows) if rows else None,
        }


def question(row: Mapping[str, str], options: Mapping[str, str]) -> str:
    """What the model is asked: hint, question, options, request."""
    listed = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    hint = f"Hint: {row['hint']}\n" if row.get("hint") else ""
    return f"{hint}Question: {row['question']}\n" + (f"Options:\n{listed}{REQUEST}" if options else "")


def _prompt(row: Mapping[str, str], cells: Mapping[str, str], path: Path) -> Prompt:
    options = {letter: row[letter] for letter in LETTERS if row.get(letter)}
    if row["l2-category"] not in TASKS or row["answer"] not in options:
        what = f"a meta-task of the 32 and an answer among {', '.join(options)}; got {row['l2-category']!r} and {row['answer']!r}"
        raise MmalignError(f"{path}, question {row['index']}: expected {what}.")
    meta = {"images": _pictures(row, cells, path), "options": options, "answer": row["answer"]}
    return Prompt(row["index"], question(row, options), (TASKS[row["l2-category"]], row["category"]), meta)


def _pictures(row: Mapping[str, str], cells: Mapping[str, str], path: Path) -> list[str]:
    cell = row["image"]
    if len(cell) <= LEAST_PICTURE:
        cell = cells.get(cell, "")
    encoded = ast.literal_eval(cell) if cell.startswith("[") else [cell]
    try:
        return [unpacked(base64.b64decode(one, validate=True), "mmt_bench") for one in encoded if one]
    except binascii.Error as error:
        raise MmalignError(f"{path}, question {row['index']}: the picture is no base64 ({error}).") from error


def _rows(path: Path) -> list[dict[str, str]]:
    """The table's rows as texts, with "" where a cell is empty. (Read by pandas' defaults, an option that says None or NA would vanish.)"""
    import pandas as pd

    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    if lacking := COLUMNS - set(table.columns):
        raise MmalignError(f"{path}: the table lacks the columns {', '.join(sorted(lacking))}; it is not MMT-Bench's.")
    return table.to_dict("records")
