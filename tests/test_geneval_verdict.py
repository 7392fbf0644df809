"""GenEval's verdict: golden vectors, a second implementation on random scenes, and the official functions where a checkout is at hand."""

import ast
import os
from pathlib import Path

import numpy as np
import pytest

from mmalign.scorers._geneval_verdict import (
    COLOURS,
    RELATIONS,
    TAGS,
    Detection,
    check_metadata,
    keep,
    overlap,
    relations,
    soft_verdict,
    verdict,
)

A = (0, 0, 10, 10)
BIG = (0, 0, 100, 100)


@pytest.mark.parametrize(
    ("box", "target", "golden"),
    [
        (A, (100, 0, 110, 10), {"left of"}),
        (A, (100, 100, 110, 110), {"left of", "above"}),
        (BIG, (15, 0, 115, 100), set()),
        (BIG, (25, 0, 125, 100), set()),
        (BIG, (50, 0, 150, 100), {"left of"}),
        ((100, 0, 110, 10), A, {"right of"}),
        ((0, 50, 10, 60), A, {"below"}),
        (A, A, set()),
    ],
)
def test_golden_relations(box, target, golden):
    assert relations(box, target) == golden


def test_golden_overlap():
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == 0.3333333333333333
    assert overlap((0, 0, 9, 9), (20, 0, 29, 9)) == 0.0


def cups(count, spacing=20):
    return [Detection(np.array([spacing * k, 0, spacing * k + 10, 10], np.float32), 0.99 - 0.01 * k) for k in range(count)]


def no_colours(name, group):
    raise AssertionError("no colour was asked for")


def test_golden_verdict_three_cups():
    metadata = {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}]}
    assert verdict({"cup": cups(3)}, metadata, no_colours) == (False, "expected cup<3, found 3")
    assert verdict({"cup": cups(2)}, metadata, no_colours) == (True, "")
    assert verdict({"cup": cups(1)}, metadata, no_colours) == (False, "expected cup>=2, found 1")


def test_golden_thresholds():
    scores = np.array([0.95, 0.90, 0.31, 0.30], np.float32)
    assert keep(scores, 0.3) == [0, 1, 2]  # strictly above, in float32
    assert keep(scores, 0.9) == [0]
    assert keep(np.linspace(0.4, 0.9, 20), 0.3) == list(range(19, 3, -1))  # the best 16


def test_golden_reward_server():
    """Two cups wanted, three found: strict fails and the credit is one half; a wrong position earns 0.75 over four terms."""
    wanted = {"tag": "counting", "include": [{"class": "cup", "count": 2}]}
    judged = soft_verdict({"cup": cups(3)}, wanted, no_colours)
    assert (judged.correct, judged.soft) == (False, 0.5)
    position = {"tag": "position", "include": [{"class": "cup", "count": 1}, {"class": "vase", "count": 1, "position": ["above", 0]}]}
    beside = {"cup": cups(1), "vase": [Detection(np.array([100, 0, 110, 10], np.float32), 0.9)]}
    assert soft_verdict(beside, position, no_colours).soft == 0.75
    assert soft_verdict(beside, position, no_colours, compat="fixed").soft == pytest.approx(2 / 3)
    right = {**position, "include": [{"class": "cup", "count": 1}, {"class": "vase", "count": 1, "position": ["right of", 0]}]}
    assert [soft_verdict(beside, right, no_colours, compat=compat).soft for compat in ("upstream", "fixed")] == [1.0, 1.0]


def test_soft_credit_is_unbounded_below_unless_clamped():
    wanted = {"tag": "single_object", "include": [{"class": "cup", "count": 1}]}
    assert soft_verdict({"cup": cups(5)}, wanted, no_colours).soft == -3.0
    assert soft_verdict({"cup": cups(5)}, wanted, no_colours, clamp=True).soft == 0.0


