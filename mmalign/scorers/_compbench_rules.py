"""T2I-CompBench's rules on found boxes: where two things stand, which is nearer, how many there are. Standard library only.

Karine-Huang/T2I-CompBench UniDet_eval/ at 1b70949. Boxes are corners (x0, y0, x1, y1) in the official detector's frame of about 480 pixels;
depth is inverse (greater is nearer), 0 to 255, in the same frame.

    defect (compat="upstream" keeps it)                            repaired (compat="fixed")
    "on top of", without "the", has no branch: 0                   it means what "on the top of" means
    the depth map is read with its axes exchanged                  rows are y, columns are x
    an overlap of exactly 0.5 scores 0 in 3D                       it scores 1, as all above it
    two boxes without area divide by zero                          they do not overlap
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Compat = Literal["fixed", "upstream"]
Box = tuple[float, float, float, float]
Depth = Callable[[slice, slice], float]  # mean inverse depth of rows, columns

NEAR, OVERLAP, OVERLAP_3D, FLOOR = 150.0, 0.1, 0.5, 0.5
SHORT_SIDE, LONG_SIDE = 479, 480
BESIDE = ("next to", "on side of", "near")
FRONT, BACK = ("in front of",), ("behind", "hidden")
SAME_BOX = 0.9


@dataclass(frozen=True)
class Thing:
    """The best detection of one noun."""

    box: Box
    score: float


def frame(height: int, width: int) -> tuple[int, int]:
    """Height and width of the detector's frame: short side 479 unless the long one would pass 480."""
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, without the pixel that closes a box; 0 for two boxes without area."""
    inner = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    return inner / union if union else 0.0


def position(relation: str, a: Box, b: Box, compat: Compat = "fixed", depth: Depth | None = None) -> float:
    """How well two boxes stand as the words say, 0 to 1; 0 for words that name no relation. 3D relations need `depth`."""
    if relation in FRONT + BACK:
        return _in_depth(relation, a, b, compat, depth)
    dx, dy = (b[0] + b[2]) / 2 - (a[0] + a[2]) / 2, (b[1] + b[3]) / 2 - (a[1] + a[3]) / 2
    if relation in BESIDE:
        return 1.0 if abs(dx) < NEAR or abs(dy) < NEAR else NEAR / max(abs(dx), abs(dy))
    if relation == "on top of" and compat == "fixed":
        relation = "on the top of"
    holds = {
        "on the right of": dx < 0 and abs(dx) > abs(dy),
        "on the left of": dx > 0 and abs(dx) > abs(dy),
        "on the bottom of": dy < 0 and abs(dy) > abs(dx),
        "on the top of": dy > 0 and abs(dy) > abs(dx),
    }
    if not holds.get(relation, False):
        return 0.0
    shared = overlap(a, b)
    return 1.0 if shared < OVERLAP else OVERLAP / shared


def pair_score(relation: str, first: Thing | None, second: Thing | None, compat: Compat, depth: Depth | None = None) -> float:
    """A quarter of each confidence and half the position; in 2D anything under one half is 0, so one thing alone never scores."""
    score = 0.25 * sum(thing.score for thing in (first, second) if thing is not None)
    if first is not None and second is not None:
        score += position(relation, first.box, second.box, compat, depth) / 2
    return 0.0 if score < FLOOR and relation not in FRONT + BACK else score


def is_same(a: Box, b: Box) -> bool:
    """Whether two boxes of one label are one thing: they overlap by more than 0.9, or one holds 0.9 of the other (areas by pixels)."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    inner = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return inner / (sum(areas) - inner) > SAME_BOX or any(inner / area > SAME_BOX for area in areas)


def distinct(boxes: Sequence[Box]) -> list[Box]:
    """The boxes without those that are the same thing as an earlier one."""
    kept: list[Box] = []
    for box in boxes:
        if not any(is_same(box, other) for other in kept):
            kept.append(box)
    return kept


def count_score(wanted: Sequence[tuple[str, int]], found: Sequence[int]) -> float:
    """Half a point for each kind that is there, half for its exact number, over the kinds. At least one kind is wanted."""
    points = [0.5 * (count > 0) + 0.5 * (count > 0 and count == number) for (_, number), count in zip(wanted, found, strict=True)]
    return sum(points) / len(points)


def _in_depth(relation: str, a: Box, b: Box, compat: Compat, depth: Depth | None) -> float:
    shared = overlap(a, b)
    if shared == 0 or (shared == OVERLAP_3D and compat == "upstream"):
        return 0.0
    assert depth is not None, "a 3D relation needs a depth map"
    difference = _nearness(depth, a, compat) - _nearness(depth, b, compat)
    if not (difference > 0 if relation in FRONT else difference < 0):  # a box without pixels has no mean: NaN is no difference
        return 0.0
    return 1.0 if shared >= OVERLAP_3D else shared / OVERLAP_3D


def _nearness(depth: Depth, box: Box, compat: Compat) -> float:
    columns, rows = slice(int(box[0]), int(box[2])), slice(int(box[1]), int(box[3]))
    return depth(rows, columns) if compat == "fixed" else depth(columns, rows)
