"""What DPG-Bench and its judged variant share: prompts with their question graphs, and the means of images and categories."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from mmalign.types import MmalignError, Prompt, Row

Compat = Literal["fixed", "upstream"]
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
BROAD = ("global", "entity", "attribute", "relation", "other")


def read(prompts: Path, questions: Path, compat: Compat) -> list[Prompt]:
    """The prompts by id with meta["questions"] = [{"number", "text", "parents", "category"}, ...] in the file's order.

    "upstream" drops the file's first question, as the official script does, and with it an item of which another question depends on it.
    """
    from mmalign.data import load_json_lines

    graphs: dict[str, list[dict[str, Any]]] = {}
    with questions.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or set(COLUMNS) - set(rows[0]):
        raise MmalignError(f"{questions}: expected the columns {', '.join(COLUMNS)}; got {', '.join(rows[0]) if rows else 'no rows'}.")
    for number, row in enumerate(rows):
        if number or compat == "fixed":
            graphs.setdefault(row["item_id"].strip(), []).append(_question(row, f"{questions}, row {number + 2}"))
    made = []
    for item in load_json_lines(prompts):
        graph = graphs.get(str(item["item_id"]), [])
        known = {one["number"] for one in graph}
        if any(parent not in known for one in graph for parent in one["parents"]) or not graph:
            if compat == "upstream":
                continue
            raise MmalignError(f"{questions}: the item {item['item_id']} has no questions, or one that depends on none that is asked.")
        made.append(Prompt(str(item["item_id"]), item["prompt"].strip(), (graph[0]["category"].split(" - ")[0],), {"questions": graph}))
    return made


def means(rows: Sequence[Row], scorer: str, compat: Compat) -> dict[str, float | None]:
    """All in 0 to 100. overall: mean over prompts of the mean over their images; categories: mean over questions, answers as given.

    "upstream" takes the answers of a prompt's last image alone for the categories.
    """
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row.request.prompt.id, []).append(row)
    overall = [fmean(row.value(scorer).x for row in own) for own in by_prompt.values()]
    narrow: dict[str, list[float]] = {}
    for own in by_prompt.values():
        last = max(row.request.index for row in own)
        used = own if compat == "fixed" else [row for row in own if row.request.index == last]
        for question in own[0].request.prompt.meta["questions"]:
            answers = [row.value(scorer).parts[f"q{question['number']}"] for row in used]
            narrow.setdefault(question["category"], []).append(fmean(answers))
    broad: dict[str, list[float]] = {name: [] for name in BROAD}
    for category, values in narrow.items():
        broad.setdefault(category.split(" - ")[0], []).extend(values)
    found = {"overall": overall, **broad, **{name: narrow[name] for name in sorted(narrow) if name not in broad}}
    return {name.replace(" ", ""): 100 * fmean(values) if values else None for name, values in found.items()}


def _question(row: Mapping[str, str], where: str) -> dict[str, Any]:
    try:
        parents = [int(part) for part in row["dependency"].split(",")]
        number = int(row["proposition_id"])
    except (ValueError, AttributeError) as error:
        raise MmalignError(f"{where}: expected whole numbers in proposition_id and dependency ({error}).") from error
    category = " - ".join(part.strip() for part in row["tuple"].split("(")[0].split(" - ")).removesuffix(" -").strip(" -")
    text = row["question_natural_language"].strip()
    return {"number": number, "text": text, "parents": [parent for parent in parents if parent != 0], "category": category}
