"""What GenEval and its long-prompt variant share: reading metadata files, the means of six tasks, and the alarm for a blind detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mmalign.types import MmalignError, Prompt, Row, UsageError

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
BROKEN_BELOW, BROKEN_FROM = 0.05, 20  # single_object accuracy under this, on at least so many images, is no model's doing


def read(source: str, suite: str, split: str) -> list[Prompt]:
    """The prompts of a declared source or of a .jsonl file, in its order; the id is the index in five digits, meta the whole metadata."""
    from mmalign.data import data_path, load_json_lines

    if split != "test":
        raise UsageError(f"Suite '{suite}' has one split, test; got '{split}'.")
    path = Path(source).expanduser() if source.endswith(".jsonl") else data_path(source)
    if not path.is_file():
        raise UsageError(f"There is no prompt file {path}. Expected GenEval metadata, one JSON object per line.")
    return [_prompt(index, row, path) for index, row in enumerate(load_json_lines(path))]


def means(rows: Sequence[Row]) -> dict[str, float | None]:
    """overall: mean of the accuracies of the tasks present, each over its images; images: over all images; prompts: share of prompts
    with at least one correct image; strict, soft: Flow-GRPO's training forms over all images. None where there is no image.
    """
    by_task: dict[str, list[float]] = {task: [] for task in TASKS}
    by_prompt: dict[str, float] = {}
    images, strict, soft = [], [], []
    for row in rows:
        parts = row.value("geneval").parts
        by_task[row.tag].append(parts["correct"])
        by_prompt[row.request.prompt.id] = max(by_prompt.get(row.request.prompt.id, 0.0), parts["correct"])
        images.append(parts["correct"])
        strict.append(parts["strict"])
        soft.append(parts["soft"])
    means = {task: _mean(values) for task, values in by_task.items()}
    return {
        "overall": _mean([mean for mean in means.values() if mean is not None]),
        **means,
        "images": _mean(images),
        "prompts": _mean(list(by_prompt.values())),
        "strict": _mean(strict),
        "soft": _mean(soft),
    }


def alarms(rows: Sequence[Row]) -> tuple[str, ...]:
    """What makes the numbers suspect, as sentences: a detector that finds nothing."""
    single = [row.value("geneval").parts["correct"] for row in rows if row.tag == "single_object"]
    if len(single) < BROKEN_FROM or fmean(single) >= BROKEN_BELOW:
        return ()
    return (
        f"single_object is {fmean(single):.3f} over {len(single)} images: this is what a broken detector looks like (wrong or "
        "incomplete weights, half precision on some GPUs). "
        "Score real photographs with the same detector before believing these numbers.",
    )


def _prompt(index: int, row: dict[str, Any], path: Path) -> Prompt:
    if not isinstance(row.get("prompt"), str) or not isinstance(row.get("tag"), str) or not row.get("include"):
        got = ", ".join(row) or "nothing"
        raise MmalignError(f"{path}, line {index + 1}: GenEval metadata needs 'tag', 'prompt' and 'include'; got {got}.")
    if row["tag"] not in TASKS:
        raise MmalignError(f"{path}, line {index + 1}: the tag '{row['tag']}' is none of {', '.join(TASKS)}.")
    return Prompt(f"{index:05d}", row["prompt"], (row["tag"],), row)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
