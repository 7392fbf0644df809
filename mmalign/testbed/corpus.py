"""What the tiny models learn from: a seeded stream of prompts, scenes, plans and questions about pictures of the world.

Drawing is taught from a partly wrong corpus (a share of the pictures has one thing wrong), understanding from a right one.
So a trained base draws worse than it reads, and there is something to learn afterwards. Example i of a stream depends on
(seed, i) alone, so a training run resumes exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from mmalign.testbed.world import (
    COLORS,
    COUNT_WORDS,
    KINDS,
    SHAPES,
    SIZES,
    Clause,
    Scene,
    facts,
    noun,
    plan_of,
    sample_prompts,
    spoil,
    strict,
    text_of,
    uses_held_out,
)

DESCRIBE = "Describe the image."
LIST = "List every object."
PLAN = "Plan the scene:"


@dataclass(frozen=True)
class Drawing:
    """A text to draw from and the scene that the corpus shows for it (now and then a wrong one)."""

    text: str
    scene: Scene


@dataclass(frozen=True)
class Question:
    """A question about a scene (or about a prompt, when `scene` is empty) and its right answer."""

    question: str
    answer: str
    scene: Scene


@dataclass(frozen=True)
class Pair:
    """A picture's true caption, and the same with one fact changed so that it is false of the picture."""

    true: str
    false: str
    scene: Scene


# Cells of n things in the order in which the corpus' painter likes them: on a row, as on a die, where a region or relation sends them.
PATTERNS = {
    1: ("c", "n", "s", "w", "e"),
    2: ("w e", "n s", "nw se", "ne sw"),
    3: ("w c e", "n c s", "nw ne s", "n sw se", "nw sw e", "w ne se", "nw c se", "ne c sw"),
    4: ("nw ne sw se", "n w e s", "nw n ne s", "n sw s se", "nw w sw e", "w ne e se"),
    5: ("nw ne c sw se", "n w c e s", "nw n ne sw se", "nw ne sw s se", "nw w sw ne se", "nw sw ne e se"),
    6: ("nw n ne sw s se", "nw w sw ne e se"),
}
_CELLS = {name: divmod(number, 3) for number, name in enumerate(["nw", "n", "ne", "w", "c", "e", "sw", "s", "se"])}
_CHOICE = 2  # the painter takes one of this many first patterns that suit the text


def arrange(clauses: Sequence[Clause], scene: Scene, rng: Random) -> Scene:
    """The things of a scene in one of the painter's patterns in which the clauses hold; the scene as it is when there is none."""
    suited = []
    for pattern in PATTERNS.get(len(scene), ()):
        cells = [_CELLS[name] for name in pattern.split()]
        for _ in range(20):
            rng.shuffle(cells)
            things = (replace(thing, row=row, column=column) for thing, (row, column) in zip(scene, cells, strict=True))
            arranged = tuple(sorted(things))
            if strict(clauses, arranged):
                suited.append(arranged)
                break
        if len(suited) == _CHOICE:
            break
    return rng.choice(suited) if suited else scene


def drawings(seed: int, number: int, wrong: float, planned: float, arranged: bool = False) -> list[Drawing]:
    """Drawing examples. `wrong` is the share of spoiled scenes, `planned` the share whose text carries a plan of the scene shown;
    with `arranged` the painter decides where things stand in the others, as far as their text leaves it open."""
    rng = Random(f"drawings/{seed}")
    out = []
    for _, clauses, scene in _stream(seed, number):
        is_wrong = rng.random() < wrong
        shown = spoil(scene, rng) if is_wrong else scene
        text = text_of(clauses)
        if rng.random() < planned:
            text = f"{text}. {plan_of(shown)}"
        elif arranged:
            meant = arrange(clauses, scene, rng)
            shown = spoil(meant, rng) if is_wrong else meant
        out.append(Drawing(text, shown))
    return out


