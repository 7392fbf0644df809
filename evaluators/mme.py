"""MME: two yes-or-no questions on each picture, in ten subtasks of perception and four of cognition; at most 2,000 and 800 points.

Paper: Fu et al., arXiv 2306.13394; BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation at dd29509 (eval_tool). A subtask's
points are 100 times the accuracy of its questions plus 100 times the share of its pictures with both answers right. Answers are read by the
tool's own rule (yes or no in the first four characters, anything else is wrong).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from mmalign.evaluators._pictures import folder

from mmalign.types import MmalignError, Prompt, Row, UsageError

NEEDS = ("folder: mme-images",)
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
INSIDE = "eval_tool/Your_Results"


@dataclass(frozen=True)
class Evaluator:
    """`images`: the folder of MME's pictures (<subtask>/<file> or <subtask>/images/<file>); `questions`: a folder of its 14 .txt files in
    place of the official archive; `suffix`: after each question.
    """

    images: str = ""
    questions: str = ""
    suffix: str = ""
    scorers: ClassVar[tuple[str, ...]] = ("yes_no",)
    scorer_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"yes_no": {"rule": "mme"}}
    task: ClassVar[str] = "answer"

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The questions, subtask by subtask, in the files' order; the id is the subtask and the line's number from 1."""
        if split != "test":
            raise UsageError(f"Suite 'mme' has one split, test; got '{split}'.")
        place = folder(self.images, "mme", "MME's pictures, one folder a subtask")
        texts = _texts(self.questions)
        return [
            self._prompt(task, number, line, place)
            for task in (*PERCEPTION, *COGNITION)
            for number, line in enumerate(texts[task].splitlines(), start=1)
            if line.strip()
        ]

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """perception and cognition: sums of their subtasks' points, None while one is empty; total; subtasks; unparsed (share)."""
        points = {task: _points([row for row in rows if row.tag == task]) for task in (*PERCEPTION, *COGNITION)}
        perception, cognition = _sum(points, PERCEPTION), _sum(points, COGNITION)
        return {
            "total": None if perception is None or cognition is None else perception + cognition,
            "perception": perception,
            "cognition": cognition,
            **{task: points[task] for task in (*PERCEPTION, *COGNITION)},
            "unparsed": fmean(row.value("yes_no").parts["unparsed"] for row in rows) if rows else None,
        }

    def _prompt(self, task: str, number: int, line: str, place: Path) -> Prompt:
        parts = line.split("\t")
        if len(parts) < 3 or parts[2].strip() not in ("Yes", "No"):
            raise MmalignError(f"MME, {task}, line {number}: expected picture, question and Yes or No, by tabs; got {line[:200]!r}.")
        image, question, label = parts[0], parts[1], parts[2].strip()
        places = [place / task / image, place / task / "images" / image, place / image]
        found = next((path for path in places if path.is_file()), places[0])
        meta = {"images": [str(found)], "label": label.lower(), "picture": f"{task}/{image}"}
        return Prompt(f"{task}-{number}", question + self.suffix, (task,), meta)


def _points(rows: Sequence[Row]) -> float | None:
    """100 accuracy + 100 accuracy over pictures whose questions are all there; None where no picture is whole."""
    by_picture: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        prompt = row.request.prompt
        by_picture.setdefault(prompt.meta["picture"], {}).setdefault(prompt.text, []).append(row.value("yes_no").x)
    pairs = [[x for answers in own.values() for x in answers] for own in by_picture.values() if len(own) > 1]
    if not pairs:
        return None
    accuracy = fmean(row.value("yes_no").x for row in rows)
    return 100 * accuracy + 100 * fmean(float(all(x == 1.0 for x in answers)) for answers in pairs)


def _sum(points: Mapping[str, float | None], tasks: Sequence[str]) -> float | None:
    known = [value for task in tasks if (value := points[task]) is not None]
    return sum(known) if len(known) == len(tasks) else None


def _texts(questions: str) -> dict[str, str]:
    tasks = (*PERCEPTION, *COGNITION)
    if questions:
        files = {task: Path(questions).expanduser() / f"{task}.txt" for task in tasks}
        if absent := [path for path in files.values() if not path.is_file()]:
            raise UsageError(f"--set mme.questions={questions}: there is no {absent[0]}. Name a folder of MME's 14 .txt files.")
        return {task: path.read_text(encoding="utf-8") for task, path in files.items()}
    from mmalign.data import data_path

    with zipfile.ZipFile(data_path("mme")) as archive:
        return {task: archive.read(f"{INSIDE}/{task}.txt").decode() for task in tasks}
