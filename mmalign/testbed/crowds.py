"""Pictures for attribution: a prompt that holds, and things beside it that the prompt does not name."""

from __future__ import annotations

from itertools import product
from random import Random

import numpy as np

from mmalign.testbed.render import render
from mmalign.testbed.world import COLORS, HELD_OUT, SHAPES, SIZES, Thing, sample_prompts, text_of
from mmalign.types import Prompt

KINDS = ("colors", "color_attr", "pp_color_attr", "pp_color_count_attr", "dense_4")


def scenes(split: str, number: int, seed: int) -> tuple[list[Prompt], np.ndarray]:
    """Prompts and pictures [B, 32, 32, 3] in which the prompt holds and up to two things stand that it does not name."""
    rng = Random(f"attribution/{split}/{seed}")
    prompts: list[Prompt] = []
    drawn = []
    for _, clauses, scene in sample_prompts(split, KINDS, 1000 + seed):
        taken = {(thing.row, thing.column) for thing in scene}
        free = [cell for cell in product(range(3), range(3)) if cell not in taken]
        others = [shape for shape in SHAPES if shape not in {clause.shape for clause in clauses}]
        extra = []
        for cell in rng.sample(free, min(2, len(free))) if others else ():
            shape = rng.choice(others)
            color = rng.choice([color for color in COLORS if (shape, color) not in HELD_OUT])
            extra.append(Thing(*cell, shape, color, rng.choice(SIZES)))
        meta = {"include": [vars(clause) for clause in clauses]}
        prompts.append(Prompt(f"attribution-{len(prompts)}", text_of(clauses), meta=meta))
        drawn.append(tuple(sorted((*scene, *extra))))
        if len(prompts) == number:
            return prompts, render(drawn)
    raise AssertionError("the stream of prompts is endless")
