"""Reads pictures of the shapes world back into scenes, exactly: for each cell the thing whose drawing fits it best.

For a template with coverage a and a cell with pixels y (background subtracted), the best colour is c = a.y / a.a, and the squared
error left is |y|^2 - |a.y|^2 / a.a. The least error over all templates names shape and size; the nearest palette entry names
the colour. Everything is one matrix product, so a training batch costs about a millisecond per hundred pictures.

Decoded pictures have soft edges, so every template is tried sharp and at two blurs. A cell counts as empty while it holds less than
a third of the smallest thing's energy, and as unclear (a thing that is there but is no thing of this world) when a third of its
energy is left unexplained or its colour is far off.

Legend: B pictures, K the nine cells, T templates, P the 64 pixels of a cell, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from einops import rearrange
from scipy.ndimage import gaussian_filter

from mmalign.testbed.render import BACKGROUND, CELL, MARGIN, PALETTE, SIZE, templates
from mmalign.testbed.world import COLORS, SIDE, Scene, Thing

BLURS = (0.0, 0.7, 1.0)  # standard deviations in pixels
UNEXPLAINED = 0.33  # share of a cell's energy that no template explains
COLOR_DISTANCE = 70.0  # Euclidean, in 0..255 RGB
FAINT_PIXEL = 40.0  # a pixel shows a thing when some channel is this far from the background


@dataclass(frozen=True)
class Reading:
    """What the oracle sees: the scene and the number of cells that hold something it cannot name."""

    scene: Scene
    unclear: int


@cache
def _bank() -> tuple[np.ndarray, np.ndarray, float]:
    _, sharp = templates()
    alpha_TP = np.concatenate([rearrange(gaussian_filter(sharp, (0, blur, blur)), "t h w -> t (h w)") for blur in BLURS])
    norm_T = (alpha_TP**2).sum(1)
    contrast = ((PALETTE - BACKGROUND) ** 2).sum(1).min()
    return alpha_TP, norm_T, float(norm_T.min() * contrast) / 3


def read(pixels_BHWC: np.ndarray) -> list[Reading]:
    """Scenes of pictures [B, 32, 32, 3] (uint8, or floats in 0..255). Other sizes are averaged or repeated to 32 first."""
    names, _ = templates()
    alpha_TP, norm_T, faint = _bank()
    pixels = _to_board(np.asarray(pixels_BHWC, np.float32))
    board = pixels[:, MARGIN : MARGIN + SIDE * CELL, MARGIN : MARGIN + SIDE * CELL] - BACKGROUND
    y_BKPC = rearrange(board, "b (r h) (q w) c -> b (r q) (h w) c", r=SIDE, q=SIDE)
    fit_BKTC = np.einsum("tp,bkpc->bktc", alpha_TP, y_BKPC, optimize=True)
    energy_BK = (y_BKPC**2).sum((2, 3))
    explained_BKT = (fit_BKTC**2).sum(3) / norm_T
    best_BK = explained_BKT.argmax(2)
    picked = np.take_along_axis(fit_BKTC, best_BK[..., None, None], 2)[:, :, 0] / norm_T[best_BK][..., None]
    distance = np.linalg.norm(picked[:, :, None] + BACKGROUND - PALETTE, axis=3)
    unexplained_BK = 1 - explained_BKT.max(2) / np.maximum(energy_BK, 1e-6)
    readings = []
    for b in range(len(pixels)):
        things, unclear = [], 0
        for k in np.flatnonzero(energy_BK[b] > faint):
            if unexplained_BK[b, k] > UNEXPLAINED or distance[b, k].min() > COLOR_DISTANCE:
                unclear += 1
                continue
            shape, size = names[best_BK[b, k] % len(names)]
            things.append(Thing(int(k) // SIDE, int(k) % SIDE, shape, COLORS[int(distance[b, k].argmin())], size))
        readings.append(Reading(tuple(things), unclear))
    return readings


def truth(pixels_HWC: np.ndarray, scene: Scene, shapes: set[str]) -> np.ndarray:
    """Where a picture shows the scene's things of these shapes: [32, 32], 1 on their pixels and 0 elsewhere."""
    distance = np.abs(_to_board(np.asarray(pixels_HWC, np.float32)[None])[0] - BACKGROUND).max(2)
    heat = np.zeros((SIZE, SIZE), np.float32)
    for thing in scene:
        if thing.shape in shapes:
            top, left = MARGIN + CELL * thing.row, MARGIN + CELL * thing.column
            heat[top : top + CELL, left : left + CELL] = distance[top : top + CELL, left : left + CELL] > FAINT_PIXEL
    return heat


def _to_board(pixels_BHWC: np.ndarray) -> np.ndarray:
    height, width = pixels_BHWC.shape[1:3]
    if height % SIZE == 0 and width % SIZE == 0:
        return rearrange(pixels_BHWC, "b (h i) (w j) c -> b h w i j c", h=SIZE, w=SIZE).mean((3, 4))
    rows, columns = (np.arange(SIZE) * height // SIZE), (np.arange(SIZE) * width // SIZE)
    return pixels_BHWC[:, rows][:, :, columns]
