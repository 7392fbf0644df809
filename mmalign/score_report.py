"""The page of a scored folder: a table of its scorers and a gallery of its images, under their heat maps where there are any.

It opens from disk: thumbnails lie beside it, originals and maps are linked where they are. It is the gallery of a run's report, so it
pages, filters and sorts the same way; prompts are text and never markup (pages.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmalign import gallery, pages
from mmalign.scoring import Scored, Scores, cell
from mmalign.store import disk_errors, write_atomic
from mmalign.types import Row, Value
from mmalign.worker import Description

PAGE_SIZE = 200  # images shown at once


def write_score_report(scores: Scores, folder: Path, maps: Mapping[tuple[str, str], Path] | None = None, tool: str = "") -> Path:
    """Write index.html and its thumbnails into `folder`; `maps` {(image, scorer): file} are the heat maps that `tool` drew.

    MmalignError when the folder cannot be written. An image that cannot be read is shown as a hole that says why.
    """
    folder = folder.resolve()
    items = [_item(row, folder, maps or {}) for row in scores.rows]
    gallery.mark_disagreement(items, list(scores.scorers))
    paths = {str(row.sample.image_sha): row.path for row in scores.rows}
    with disk_errors(folder):
        gallery.write_thumbnails_of(items, paths.__getitem__, folder / "thumbnails")
        write_atomic(folder / "index.html", _page(scores, items, tool if maps else "").encode())
    return folder / "index.html"


def _item(row: Scored, folder: Path, maps: Mapping[tuple[str, str], Path]) -> gallery.Item:
    """One image as the page's script reads it (gallery.py), with links to its own file and its maps."""
    item = gallery.item_of(Row(row.sample.request, row.sample, row.scores))
    (shown,) = item["cells"]
    shown["source"] = _link(row.path, folder)
    drawn = {name: _link(maps[row.name, name], folder) for name in row.scores if (row.name, name) in maps}
    return {**item, "id": row.name, "seed": "", "cells": [{**shown, **({"maps": drawn} if drawn else {})}]}


def _link(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path.resolve(), folder)).as_posix())


def _page(scores: Scores, items: list[gallery.Item], tool: str) -> str:
    from markupsafe import Markup

    names, summary = list(scores.scorers), scores.summary()
    failed = sum(bool(item["cells"][0]["failures"]) for item in items)
    orders = [("suite", "in the folder's order"), ("worst", "lowest first"), ("best", "highest first")]
    if any("spread" in item for item in items):
        orders.append(("spread", "scorers disagree most"))
    values = sum(isinstance(score, Value) for row in scores.rows for score in row.scores.values())
    drawn = f" Heat maps by {tool}: red is what earned the score." if tool else ""
    data = {"items": items, "models": [""], "originals": [""], "scorers": names, "lower": [], "pageSize": PAGE_SIZE, "called": "file"}
    return pages.render(
        "scores.html.j2",
        script="gallery.js",
        title=f"Scores of {len(items):,} images",
        heading=f"Scores of {len(items):,} images",
        lead=f"{', '.join(names)}: {values:,} values, {scores.failures:,} failures.{drawn}",
        body_class="wide",
        is_partial=False,
        is_unsafe=False,
        columns=list(summary[0]),
        lines=[[cell(value) for value in line.values()] for line in summary],
        described=[(name, _facts(description)) for name, description in scores.scorers.items()],
        views=[("all", f"All {len(items):,}"), ("failed", f"Failed {failed:,}"), ("worst", "Lowest tenth")],
        orders=orders,
        tags=[],
        scorers=names,
        has_maps=bool(tool),
        data=Markup(gallery.embed_json(data)),
    )


def _facts(description: Description) -> list[tuple[str, str]]:
    """What a scorer says of itself, as (name, text) pairs; empty ones are left out."""
    facts: dict[str, Any] = {"fingerprint": description.fingerprint, **description.options, **description.facts, **description.environment}
    return [(name, str(value)) for name, value in facts.items() if value not in ("", None, [], {})]
