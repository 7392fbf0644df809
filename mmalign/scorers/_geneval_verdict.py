"""GenEval's verdict on a set of detections: pure functions on boxes and metadata, no network.

Paper: Ghosh et al., GenEval, arXiv 2310.11513. Rules: djghosh13/geneval at af4902f (the official verdict) and yifan123/reward-server at
92ac29f (the strict and soft forms that Flow-GRPO trains on). A box is [left, top, right, bottom] in pixels of the image; x grows to the
right, y grows downwards. Where the official code leaves ties among equal scores to an unstable sort, ours puts the later one first,
which is what its sort gives for up to 16 candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")  # the order decides ties
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

Compat = Literal["upstream", "fixed"]


@dataclass(frozen=True)
class Detection:
    """One detected object: float32 box [4], score in [0, 1], boolean mask [H, W] (None where only boxes are known)."""

    box: Any
    score: float
    mask: Any | None = None


@dataclass(frozen=True)
class Verdict:
    """`correct`: every requirement met (exactly as the rule in use says). `soft`: mean credit of the clauses. `reason`: what failed."""

    correct: bool
    soft: float
    reason: str


Detections = Mapping[str, Sequence[Detection]]  # class name -> objects, best first
ColoursOf = Callable[[str, Sequence[Detection]], Sequence[str]]  # class name, objects -> one colour name each


def keep(scores: Sequence[float] | np.ndarray, threshold: float, limit: int = 16) -> list[int]:
    """Indices of the scores [N] above the threshold (strictly, in float32), best first, at most `limit`."""
    import numpy as np

    scores_N = np.asarray(scores, np.float32)
    order = np.argsort(scores_N, kind="stable")[::-1]
    return [int(index) for index in order if scores_N[index] > np.float32(threshold)][:limit]


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union with corners counted as pixels (+1), as the official code has it. Official GenEval does not filter by it."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    (a0, a1, a2, a3), (b0, b1, b2, b3) = first, second
    shared = area(max(a0, b0), max(a1, b1), min(a2, b2), min(a3, b3))
    union = area(a0, a1, a2, a3) + area(b0, b1, b2, b3) - shared
    return shared / union if union else 0.0


def relations(box: Any, target: Any, slack: float = 0.1) -> frozenset[str]:
    """How `box` lies to `target`: none, one or two of RELATIONS.

    The offset of the centres shrinks, per axis, by `slack` times the sum of both extents; what is left is divided by the length of the
    whole offset, and an axis counts beyond one half. Computed in the boxes' own precision, as the thresholds are knife-edges.
    """
    import numpy as np

    corners = np.stack([np.asarray(box)[:4], np.asarray(target)[:4]]).reshape(2, 2, 2)  # object, corner, axis
    centres, extents = corners.mean(axis=1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centres[0] - centres[1]
    left_over = np.sign(offset) * np.maximum(np.abs(offset) - slack * (extents[0] + extents[1]), 0)
    if (np.abs(left_over) < 1e-3).all():
        return frozenset()
    across, down = left_over / np.linalg.norm(offset)
    holds = (across < -0.5, across > 0.5, down < -0.5, down > 0.5)
    return frozenset(name for name, hold in zip(RELATIONS, holds, strict=True) if hold)


def verdict(detections: Detections, metadata: Mapping[str, Any], colours_of: ColoursOf, slack: float = 0.1) -> tuple[bool, str]:
    """The official verdict and its reasons, one per line: at least `count` of each class, judged on the `count` most certain alone.

    Colour is asked only where the count holds, position only where count and colour hold, against an earlier clause's objects.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        found = detections.get(name, ())[:count]
        reason = ""
        if len(found) < count:
            reason = f"expected {name}>={count}, found {len(found)}"
        elif "color" in clause:
            reason = _wrong_colours(clause, colours_of(name, found), exactly=False)
        if not reason and "position" in clause:
            reason = _wrong_position(clause, found, groups, slack)
        groups.append(None if reason else found)
        reasons += [reason] if reason else []
    for clause in metadata.get("exclude", ()):
        name, count = clause["class"], clause["count"]
        if len(detections.get(name, ())) >= count:
            reasons.append(f"expected {name}<{count}, found {len(detections[name])}")
    return not reasons, "\n".join(reasons)


