"""MMMU: 900 college questions (validation) with pictures, in 30 subjects of six disciplines; options or open answers.

Paper: Yue et al., arXiv 2311.16502; MMMU-Benchmark/MMMU at bb0b95a (mmmu/utils, mmmu/configs/llava1.5.yaml). The accuracy of a discipline
and of everything is that of its questions, not of its subjects. The official parser takes an option at random for an answer that names
none: here that answer is wrong and counted in `unparsed` (`--set exam.compat=upstream` draws, seeded).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

from mmalign.evaluators._pictures import joined, unpacked

from mmalign.types import MmalignError, Prompt, Row, UsageError

DISCIPLINES: Mapping[str, tuple[str, ...]] = {
    "art_and_design": ("Art", "Art_Theory", "Design", "Music"),
    "business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "health_and_medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health"),
    ),
    "humanities_and_social_science": ("History", "Literature", "Sociology", "Psychology"),
    "tech_and_engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power", "Materials"),
        "Mechanical_Engineering",
    ),
}
SUBJECTS = tuple(subject for subjects in DISCIPLINES.values() for subject in subjects)
CHOOSE = "Answer with the option's letter from the given choices directly."
NAME = "Answer the question using a single word or phrase."
COLUMNS = ("id", "question", "options", "answer", "question_type", *(f"image_{number}" for number in range(1, 8)))


@dataclass(frozen=True)
class Evaluator:
    """`pictures`: every picture that a question names, the first alone (as the official LLaVA script), or all joined into one.

    About one question in twenty names several; a family that reads one picture fails on these unless they are joined.
    """

    pictures: Literal["all", "first", "joined"] = "all"
    scorers: ClassVar[tuple[str, ...]] = ("exam",)
    task: ClassVar[str] = "answer"

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The validation questions, subject by subject; the id is the official one, and the tags are subject and kind of question."""
        import pandas as pd

        from mmalign.data import data_path

        if split != "test":
            raise UsageError(f"Suite 'mmmu' has one split, test (the benchmark's validation set); got '{split}'.")
        place = data_path("mmmu")
        made = []
        for subject in SUBJECTS:
            for path in sorted((place / subject).glob("*.parquet")):
                table = pd.read_parquet(path)
                if lacking := set(COLUMNS) - set(table.columns):
                    raise MmalignError(f"{path}: the table lacks the columns {', '.join(sorted(lacking))}; it is not MMMU's.")
                made += [self._prompt(row, subject, path) for row in table.to_dict("records")]
        return made

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """overall, the disciplines and the subjects: shares of right answers, None where there is no question; unparsed (share)."""
        by_subject: dict[str, list[float]] = {subject: [] for subject in SUBJECTS}
        for row in rows:
            by_subject[row.tag].append(row.value("exam").x)
        disciplines = {name: [x for subject in own for x in by_subject[subject]] for name, own in DISCIPLINES.items()}
        groups = {"overall": [row.value("exam").x for row in rows], **disciplines, **by_subject}
        unparsed = [row.value("exam").parts["unparsed"] for row in rows]
        return {name: fmean(values) if values else None for name, values in (groups | {"unparsed": unparsed}).items()}

    def _prompt(self, row: Mapping[str, Any], subject: str, path: Path) -> Prompt:
        is_choice = row["question_type"] == "multiple-choice"
        texts = _listed(row["options"]) if is_choice else []
        options = {chr(ord("A") + number): text for number, text in enumerate(texts)}
        answer: Any = row["answer"] if is_choice else _listed(row["answer"])
        if not answer or (is_choice and answer not in options):
            raise MmalignError(f"{path}, {row['id']}: expected an answer among {', '.join(options) or 'words'}; got {row['answer']!r}.")
        text = question(str(row["question"]), texts) if is_choice else f"{row['question']}\n{NAME}"
        meta = {"images": self._images(row, text), "answer": answer, **({"options": options} if is_choice else {})}
        return Prompt(str(row["id"]), text, (subject, "choice" if is_choice else "open"), meta)

    def _images(self, row: Mapping[str, Any], text: str) -> list[str]:
        named = sorted({int(number) for number in re.findall(r"<image (\d)>", text)}) or [1]
        if self.pictures == "first":
            named = [1]
        cells = [row[f"image_{number}"] for number in named]
        paths = [unpacked(cell["bytes"], "mmmu") for cell in cells if isinstance(cell, Mapping)]
        return [joined(paths, "mmmu")] if self.pictures == "joined" and len(paths) > 1 else paths


def question(text: str, options: Sequence[str]) -> str:
    """What the model is asked: the question, its options in brackets, the request for a letter."""
    listed = "".join(f"({chr(ord('A') + number)}) {option}\n" for number, option in enumerate(options))
    return f"{text}\n{listed}\n{CHOOSE}"


def _listed(cell: Any) -> list[str]:
    """A list that the table holds as text, or one text."""
    if not isinstance(cell, str):
        return [str(one) for one in cell]
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell] if cell else []
    try:
        return [str(one) for one in ast.literal_eval(cell)]
    except (ValueError, SyntaxError):  # a single answer in square brackets, such as a formula
        return [cell]
