"""A gallery's content: one item per request, pairs of two models, and the thumbnails on disk.

An item is plain JSON, so that the page's script can page, filter and sort it: {id, prompt, tags, seed, cells}. A cell is what one
model made: {sha, answer, tiny, size, seconds, scores: {scorer: {value, parts, detail}}, failures: [{scorer, stage, kind, message}]}.
A gallery has one cell per item, a comparison has two.
"""

from __future__ import annotations

import json
import math
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmalign.store import image_path
from mmalign.types import Failure, MmalignError, Row, Value, digest

THUMBNAIL = 256  # the longer side in pixels
CUT = " Unsafe prompts and answers are cut short; mmalign report --show-unsafe prints them."
KEPT = 12  # characters, at most, that are shown of an unsafe text
TINY = 128  # images below this are shown enlarged with hard pixel edges

Item = dict[str, Any]


def item_of(row: Row) -> Item:
    """One row as the page's script reads it. A failed generation is one hole, not one per scorer."""
    prompt = row.request.prompt
    cell: dict[str, Any] = {"sha": "", "scores": {}, "failures": []}
    if isinstance(row.sample, Failure):
        cell["failures"].append(_hole("", row.sample))
    else:
        cell["sha"] = _checked_sha(row.sample.image_sha)
        if row.sample.answer:
            cell["answer"] = row.sample.answer
        if row.sample.seconds:
            cell["seconds"] = round(row.sample.seconds, 3)
        cell["failures"].extend(_hole(name, score) for name, score in row.scores.items() if isinstance(score, Failure))
    for name, score in row.scores.items():
        if isinstance(score, Value):
            parts = {"parts": dict(score.parts)} if score.parts else {}
            detail = {"detail": score.detail} if score.detail else {}
            cell["scores"][name] = {"value": score.x, **parts, **detail}
    # The seed is text: 63 bits are more than a JavaScript number holds.
    return {"id": row.request.id, "prompt": prompt.text, "tags": list(prompt.tags), "seed": str(row.request.seed), "cells": [cell]}


def pair(first: Sequence[Item], second: Sequence[Item]) -> list[Item]:
    """Items that both models were asked with one prompt and one seed, each with two cells, in the first's order."""
    others = {item["id"]: item for item in second}
    pairs = []
    for item in first:
        other = others.get(item["id"])
        if other and (other["prompt"], other["seed"]) == (item["prompt"], item["seed"]):
            pairs.append({**item, "cells": [*item["cells"], *other["cells"]]})
    return pairs


def hide_words(item: Item) -> Item:
    """The item of an unsafe suite with its prompt and answers cut short, also where a message quotes them; equal texts stay equal."""
    texts = [item["prompt"], *(cell["answer"] for cell in item["cells"] if "answer" in cell)]

    def hidden(content: Any) -> Any:
        if isinstance(content, Mapping):
            return {name: hidden(value) for name, value in content.items()}
        if isinstance(content, list):
            return [hidden(value) for value in content]
        if isinstance(content, str):
            for text in texts:
                content = content.replace(text, cut_short(text)) if len(text) > KEPT else cut_short(content) if content == text else content
        return content

    return {**item, "prompt": hidden(item["prompt"]), "cells": hidden(item["cells"])}


def cut_short(text: str) -> str:
    """The beginning of an unsafe text, at most a third of it, with what tells it from others."""
    return f"{text[: min(KEPT, len(text) // 3)]}… [{len(text.split())} words, {digest(text)[:6]}]"


def mark_disagreement(items: Sequence[Item], scorers: Sequence[str]) -> None:
    """Give each item with values of two scorers or more its `spread`: the largest difference of its rank shares, in [0, 1].

    Ranks, since scorers have different units; equal values share their middle rank.
    """
    shares: dict[str, list[float]] = {}
    for scorer in scorers:
        values = sorted(item["cells"][0]["scores"][scorer]["value"] for item in items if scorer in item["cells"][0]["scores"])
        for item in items:
            score = item["cells"][0]["scores"].get(scorer)
            if score:
                middle = (bisect_left(values, score["value"]) + bisect_right(values, score["value"])) / 2
                shares.setdefault(item["id"], []).append(middle / len(values))
    for item in items:
        of_item = shares.get(item["id"], [])
        if len(of_item) > 1:
            item["spread"] = round(max(of_item) - min(of_item), 6)


def write_thumbnails(items: Iterable[Item], run: Path, folder: Path) -> None:
    """The thumbnails of a run directory's items."""
    write_thumbnails_of(items, lambda sha: image_path(run, sha), folder)


def write_thumbnails_of(items: Iterable[Item], source: Callable[[str], Path], folder: Path) -> None:
    """Write <aa>/<sha>.webp for every image of the items, found at `source(sha)`, and note what the page needs in the cells.

    Existing thumbnails are kept: their name is the content. A cell whose file is absent
    or unreadable gets `lost`, a sentence that the page shows in the image's place; the report is then still written.
    """
    cells = [cell for item in items for cell in item["cells"] if cell["sha"]]
    shas = sorted({cell["sha"] for cell in cells})

    def thumbnail(sha: str) -> tuple[int, int] | str:
        return _thumbnail(source(sha), folder / sha[:2] / f"{sha}.webp")

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        sizes = dict(zip(shas, pool.map(thumbnail, shas), strict=True))
    for cell in cells:
        size = sizes[cell["sha"]]
        if isinstance(size, str):
            cell["lost"] = size
            continue
        cell["size"] = f"{size[0]} × {size[1]}"
        if max(size) < TINY:
            cell["tiny"] = True


def embed_json(content: object) -> str:
    """JSON that is safe inside a <script> element: no '<', '>' or '&' survives; numbers that JSON lacks become null."""
    text = json.dumps(_finite(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hole(scorer: str, failure: Failure) -> dict[str, str]:
    return {"scorer": scorer, "stage": failure.stage, "kind": failure.kind, "message": failure.message}


def _checked_sha(sha: str | None) -> str:
    """Content addresses become paths, so nothing but hexadecimal digits passes."""
    if sha and not re.fullmatch(r"[0-9a-f]{16,128}", sha):
        raise MmalignError(f"The rows hold {sha!r} where the sha256 of an image is expected; the rows file was not written by mmalign.")
    return sha or ""


def _thumbnail(source: Path, target: Path) -> tuple[int, int] | str:
    """(width, height) of the source after writing its thumbnail, or a sentence why there is none."""
    from PIL import Image, ImageOps

    try:
        with Image.open(source) as opened:
            image = ImageOps.exif_transpose(opened)
            size: tuple[int, int] = image.size
            if target.is_file() and target.stat().st_size:
                return size
            picture = image.convert("RGB")
    except FileNotFoundError:
        return "The image is no longer there."
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # what PIL raises on damaged files
        return f"The image cannot be read: {error}".replace(str(source.parent) + os.sep, "")
    is_small = max(size) <= THUMBNAIL
    if not is_small:
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    # Renamed but not synced: thumbnails can be made again, and two waits for the disk each would cost more than all else here.
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    picture.save(temporary, "WEBP", lossless=is_small, quality=82, method=4)
    os.replace(temporary, target)
    return size


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content
