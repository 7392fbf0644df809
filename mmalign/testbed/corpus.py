"""What the tiny models learn from: a seeded stream of prompts, scenes, plans and questions about pictures of the world.

Drawing is taught from a partly wrong corpus (a share of the pictures has one thing wrong), understanding from a right one.
So a trained base draws worse than it reads, and there is something to learn afterwards. Example i of a stream depends on
(seed, i) alone, so a training run resumes exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from mmalign.testbed.world import COLORS, COUNT_WORDS, KINDS, SHAPES, Scene, noun, plan_of, sample_prompts, spoil, text_of

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


def drawings(seed: int, number: int, wrong: float, planned: float) -> list[Drawing]:
    """Drawing examples. `wrong` is the share of spoiled scenes, `planned` the share whose text carries a plan of the scene shown."""
    rng = Random(f"drawings/{seed}")
    out = []
    for _, clauses, scene in _stream(seed, number):
        shown = spoil(scene, rng) if rng.random() < wrong else scene
        text = text_of(clauses)
        out.append(Drawing(f"{text}. {plan_of(shown)}" if rng.random() < planned else text, shown))
    return out


def plans(seed: int, number: int, wrong: float) -> list[Question]:
    """From a prompt to a plan of a scene that fulfils it, wrong as often as the drawings are."""
    rng = Random(f"plans/{seed}")
    return [
        Question(f"{PLAN} {text_of(clauses)}", plan_of(spoil(scene, rng) if rng.random() < wrong else scene), ())
        for _, clauses, scene in _stream(seed, number)
    ]


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


def vocabulary_texts(number: int = 4000) -> list[str]:
    """Texts that show a tokenizer everything it will meet."""
    asked = questions(0, number)
    return [
        *(drawing.text for drawing in drawings(0, number, 0.0, 0.3)),
        *(f"{item.question} {item.answer}" for item in [*asked, *plans(0, number // 4, 0.0)]),
    ]


def _stream(seed: int, number: int, kinds: Sequence[str] = KINDS) -> Iterator:
    return (item for _, item in zip(range(number), sample_prompts("train", kinds, seed), strict=False))