def test_only_the_most_certain_objects_are_asked():
    wanted = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}
    colours = {0.99: "blue", 0.98: "red"}
    seen = []

    def colours_of(name, group):
        seen.append(len(group))
        return [colours[round(thing.score, 2)] for thing in group]

    assert verdict({"cup": cups(2)}, wanted, colours_of) == (False, "expected red cup>=1, found 0 red; and 1 blue")
    assert seen == [1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"include": []}, "non-empty 'include'"),
        ({"tag": ""}, "'tag'"),
        ({"include": [{"class": "kettle", "count": 1}]}, "'kettle' is not one of the 2"),
        ({"include": [{"class": "cup", "count": 0}]}, "at least 1"),
        ({"include": [{"class": "cup", "count": 1, "color": "beige"}]}, "'beige' is none of red"),
        ({"include": [{"class": "cup", "count": 1, "position": ["above", 0]}]}, "earlier clause"),
        ({"include": [{"class": "cup", "count": 1}, {"class": "cup", "count": 1, "position": ["near", 0]}]}, "left of"),
    ],
)
def test_metadata_that_could_only_be_judged_wrong_is_refused(change, words):
    assert words in check_metadata({"tag": "counting", "include": [{"class": "cup", "count": 1}], **change}, ("cup", "vase"))


def test_good_metadata_passes():
    clauses = [{"class": "cup", "count": 1, "color": "red"}, {"class": "vase", "count": 2, "position": ["above", 0]}]
    assert check_metadata({"tag": "position", "include": clauses}, ("cup", "vase")) == ""


# A second implementation, written from the protocol's pseudo code and sharing nothing with the first.


def plain_relations(a, b):
    ax, ay, bx, by = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2, (b[0] + b[2]) / 2, (b[1] + b[3]) / 2
    length = ((ax - bx) ** 2 + (ay - by) ** 2) ** 0.5
    reduced = []
    for offset, extent in ((ax - bx, (a[2] - a[0]) + (b[2] - b[0])), (ay - by, (a[3] - a[1]) + (b[3] - b[1]))):
        rest = abs(offset) - 0.1 * extent
        reduced.append(0.0 if rest <= 0 else (rest if offset > 0 else -rest))
    if abs(reduced[0]) < 1e-3 and abs(reduced[1]) < 1e-3:
        return set()
    found = set()
    if reduced[0] / length < -0.5:
        found.add("left of")
    if reduced[0] / length > 0.5:
        found.add("right of")
    if reduced[1] / length < -0.5:
        found.add("above")
    if reduced[1] / length > 0.5:
        found.add("below")
    return found


def plain_verdict(things, metadata, paint):
    ok, groups = True, []
    for clause in metadata["include"]:
        found = list(things.get(clause["class"], []))[: clause["count"]]
        matched = len(found) == clause["count"]
        if matched and "color" in clause:
            matched = sum(paint[id(thing)] == clause["color"] for thing in found) >= clause["count"]
        if matched and "position" in clause:
            target = groups[clause["position"][1]]
            matched = target is not None and all(
                clause["position"][0] in plain_relations(thing.box.tolist(), other.box.tolist()) for thing in found for other in target
            )
        groups.append(found if matched else None)
        ok = ok and matched
    for clause in metadata.get("exclude", []):
        ok = ok and len(things.get(clause["class"], [])) < clause["count"]
    return ok


def plain_soft(things, metadata, paint, fixed):
    ok, groups, terms = True, [], []
    for clause in metadata["include"]:
        found, count = list(things.get(clause["class"], [])), clause["count"]
        terms.append(1 - abs(count - len(found)) / count)
        matched = len(found) == count
        if not matched and ("color" in clause or "position" in clause):
            terms.append(0)
        if matched and "color" in clause:
            right = sum(paint[id(thing)] == clause["color"] for thing in found)
            terms.append(1 - abs(count - right) / count)
            matched = right == count
        if matched and "position" in clause:
            target = groups[clause["position"][1]]
            if target is None:
                terms.append(0)
                matched = False
            else:
                matched = all(
                    clause["position"][0] in plain_relations(thing.box.tolist(), other.box.tolist()) for thing in found for other in target
                )
                terms += [1] if matched else ([0] if fixed else [0, 1])
        groups.append(found if matched else None)
        ok = ok and matched
    return ok, sum(terms) / len(terms)


def random_case(rng):
    """A scene and a request that fit each other often enough for every branch to be taken."""
    names = ["cup", "vase", "dog"]
    things = {}
    for name in names:
        corners = rng.integers(0, 12, (int(rng.integers(0, 4)), 2)) * 20
        group = [
            Detection(np.array([x, y, x + w, y + h], np.float32), 0.5)
            for (x, y), w, h in zip(corners, *rng.integers(5, 60, (2, 4)), strict=False)
        ]
        if group:
            things[name] = group
    paint = {id(thing): str(rng.choice(COLOURS[:3])) for group in things.values() for thing in group}
    include = []
    for index in range(int(rng.integers(1, 4))):
        clause = {"class": str(rng.choice(names)), "count": int(rng.integers(1, 3))}
        if rng.random() < 0.4:
            clause["color"] = str(rng.choice(COLOURS[:3]))
        if index and rng.random() < 0.6:
            clause["position"] = [str(rng.choice(RELATIONS)), int(rng.integers(0, index))]
        include.append(clause)
    metadata = {"tag": str(rng.choice(TAGS)), "include": include}
    if rng.random() < 0.3:
        metadata["exclude"] = [{"class": str(rng.choice(names)), "count": int(rng.integers(1, 4))}]
    return things, metadata, paint


