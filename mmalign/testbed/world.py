"""The grammar of the shapes world: scenes, prompts in GenEval's and GenEval++'s kinds, and the facts a prompt states.

A scene is up to nine things on a 3x3 board; a thing has a shape, a colour, a size and a cell. A prompt is a list of clauses,
one for each shape it names, in the vocabulary of GenEval's metadata (class, count, color, position) and of GenEval++'s (region, size).
A fact is one checkable statement of a clause. `Prompt.meta["include"]` holds the clauses, so the prompt can be scored by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from random import Random

from mmalign.types import Prompt

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
REGIONS = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
RELATIONS = {"left of": "left of", "right of": "right of", "above": "above", "below": "below"}
COUNT_WORDS = ("zero", "one", "two", "three", "four", "five")
SIDE = 3

GENEVAL = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVALPP = (
    "pp_color_attr",
    "pp_counting",
    "pp_color_count_attr",
    "pp_spatial_count_attr",
    "pp_color_spatial_attr",
    "pp_multi_object_count_attr",
    "pp_size_spatial_attr",
)
DENSE = ("dense_3", "dense_4", "dense_5", "dense_6")
KINDS = GENEVAL + GENEVALPP + DENSE

# Pairs that no training prompt or training picture shows, so that the test split asks for combinations never seen.
HELD_OUT = frozenset({("circle", "purple"), ("square", "orange"), ("triangle", "black"), ("cross", "green")})


@dataclass(frozen=True, order=True)
class Thing:
    """One object: `row` and `column` are its cell, 0 to 2 from the top left."""

    row: int
    column: int
    shape: str
    color: str
    size: str

    @property
    def place(self) -> str:
        if (self.row, self.column) == (1, 1):
            return "center"
        return " ".join(word for word in (ROWS[self.row], COLUMNS[self.column]) if word not in ("middle", "center"))


Scene = tuple[Thing, ...]


@dataclass(frozen=True)
class Clause:
    """A group of equal things that a prompt asks for. `position` = (relation, index of an earlier clause)."""

    shape: str
    count: int = 1
    color: str | None = None
    size: str | None = None
    region: str | None = None
    position: tuple[str, int] | None = None

    def phrase(self) -> str:
        words = ["a" if self.count == 1 else COUNT_WORDS[self.count], self.size, self.color, noun(self.shape, self.count)]
        if words[0] == "a" and next(word for word in words[1:] if word)[0] in "aeiou":
            words[0] = "an"
        if self.region:
            words.append(REGIONS[self.region])
        return " ".join(word for word in words if word)


def noun(shape: str, count: int) -> str:
    return shape if count == 1 else shape + ("es" if shape.endswith("s") else "s")


def in_region(thing: Thing, region: str) -> bool:
    return {"left": thing.column == 0, "right": thing.column == 2, "top": thing.row == 0, "bottom": thing.row == 2}[region]


def related(a: Thing, relation: str, b: Thing) -> bool:
    return {
        "left of": a.column < b.column,
        "right of": a.column > b.column,
        "above": a.row < b.row,
        "below": a.row > b.row,
    }[relation]


def facts(clauses: Sequence[Clause], scene: Scene) -> dict[str, bool]:
    """Every fact that the clauses state, and whether the scene fulfils it. Counts are exact: two circles are not three."""
    groups = [[thing for thing in scene if thing.shape == clause.shape] for clause in clauses]
    verdicts: dict[str, bool] = {}
    for clause, group in zip(clauses, groups, strict=True):
        name = clause.shape
        verdicts[f"{name} count"] = len(group) == clause.count
        if clause.color:
            verdicts[f"{name} color"] = bool(group) and all(thing.color == clause.color for thing in group)
        if clause.size:
            verdicts[f"{name} size"] = bool(group) and all(thing.size == clause.size for thing in group)
        if clause.region:
            verdicts[f"{name} region"] = bool(group) and all(in_region(thing, clause.region) for thing in group)
        if clause.position:
            relation, other = clause.position
            pairs = list(product(group, groups[other]))
            verdicts[f"{name} position"] = bool(pairs) and all(related(a, relation, b) for a, b in pairs)
    return verdicts


def strict(clauses: Sequence[Clause], scene: Scene, unclear: int = 0) -> bool:
    """All facts hold, nothing else is in the picture, and no cell is unreadable."""
    return unclear == 0 and len(scene) == sum(clause.count for clause in clauses) and all(facts(clauses, scene).values())


def text_of(clauses: Sequence[Clause]) -> str:
    if len(clauses) > 1 and clauses[-1].position and not any(clause.position for clause in clauses[:-1]):
        relation, other = clauses[-1].position
        head, *rest = (clauses[other], *(clause for i, clause in enumerate(clauses[:-1]) if i != other))
        text = f"{clauses[-1].phrase()} {RELATIONS[relation]} {head.phrase()}"
        phrases = [text, *(clause.phrase() for clause in rest)]
    else:
        phrases = [clause.phrase() for clause in clauses]
    joined = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"a photo of {joined}"


def draw_clauses(kind: str, rng: Random, held_out: bool = False) -> tuple[Clause, ...]:
    """Clauses of one kind. With `held_out`, coloured clauses may use the pairs that training never shows."""

    def color(shape: str) -> str:
        return rng.choice([c for c in COLORS if held_out or (shape, c) not in HELD_OUT])

    a, b, c, d = rng.sample(SHAPES, 4)
    match kind:
        case "single_object":
            return (Clause(a),)
        case "two_object":
            return (Clause(a), Clause(b))
        case "counting":
            return (Clause(a, rng.randint(2, 4)),)
        case "colors":
            return (Clause(a, color=color(a)),)
        case "position":
            return (Clause(a), Clause(b, position=(rng.choice(list(RELATIONS)), 0)))
        case "color_attr":
            return (Clause(a, color=color(a)), Clause(b, color=color(b)))
        case "pp_color_attr":
            return tuple(Clause(shape, color=color(shape)) for shape in (a, b, c))
        case "pp_counting":
            return (Clause(a, rng.randint(3, 5)),)
        case "pp_color_count_attr":
            return (Clause(a, rng.randint(1, 3), color(a)), Clause(b, rng.randint(1, 2), color(b)))
        case "pp_spatial_count_attr":
            first, second = rng.choice([("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")])
            return (Clause(a, rng.randint(1, 3), region=first), Clause(b, rng.randint(1, 2), region=second))
        case "pp_color_spatial_attr":
            first, second = rng.choice([("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")])
            return (Clause(a, color=color(a), region=first), Clause(b, color=color(b), region=second))
        case "pp_multi_object_count_attr":
            return (Clause(a, rng.randint(1, 2)), Clause(b, rng.randint(1, 2)), Clause(c, 1))
        case "pp_size_spatial_attr":
            first, second = rng.choice([("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")])
            big, small = rng.sample(SIZES, 2)
            return (Clause(a, size=big, region=first), Clause(b, size=small, region=second))
        case "dense_3" | "dense_4" | "dense_5" | "dense_6":
            return _dense(int(kind[-1]), (a, b, c, d), rng, color)
    raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")


def _dense(number: int, shapes: Sequence[str], rng: Random, color) -> tuple[Clause, ...]:
    """Clauses with exactly `number` facts: a count for each clause, the rest drawn among its attributes."""
    n_clauses = min(3, rng.randint((number + 3) // 4, number // 2))
    clauses = [Clause(shape, rng.choice((1, 1, 2))) for shape in shapes[:n_clauses]]
    options = [(i, name) for i in range(n_clauses) for name in ("color", "size", "place")]
    for i, name in rng.sample(options, number - n_clauses):
        clause = clauses[i]
        if name == "color":
            clauses[i] = replace(clause, color=color(clause.shape))
        elif name == "size":
            clauses[i] = replace(clause, size=rng.choice(SIZES))
        elif i == n_clauses - 1 > 0 and rng.random() < 0.5:
            clauses[i] = replace(clause, position=(rng.choice(list(RELATIONS)), 0))
        else:
            clauses[i] = replace(clause, region=rng.choice(list(REGIONS)))
    return tuple(clauses)


def uses_held_out(clauses: Sequence[Clause]) -> bool:
    return any((clause.shape, clause.color) in HELD_OUT for clause in clauses)


def realise(clauses: Sequence[Clause], rng: Random, held_out: bool = False) -> Scene | None:
    """A random scene in which the clauses are strictly true, or None when none was found (the clauses contradict each other)."""
    for _ in range(200):
        cells = rng.sample(list(product(range(SIDE), range(SIDE))), sum(clause.count for clause in clauses))
        things: list[Thing] = []
        for clause in clauses:
            colors = [c for c in COLORS if held_out or (clause.shape, c) not in HELD_OUT]
            for _ in range(clause.count):
                row, column = cells[len(things)]
                color, size = clause.color or rng.choice(colors), clause.size or rng.choice(SIZES)
                things.append(Thing(row, column, clause.shape, color, size))
        scene = tuple(sorted(things))
        if strict(clauses, scene):
            return scene
    return None


def spoil(scene: Scene, rng: Random) -> Scene:
    """The scene with one thing wrong: another shape, colour, size or cell, one thing less or one more."""
    things = list(scene)
    free = [cell for cell in product(range(SIDE), range(SIDE)) if cell not in {(thing.row, thing.column) for thing in things}]
    i = rng.randrange(len(things))
    thing = things[i]
    colors = [c for c in COLORS if c != thing.color and (thing.shape, c) not in HELD_OUT]
    match rng.choice(("shape", "color", "color", "cell", "cell", "fewer", "more")):
        case "shape":
            things[i] = replace(thing, shape=rng.choice([s for s in SHAPES if s != thing.shape and (s, thing.color) not in HELD_OUT]))
        case "color":
            things[i] = replace(thing, color=rng.choice(colors))
        case "fewer" if len(things) > 1:
            del things[i]
        case "more" if free:
            row, column = rng.choice(free)
            things.append(replace(thing, row=row, column=column))
        case _:
            row, column = rng.choice(free)
            things[i] = replace(thing, row=row, column=column)
    return tuple(sorted(things))


def plan_of(scene: Scene) -> str:
    """The scene as a short plan, in reading order: what a model should think before it draws."""
    return ", ".join(f"{thing.size} {thing.color} {thing.shape} {thing.place}" for thing in scene)


def split_of(clauses: Sequence[Clause]) -> str:
    """train, val or test, by a digest of the text; a held-out pair always means test."""
    if uses_held_out(clauses):
        return "test"
    bucket = hashlib.sha256(text_of(clauses).encode()).digest()[0] % 10
    return {0: "val", 1: "test", 2: "test"}.get(bucket, "train")


# Kinds with fewer texts than this cannot be divided; every split shows them.
SHARED_KINDS = frozenset({"single_object", "two_object", "counting", "pp_counting"})


def sample_prompts(split: str, kinds: Sequence[str], seed: int) -> Iterator[tuple[str, tuple[Clause, ...], Scene]]:
    """An endless seeded stream of (kind, clauses, a scene that fulfils them) of one split."""
    rng = Random(seed)
    held_out = split == "test"
    while True:
        kind = rng.choice(kinds)
        clauses = draw_clauses(kind, rng, held_out)
        if kind not in SHARED_KINDS and split_of(clauses) != split:
            continue
        scene = realise(clauses, rng, held_out)
        if scene is not None:
            yield kind, clauses, scene


def prompts(split: str, per_kind: int = 16, seed: int = 0, kinds: Sequence[str] = KINDS) -> list[Prompt]:
    """Distinct prompts of a split, `per_kind` of each kind where the kind has as many; ids are stable under `per_kind`."""
    out = []
    for kind in kinds:
        seen: dict[str, tuple[Clause, ...]] = {}
        stream = sample_prompts(split, (kind,), seed=int(hashlib.sha256(f"{split}/{kind}/{seed}".encode()).hexdigest()[:12], 16))
        for _, (_, clauses, _) in zip(range(40 * per_kind), stream, strict=False):
            seen.setdefault(text_of(clauses), clauses)
            if len(seen) == per_kind:
                break
        for number, (text, clauses) in enumerate(seen.items()):
            tags = (kind, "novel" if uses_held_out(clauses) else "seen")
            out.append(Prompt(f"{kind}-{number:03d}", text, tags, {"include": [asdict(clause) for clause in clauses]}))
    return out


def clauses_of(prompt: Prompt) -> tuple[Clause, ...]:
    """The clauses kept in a prompt's meta (positions come back from JSON as lists)."""
    entries = prompt.meta["include"]
    return tuple(Clause(**{**entry, "position": tuple(entry["position"]) if entry.get("position") else None}) for entry in entries)
