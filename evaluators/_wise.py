"""What both WISE protocols share: reading their files, and means of six groups under the weights of one protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mmalign.types import MmalignError, Prompt, Row

KEYS = ("Prompt", "Explanation", "Category", "Subcategory", "prompt_id")


@dataclass(frozen=True)
class Group:
    """A group's prompt ids, the last included, and its weight in the overall score."""

    first: int
    last: int
    weight: float


def read(paths: Sequence[Path], groups: Mapping[str, Group], rewritten: Sequence[Path] = ()) -> list[Prompt]:
    """The prompts in the order of their ids, tagged by group and subject; with rewritten files, the model is given their text.

    The judge sees meta["prompt"] (the original) and meta["explanation"].
    """
    texts = {number: row["Prompt"] for number, row in _rows(rewritten).items()} if rewritten else {}
    rows = _rows(paths)
    if rewritten and set(texts) != set(rows):
        raise MmalignError(f"The rewritten prompts {[str(path) for path in rewritten]} are not those of {[str(path) for path in paths]}.")
    return [_prompt(number, row, texts.get(number, row["Prompt"]), groups) for number, row in sorted(rows.items())]


def means(rows: Sequence[Row], groups: Mapping[str, Group], scorer: str) -> dict[str, float | None]:
    """overall: the weighted sum of the groups' means, None while a group is empty; unweighted: their plain mean; the groups."""
    by_group: dict[str, list[float]] = {name: [] for name in groups}
    for row in rows:
        by_group[row.tag].append(row.value(scorer).x)
    found = {name: fmean(values) if values else None for name, values in by_group.items()}
    known = {name: mean for name, mean in found.items() if mean is not None}
    is_whole = len(known) == len(groups)
    overall = sum(groups[name].weight * mean for name, mean in known.items()) if is_whole else None
    return {"overall": overall, "unweighted": fmean(known.values()) if is_whole else None, **found}


def _rows(paths: Sequence[Path]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for path in paths:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise MmalignError(f"{path} is not JSON ({error}). Expected a list of WISE prompts.") from error
        for row in rows:
            if not isinstance(row, dict) or set(KEYS) - set(row) or type(row["prompt_id"]) is not int:
                raise MmalignError(f"{path}: a WISE prompt needs {', '.join(KEYS)}, the last a whole number; got {str(row)[:200]}.")
            if row["prompt_id"] in found:
                raise MmalignError(f"{path}: the prompt_id {row['prompt_id']} comes twice.")
            found[row["prompt_id"]] = row
    return found


def _prompt(number: int, row: Mapping[str, Any], text: str, groups: Mapping[str, Group]) -> Prompt:
    group = next((name for name, group in groups.items() if group.first <= number <= group.last), None)
    if group is None:
        raise MmalignError(f"The prompt_id {number} belongs to no group of WISE (1 to {max(group.last for group in groups.values())}).")
    return Prompt(str(number), text, (group, row["Subcategory"]), {"prompt": row["Prompt"], "explanation": row["Explanation"]})