def cases(count=2000, seed=0):
    rng = np.random.default_rng(seed)
    return [random_case(rng) for _ in range(count)]


def painted(paint):
    return lambda name, group: [paint[id(thing)] for thing in group]


def test_two_implementations_agree_on_2000_random_scenes():
    outcomes = []
    for things, metadata, paint in cases():
        correct, reason = verdict(things, metadata, painted(paint))
        assert correct == plain_verdict(things, metadata, paint), (things, metadata, reason)
        assert correct == (reason == "")
        for compat in ("upstream", "fixed"):
            judged = soft_verdict(things, metadata, painted(paint), compat=compat)
            strict, soft = plain_soft(things, metadata, paint, compat == "fixed")
            assert judged.correct == strict and judged.soft == pytest.approx(soft, abs=1e-12)
            assert soft_verdict(things, metadata, painted(paint), compat=compat, clamp=True).soft >= max(0.0, judged.soft)
        outcomes.append((correct, judged.correct))
    assert 200 < sum(correct for correct, _ in outcomes) < 1800  # both answers are common, so agreement means something
    assert any(correct and not strict for correct, strict in outcomes)


# The official functions, taken from a checkout by name. Set $MMALIGN_ORACLES to a folder with `geneval` and `reward-server` inside.


def official(path, *names, **given):
    """The named functions of a file, wherever they stand in it, run with the globals given instead of the file's imports."""
    root = os.environ.get("MMALIGN_ORACLES")
    file = Path(root or "") / path
    if not root or not file.is_file():
        pytest.skip(f"the official code is not at hand: set MMALIGN_ORACLES to a folder that holds {path}")
    wanted = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef) and node.name in names]
    space = {"np": np, "POSITION_THRESHOLD": 0.1, "COLORS": list(COLOURS), **given}
    exec(compile(ast.Module(body=wanted, type_ignores=[]), str(file), "exec"), space)
    return [space[name] for name in names]


def as_official(things):
    return {name: [(np.append(thing.box, thing.score).astype(np.float32), thing) for thing in group] for name, group in things.items()}


def sorted_reason(reason):
    """Lines with the names of two relations in one order: the official text prints a set, whose order is by chance."""
    lines = []
    for line in reason.split("\n"):
        before, found, after = line.partition(", found ")
        lines.append(before + found + " and ".join(sorted(after.removesuffix(" target").split(" and "))))
    return lines


def test_equals_the_official_verdict():
    paint = {}

    def colours(image, objects, name):
        return [paint[id(thing)] for _, thing in objects]

    (evaluate, relative) = official("geneval/evaluation/evaluate_images.py", "evaluate", "relative_position", color_classification=colours)
    for things, metadata, case_paint in cases(seed=1):
        paint = case_paint
        correct, reason = verdict(things, metadata, painted(case_paint))
        expected, words = evaluate(None, as_official(things), metadata)
        assert correct == expected and sorted_reason(reason) == sorted_reason(words)
    rng = np.random.default_rng(2)
    for first, second in rng.integers(0, 50, (2000, 2, 2, 2)):
        boxes = [np.concatenate([corners.min(0), corners.max(0)]).astype(np.float32) for corners in (first, second)]
        assert relations(*boxes) == relative((boxes[0], None), (boxes[1], None))


def test_equals_the_official_reward():
    paint = {}

    def colours(image, objects, name):
        return [paint[id(thing)] for _, thing in objects]

    (reward, _) = official("reward-server/reward_server/gen_eval.py", "evaluate_reward", "relative_position", color_classification=colours)
    for things, metadata, case_paint in cases(seed=3):
        paint = case_paint
        strict, soft, words = reward(None, as_official(things), metadata)
        judged = soft_verdict(things, metadata, painted(case_paint))
        assert (judged.correct, judged.soft) == (strict, pytest.approx(soft, abs=1e-12))
        assert sorted_reason(judged.reason) == sorted_reason(words)
