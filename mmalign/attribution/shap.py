"""SHAP: Owen values of a picture's boxes, the halving tree and best-first evaluations of `shap.PartitionExplainer`.

The tree halves the longer side of a box until cells are single (pixels: then their channels); of an odd side the first half has the
extra cell, as in the package, which numbers its leaves backwards. Expanding a box in a context costs two
evaluations, the left half alone and the right half alone, and leaves four half-weighted questions: each half, with and without the
other. Questions with the greatest weighted difference are asked first; when the budget is spent, a box spreads its credit evenly.
The sum of a map is the value of the whole picture minus that of the empty one, exactly.

Reference: shap 0.51.0, explainers/_partition.py and maskers/_image.py (rules followed, not code). What differs: all pictures advance in
one batch, boxes are held as corners and not as a cluster matrix, and the blur is made once for a picture and not once for each mask.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmalign.attribution.game import Game, ends
from mmalign.types import UsageError

Box = tuple[int, int, int, int, int, int]  # top, bottom, left, right, first channel, last channel (half-open)


@dataclass(frozen=True)
class Shap:
    """`evaluations` per picture; `batch` masks are chosen per picture before the queue is sorted again (the package's batch_size);
    `unit` of the tree: the token, or the pixel and its channels as the package's image masker has it."""

    evaluations: int = 500
    batch: int = 10
    unit: Literal["token", "pixel"] = "token"

    def __post_init__(self) -> None:
        if self.evaluations < 2 or self.batch < 1:
            raise ValueError(f"evaluations is {self.evaluations} and batch {self.batch}; they must be at least 2 and 1")


def shap(game: Game, config: Shap = Shap(), channels: int = 1) -> Tensor:
    """Credit [B, h, w] (summed over channels), float64. `channels` > 1 makes every channel of a cell a player of its own."""
    full, empty = (found.cpu().numpy() for found in ends(game))
    searches = [_Search((*game.grid, channels), float(full[i]), float(empty[i]), config) for i in range(game.count)]
    while True:
        index, masks, askers = [], [], []
        for number, search in enumerate(searches):
            batch = search.ask()
            if len(batch):
                index += [number] * len(batch)
                masks.append(batch)
                askers.append((search, len(batch)))
        if not askers:
            break
        masks_RCHW = torch.from_numpy(np.moveaxis(np.concatenate(masks), 3, 1)).to(game.device)
        found = game.rows(torch.tensor(index, device=game.device), masks_RCHW).cpu().numpy()
        for search, number in askers:
            search.tell(found[:number])
            found = found[number:]
    return torch.from_numpy(np.stack([search.credit.sum(2) for search in searches])).to(game.device)


def halves(box: Box) -> tuple[Box, Box] | None:
    """The two children of a box, or None for a single cell: the longer side first, rows before columns, channels last."""
    top, bottom, left, right, first, last = box
    rows, columns, depth = bottom - top, right - left, last - first
    if rows >= columns and rows > 1:
        middle = top + (rows + 1) // 2
        return (top, middle, left, right, first, last), (middle, bottom, left, right, first, last)
    if columns > 1:
        middle = left + (columns + 1) // 2
        return (top, bottom, left, middle, first, last), (top, bottom, middle, right, first, last)
    if depth > 1:
        middle = first + (depth + 1) // 2
        return (top, bottom, left, right, first, middle), (top, bottom, left, right, middle, last)
    return None


class _Search:
    """The queue of one picture. A question is (box, boxes present beside it, value without the box, value with it, weight)."""

    def __init__(self, shape: tuple[int, int, int], full: float, empty: float, config: Shap) -> None:
        self.shape, self.batch, self.left = shape, config.batch, config.evaluations - 2
        self.credit = np.zeros(shape)
        self.queue: list[tuple[float, int, tuple]] = []
        self.asked: list[tuple] = []
        self.number = 0
        self._push(((0, shape[0], 0, shape[1], 0, shape[2]), (), empty, full, 1.0), priority=0.0)

    def _push(self, question: tuple, priority: float | None = None) -> None:
        _, _, without, with_it, weight = question
        urgency = -abs(with_it - without) * weight if priority is None else priority
        heapq.heappush(self.queue, (urgency, self.number, question))
        self.number += 1

    def ask(self) -> np.ndarray:
        """Masks [n, h, w, c] of the most urgent expansions; none when the tree or the budget is exhausted."""
        masks: list[np.ndarray] = []
        self.asked = []
        while self.queue and len(masks) < self.batch and len(masks) < self.left:
            question = heapq.heappop(self.queue)[2]
            box, context, without, with_it, weight = question
            children = halves(box)
            if children is None:
                self._spread(box, (with_it - without) * weight)
                continue
            self.asked.append((question, children))
            masks += [self._mask((*context, child)) for child in children]
        self.left -= len(masks)
        if not masks:
            for _, _, (box, _, without, with_it, weight) in self.queue:
                self._spread(box, (with_it - without) * weight)
            self.queue = []
        return np.stack(masks) if masks else np.zeros((0, *self.shape), bool)

    def tell(self, found: np.ndarray) -> None:
        for ((_, context, neither, both, weight), (one, other)), (only_one, only_other) in zip(
            self.asked, found.reshape(-1, 2).tolist(), strict=True
        ):
            half = weight / 2
            self._push((one, context, neither, only_one, half))
            self._push((other, context, neither, only_other, half))
            self._push((one, (*context, other), only_other, both, half))
            self._push((other, (*context, one), only_one, both, half))

    def _mask(self, boxes: tuple[Box, ...]) -> np.ndarray:
        mask = np.zeros(self.shape, bool)
        for top, bottom, left, right, first, last in boxes:
            mask[top:bottom, left:right, first:last] = True
        return mask

    def _spread(self, box: Box, credit: float) -> None:
        top, bottom, left, right, first, last = box
        self.credit[top:bottom, left:right, first:last] += credit / ((bottom - top) * (right - left) * (last - first))


def expanded(credit_BHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Credit of pixels summed over the cells of a grid, so that the sum of a map stays the difference of the scores."""
    height, width = credit_BHW.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise UsageError(f"Credit of {height}x{width} pixels cannot be summed on a {grid[0]}x{grid[1]} grid of whole pixels.")
    return credit_BHW.unflatten(2, (grid[1], -1)).sum(3).unflatten(1, (grid[0], -1)).sum(2)
