"""Draws scenes: 32x32 RGB pictures with antialiased shapes on a light board of 3x3 cells of 10 pixels.

Legend: B pictures, H W pixels, T templates, P pixels of one cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from random import Random

import numpy as np

from mmalign.testbed.world import COLORS, SHAPES, SIZES, Scene

SIZE = 32
CELL = 10
MARGIN = 1
BACKGROUND = np.array([236, 236, 232], np.float32)
PALETTE = np.array(
    [[214, 39, 40], [255, 140, 0], [250, 215, 30], [44, 160, 60], [40, 80, 220], [140, 60, 190], [245, 130, 190], [25, 25, 25]], np.float32
)
DIAMETER = {"small": 6.0, "large": 9.0}
JITTER = {"small": (-1, 0, 1), "large": (0,)}
_FINE = 8  # samples per pixel and axis


@cache
def templates() -> tuple[list[tuple[str, str, int, int]], np.ndarray]:
    """Every (shape, size, dx, dy) and its coverage [T, 10, 10] in [0, 1]."""
    names = [(shape, size, dx, dy) for shape in SHAPES for size in SIZES for dx, dy in product(JITTER[size], JITTER[size])]
    return names, np.stack([_coverage(*name) for name in names]).astype(np.float32)


def _coverage(shape: str, size: str, dx: int, dy: int) -> np.ndarray:
    axis = (np.arange(CELL * _FINE) + 0.5) / _FINE - CELL / 2
    x, y = np.meshgrid(axis - dx, axis - dy)
    r = DIAMETER[size] / 2
    inside = {
        "circle": x**2 + y**2 <= r**2,
        "square": np.maximum(abs(x), abs(y)) <= 0.9 * r,
        "triangle": (y <= r) & (y >= -r) & (abs(x) <= (y + r) / 2),
        "cross": (np.maximum(abs(x), abs(y)) <= r) & (np.minimum(abs(x), abs(y)) <= 0.34 * r),
    }[shape]
    return inside.reshape(CELL, _FINE, CELL, _FINE).mean((1, 3))


def render(scenes: Sequence[Scene], seed: int = 0, numbers: Sequence[int] | None = None) -> np.ndarray:
    """Pictures [B, 32, 32, 3], uint8. Small things sit up to one pixel off their cell's centre, by (seed, picture's number, cell) alone,
    so that a thing can be drawn without its neighbours exactly where it stands among them."""
    names, alpha_TPP = templates()
    index = {name: i for i, name in enumerate(names)}
    pixels_BHWC = np.tile(BACKGROUND, (len(scenes), SIZE, SIZE, 1))
    for place, (number, scene) in enumerate(zip(numbers or range(len(scenes)), scenes, strict=True)):
        for thing in scene:
            rng = Random(f"{seed}/{number}/{thing.row}{thing.column}")
            dx, dy = rng.choice(JITTER[thing.size]), rng.choice(JITTER[thing.size])
            alpha = alpha_TPP[index[thing.shape, thing.size, dx, dy]][..., None]
            top, left = MARGIN + CELL * thing.row, MARGIN + CELL * thing.column
            cell = pixels_BHWC[place, top : top + CELL, left : left + CELL]
            cell += alpha * (PALETTE[COLORS.index(thing.color)] - BACKGROUND)
    return pixels_BHWC.round().clip(0, 255).astype(np.uint8)