def soft_verdict(
    detections: Detections,
    metadata: Mapping[str, Any],
    colours_of: ColoursOf,
    slack: float = 0.1,
    compat: Compat = "upstream",
    clamp: bool = False,
) -> Verdict:
    """Flow-GRPO's training forms: strict (exactly `count` of each class and colour; `exclude` is not read) and a mean of credits.

    A clause earns 1 - |count - found| / count, the same for its colour, and 1 or 0 for its position; a colour or position that cannot be
    asked because the count is wrong earns 0. Upstream has two quirks: the count term has no lower bound (1 wanted, 5 found: -3), and a
    failed position against a present target earns 0 and then 1 as well. `clamp` bounds each term at 0; compat="fixed" drops the extra 1.
    """
    reasons: list[str] = []
    credits: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        found = detections.get(name, ())
        credits.append(1 - abs(count - len(found)) / count)
        reason = ""
        if len(found) != count:
            reason = f"expected {name}=={count}, found {len(found)}"
            credits += [0.0] if "color" in clause or "position" in clause else []
        elif "color" in clause:
            colours = colours_of(name, found)
            credits.append(1 - abs(count - list(colours).count(clause["color"])) / count)
            reason = _wrong_colours(clause, colours, exactly=True)
        if not reason and "position" in clause:
            reason = _wrong_position(clause, found, groups, slack)
            has_target = groups[clause["position"][1]] is not None
            credits += [0.0] if reason else []
            credits += [1.0] if has_target and (not reason or compat == "upstream") else []
        groups.append(None if reason else found)
        reasons += [reason] if reason else []
    bounded = [max(credit, 0.0) for credit in credits] if clamp else credits
    return Verdict(not reasons, sum(bounded) / len(bounded) if bounded else 0.0, "\n".join(reasons))


def check_metadata(metadata: Mapping[str, Any], classes: Sequence[str]) -> str:
    """What is wrong with a prompt's metadata, or "": a class the detector cannot know would otherwise count as never drawn."""
    include = metadata.get("include")
    if not isinstance(include, Sequence) or not include or not metadata.get("tag"):
        return "GenEval metadata needs a 'tag' and a non-empty 'include' list"
    for number, clause in enumerate([*include, *metadata.get("exclude", ())]):
        if clause.get("class") not in classes:
            return f"the class {clause.get('class')!r} is not one of the {len(classes)} that the detector knows"
        if not isinstance(clause.get("count"), int) or clause["count"] < 1:
            return f"the count of {clause['class']!r} is {clause.get('count')!r}; expected a whole number of at least 1"
        if clause.get("color", COLOURS[0]) not in COLOURS:
            return f"the colour {clause['color']!r} is none of {', '.join(COLOURS)}"
        if "position" in clause:
            relation, target = clause["position"]
            if relation not in RELATIONS or not 0 <= target < number:
                return f"the position {clause['position']!r} needs one of {', '.join(RELATIONS)} and the index of an earlier clause"
    return ""


def _wrong_colours(clause: Mapping[str, Any], colours: Sequence[str], exactly: bool) -> str:
    right, count, colour = list(colours).count(clause["color"]), clause["count"], clause["color"]
    if right == count or (right > count and not exactly):
        return ""
    seen = ", ".join(f"{list(colours).count(name)} {name}" for name in COLOURS if name in colours)
    return f"expected {colour} {clause['class']}>={count}, found {right} {colour}; and {seen}"


def _wrong_position(
    clause: Mapping[str, Any], found: Sequence[Detection], groups: Sequence[Sequence[Detection] | None], slack: float
) -> str:
    relation, index = clause["position"]
    targets = groups[index]
    if targets is None:
        return f"no target for {clause['class']} to be {relation}"
    for thing in found:
        for target in targets:
            holds = relations(thing.box, target.box, slack)
            if relation not in holds:
                return f"expected {clause['class']} {relation} target, found {' and '.join(sorted(holds))} target"
    return ""
