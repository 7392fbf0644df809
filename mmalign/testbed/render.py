"""Draws scenes: 32x32 RGB pictures with antialiased shapes on a light board of 3x3 cells of 8 pixels, two patches of a tiny model.

Legend: B pictures, H W pixels, T templates, P pixels of one cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np

from mmalign.testbed.world import COLORS, SHAPES, SIZES, Scene

SIZE = 32
CELL = 8
MARGIN = 4
BACKGROUND = np.array([236, 236, 232], np.float32)
PALETTE = np.array(
    [[214, 39, 40], [255, 140, 0], [250, 215, 30], [44, 160, 60], [40, 80, 220], [140, 60, 190], [245, 130, 190], [25, 25, 25]], np.float32
)
DIAMETER = {"small": 5.0, "large": 7.0}
_FINE = 8  # samples per pixel and axis


@cache
def templates() -> tuple[list[tuple[str, str]], np.ndarray]:
    """Every (shape, size) and its coverage [T, 8, 8] in [0, 1]."""
    names = list(product(SHAPES, SIZES))
    return names, np.stack([_coverage(*name) for name in names]).astype(np.float32)


def _coverage(shape: str, size: str) -> np.ndarray:
    axis = (np.arange(CELL * _FINE) + 0.5) / _FINE - CELL / 2
    x, y = np.meshgrid(axis, axis)
    r = DIAMETER[size] / 2
    inside = {
        "circle": x**2 + y**2 <= r**2,
        "square": np.maximum(abs(x), abs(y)) <= 0.9 * r,
        "triangle": (y <= r) & (y >= -r) & (abs(x) <= (y + r) / 2),
        "cross": (np.maximum(abs(x), abs(y)) <= r) & (np.minimum(abs(x), abs(y)) <= 0.34 * r),
    }[shape]
    return inside.reshape(CELL, _FINE, CELL, _FINE).mean((1, 3))


def render(scenes: Sequence[Scene]) -> np.ndarray:
    """Pictures [B, 32, 32, 3], uint8."""
    names, alpha_TPP = templates()
    pixels_BHWC = np.tile(BACKGROUND, (len(scenes), SIZE, SIZE, 1))
    for picture_HWC, scene in zip(pixels_BHWC, scenes, strict=True):
        for thing in scene:
            alpha = alpha_TPP[names.index((thing.shape, thing.size))][..., None]
            top, left = MARGIN + CELL * thing.row, MARGIN + CELL * thing.column
            picture_HWC[top : top + CELL, left : left + CELL] += alpha * (PALETTE[COLORS.index(thing.color)] - BACKGROUND)
    return pixels_BHWC.round().clip(0, 255).astype(np.uint8)