def plans(seed: int, number: int, wrong: float, arranged: bool = False) -> list[Question]:
    """From a prompt to a plan of a scene that fulfils it, arranged and wrong as the drawings are."""
    rng = Random(f"plans/{seed}")
    out = []
    for _, clauses, scene in _stream(seed, number):
        meant = arrange(clauses, scene, rng) if arranged else scene
        meant = spoil(meant, rng) if rng.random() < wrong else meant
        out.append(Question(f"{PLAN} {text_of(clauses)}", plan_of(meant), ()))
    return out


def questions(seed: int, number: int) -> list[Question]:
    """Half descriptions in the prompts' own words, the rest lists of all objects and short questions."""
    rng = Random(f"questions/{seed}")
    out = []
    for _, clauses, scene in _stream(seed, number):
        draw = rng.random()
        if draw < 0.5:
            out.append(Question(DESCRIBE, text_of(clauses), scene))
        elif draw < 0.7:
            out.append(Question(LIST, plan_of(scene), scene))
        else:
            out.append(Question(*ask(scene, rng), scene))
    return out


def ask(scene: Scene, rng: Random) -> tuple[str, str]:
    """A short question about a scene and its answer: a count, a colour, or whether a coloured shape is there."""
    thing = rng.choice(scene)
    same = [other for other in scene if other.shape == thing.shape]
    match rng.choice(("count", "color", "present")):
        case "count":
            shape = rng.choice(SHAPES)
            return f"How many {noun(shape, 2)} are there?", COUNT_WORDS[sum(other.shape == shape for other in scene)]
        case "color" if len(same) == 1:
            return f"What color is the {thing.shape}?", thing.color
    color, shape = (thing.color, thing.shape) if rng.random() < 0.5 else (rng.choice(COLORS), rng.choice(SHAPES))
    there = any((other.color, other.shape) == (color, shape) for other in scene)
    return f"Is there {'an' if color[0] in 'aeiou' else 'a'} {color} {shape} in the image?", "yes" if there else "no"


def pairs(seed: int, number: int) -> list[Pair]:
    """Pictures with a true caption and a false one."""
    rng = Random(f"pairs/{seed}")
    out: list[Pair] = []
    for _, clauses, scene in sample_prompts("train", KINDS, seed):
        changed = change_one_fact(clauses, rng)
        if changed is not None and not uses_held_out(changed) and not all(facts(changed, scene).values()):
            out.append(Pair(text_of(clauses), text_of(changed), scene))
        if len(out) == number:
            break
    return out


def change_one_fact(clauses: Sequence[Clause], rng: Random) -> tuple[Clause, ...] | None:
    """The clauses with one shape, colour, size, count or place replaced; None when the draw left nothing to replace."""
    i = rng.randrange(len(clauses))
    clause = clauses[i]
    free = [shape for shape in SHAPES if shape not in {c.shape for c in clauses}]
    options: dict[str, list] = {"shape": free, "count": [n for n in (1, 2, 3, 4) if n != clause.count]}
    if clause.color:
        options["color"] = [color for color in COLORS if color != clause.color]
    if clause.size:
        options["size"] = [size for size in SIZES if size != clause.size]
    if clause.region:
        options["region"] = [{"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[clause.region]]
    if clause.position:
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        options["position"] = [(opposite[clause.position[0]], clause.position[1])]
    name = rng.choice([name for name, values in options.items() if values])
    return tuple(replace(c, **{name: rng.choice(options[name])}) if n == i else c for n, c in enumerate(clauses))


def vocabulary_texts(number: int = 4000) -> list[str]:
    """Texts that show a tokenizer everything it will meet."""
    asked = questions(0, number)
    return [
        *(drawing.text for drawing in drawings(0, number, 0.0, 0.3)),
        *(f"{item.question} {item.answer}" for item in [*asked, *plans(0, number // 4, 0.0)]),
    ]


def _stream(seed: int, number: int, kinds: Sequence[str] = KINDS) -> Iterator:
    return (item for _, item in zip(range(number), sample_prompts("train", kinds, seed), strict=False))
