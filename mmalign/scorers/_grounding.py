"""The rules of T2I-R1's detector reward on found boxes: which objects, how many, and where; official defects and their repair.

CaraJ7/T2I-R1 src/t2i-r1/src/utils/reward_gdino.py at 2d9d4d1; its relations come from T2I-CompBench. Standard library only.

    defect (compat="upstream" keeps it)                              repaired (compat="fixed")
    "above" and "on top of" have no branch: their relation is 0      they mean what "on the top of" means
    a distance of 150 pixels is compared with boxes in 0..1, so      150 of the 512 pixels that T2I-CompBench's images had
      "next to", "near", "on side of" always hold
    duplicates are suppressed on (centre, size) boxes as if they     on corner boxes
      were corners, which suppresses next to nothing
    two objects and their relation make 0.2 + 0.2 + 0.5 = 0.9        0.2 + 0.2 + 0.6 = 1
    a noun of three words or more is never recognised as found,      nouns are told apart by their place in the caption
      because only its first and last word name it
    anything that goes wrong in a spatial prompt is a 0              a typed failure
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Compat = Literal["fixed", "upstream"]
Box = tuple[float, float, float, float]

DISTANCE = {"upstream": 150.0, "fixed": 150 / 512}
RELATION_WEIGHT = {"upstream": 0.5, "fixed": 0.6}
MAX_OVERLAP = 0.1
NMS_OVERLAP = 0.5

BESIDE = ("next to", "on side of", "near")
RIGHT, LEFT = ("on the right of", "right of"), ("on the left of", "left of")
BELOW = ("on the bottom of", "below")
ABOVE = {"upstream": ("on the top of", "top of"), "fixed": ("on the top of", "top of", "on top of", "above")}


@dataclass(frozen=True)
class Found:
    """What the detector found of one noun: boxes (centre x, centre y, width, height in 0..1) and their phrase scores."""

    boxes: Sequence[Box]
    scores: Sequence[float]


def best_first(found: Found) -> Found:
    """The same detections, the surest first."""
    order = sorted(range(len(found.scores)), key=lambda at: -found.scores[at])
    return Found([found.boxes[at] for at in order], [found.scores[at] for at in order])


class NotAsked(ValueError):
    """The prompt's metadata ask of an object that is none of its nouns."""


def judge(
    found: Mapping[str, Found], meta: Mapping[str, Any], nouns: Sequence[str], compat: Compat, nms: Callable[..., Sequence[int]]
) -> tuple[float, dict[str, float]]:
    """The reward and its parts for a prompt's task; `nms(corners, scores, overlap)` gives the kept positions."""
    task = meta.get("task_type")
    if task == "spatial":
        return _spatial(found, meta["spatial_info"], compat)
    if task == "numeracy":
        return _numeracy(found, meta["numeracy_info"], compat, nms)
    parts = {noun: float(bool(found[noun].boxes)) for noun in nouns}
    return sum(bool(found[noun].boxes) for noun in nouns) / len(nouns), parts


def _of(found: Mapping[str, Found], noun: str, compat: Compat) -> Found:
    if noun not in found:
        if compat == "fixed":
            raise NotAsked(noun)
        return Found((), ())
    return found[noun]


def _spatial(found: Mapping[str, Found], info: Mapping[str, Any], compat: Compat) -> tuple[float, dict[str, float]]:
    first, second = _of(found, info["obj1"], compat), _of(found, info["obj2"], compat)
    parts = {"object 1": float(bool(first.boxes)), "object 2": float(bool(second.boxes)), "relation": 0.0}
    if first.boxes and second.boxes:
        parts["relation"] = relation(info["locality"], _best(first), _best(second), compat)
    return 0.2 * (parts["object 1"] + parts["object 2"]) + RELATION_WEIGHT[compat] * parts["relation"], parts


def _best(found: Found) -> Box:
    return corners(found.boxes[max(range(len(found.scores)), key=found.scores.__getitem__)])


def _numeracy(
    found: Mapping[str, Found], infos: Sequence[Mapping[str, Any]], compat: Compat, nms: Callable[..., Sequence[int]]
) -> tuple[float, dict[str, float]]:
    parts, total = {}, 0.0
    for info in infos:
        item = _of(found, info["obj_name"], compat)
        boxes = [corners(box) for box in item.boxes] if compat == "fixed" else list(item.boxes)
        count = len(nms(boxes, item.scores, NMS_OVERLAP)) if boxes else 0
        parts[f"{info['obj_name']} found"] = float(count)
        total += 0.0 if count == 0 else 1.0 if count == int(info["num"]) else 0.2
    return total / len(infos), parts


def corners(box: Box) -> Box:
    x, y, width, height = box
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def relation(locality: str, a: Box, b: Box, compat: Compat) -> float:
    """How well the corner boxes stand as the words say (0 to 1): the axis must dominate, an overlap above 0.1 lowers the score."""
    dx, dy = ((b[0] + b[2]) - (a[0] + a[2])) / 2, ((b[1] + b[3]) - (a[1] + a[3])) / 2
    if locality in BESIDE:
        near = DISTANCE[compat]
        return 1.0 if abs(dx) < near or abs(dy) < near else near / max(abs(dx), abs(dy))
    holds = (
        (locality in RIGHT and dx < 0 and abs(dx) > abs(dy))
        or (locality in LEFT and dx > 0 and abs(dx) > abs(dy))
        or (locality in BELOW and dy < 0 and abs(dy) > abs(dx))
        or (locality in ABOVE[compat] and dy > 0 and abs(dy) > abs(dx))
    )
    if not holds:
        return 0.0
    overlap = iou(a, b)
    return 1.0 if overlap < MAX_OVERLAP else MAX_OVERLAP / overlap


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two corner boxes."""
    inner = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    return inner / union if union > 0 else 0.0


def known_localities(compat: Compat) -> frozenset[str]:
    return frozenset((*BESIDE, *RIGHT, *LEFT, *BELOW, *ABOVE[compat]))
