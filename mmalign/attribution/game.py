"""The two games that attribution plays: which cells of a picture are present, and what the scorer says then.

`BlurGame`: an absent cell shows the blurred picture (`cv2.blur` as in the shap package). `DropGame`: an absent patch is no token of the
scorer's tower. Their values differ, so a result names its game. All masked copies of all pictures go through in chunks on the device.

Legend: B pictures, R rows, M masks, C channels (or 1), H W pixels, h w cells of the game, N = h * w players.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from mmalign.attribution.protocol import GatedScorer, PixelScorer
from mmalign.types import MmalignError, UsageError

Masking = Literal["blur", "drop"]
FAINT = 0.1  # the gate of an absent patch where slopes are wanted: nearer to 0 they tell its first trace, not the patch
DROP_CHUNK = 64  # rows of unlike sizes pad each other, and small chunks of sorted rows pad less


class Game(Protocol):
    """A set function for each of B pictures on one grid of players."""

    name: str
    grid: tuple[int, int]
    count: int
    device: torch.device
    evaluations: float
    pixels: Tensor  # [B, C, H, W]
    prompts: list[str]

    def rows(self, index_R: Tensor, masks_RCHW: Tensor) -> Tensor:
        """Values [R], float64: picture index_R[r] with the cells of masks_RCHW[r] (bool) present."""
        ...

    def slopes(self, presence_HW: Tensor) -> Tensor | None:
        """d value / d presence of every cell where the cells of every picture are present to presence_HW, between 0 and 1: [B, h, w],
        float64; None without gradients."""
        ...

    def part(self, chosen: Tensor) -> Game:
        """The game of some of the pictures, with a count of its own."""
        ...


def values(game: Game, masks_MHW: Tensor) -> Tensor:
    """Values [B, M] of every picture under the same masks, in one batch."""
    pictures, number = game.count, len(masks_MHW)
    index = torch.arange(pictures, device=game.device).repeat_interleave(number)
    masks = masks_MHW[:, None].to(game.device).repeat(pictures, 1, 1, 1)
    return game.rows(index, masks).reshape(pictures, number)


def ends(game: Game) -> tuple[Tensor, Tensor]:
    """Values [B] of the whole picture and of the empty one."""
    both = values(game, torch.stack([torch.ones(game.grid, dtype=torch.bool), torch.zeros(game.grid, dtype=torch.bool)]))
    return both[:, 0], both[:, 1]


@cache
def _box(size: int, width: int) -> Tensor:
    """[size, size] matrix of a moving mean of `width` pixels with mirrored borders that do not repeat the edge (any width)."""
    offsets = torch.arange(width) - width // 2
    period = max(2 * (size - 1), 1)
    position = (torch.arange(size)[:, None] + offsets) % period
    mirrored = torch.minimum(position, (period - position) % period) if size > 1 else torch.zeros_like(position)
    share = torch.full(mirrored.shape, 1 / width, dtype=torch.float64)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, mirrored, share)


def box_blur(pixels_BCHW: Tensor, width: int) -> Tensor:
    """The mean over width x width pixels around each, borders mirrored: `cv2.blur`, also where the kernel is wider than the picture."""
    height, breadth = pixels_BCHW.shape[-2:]
    return _box(height, width).to(pixels_BCHW) @ pixels_BCHW @ _box(breadth, width).to(pixels_BCHW).T


def enlarge(cells_RCHW: Tensor, height: int, width: int) -> Tensor:
    """Each cell repeated over its pixels."""
    h, w = cells_RCHW.shape[-2:]
    return cells_RCHW.repeat_interleave(height // h, -2).repeat_interleave(width // w, -1)


class BlurGame:
    """Absent cells show the blurred picture. Keeps the pictures, their blur (made once) and a count of evaluations per picture."""

    name = "blur"

    def __init__(
        self, scorer: PixelScorer, pixels_BCHW: Tensor, prompts: list[str], grid: tuple[int, int], blur: float = 0.5, chunk: int = 256
    ) -> None:
        """`blur` is the kernel's width as a share of the picture's; grid cells must be whole pixels."""
        self.count, _, self.height, self.width = pixels_BCHW.shape
        if len(prompts) != self.count:
            raise UsageError(f"Attribution got {self.count} pictures and {len(prompts)} prompts. Give one prompt for each picture.")
        if self.height % grid[0] or self.width % grid[1]:
            size, wanted = f"{self.height}x{self.width}", f"{grid[0]}x{grid[1]}"
            raise UsageError(f"A picture of {size} pixels has no {wanted} grid of whole pixels. Set `size` to a multiple of the grid.")
        self.scorer, self.prompts, self.grid, self.chunk = scorer, prompts, grid, chunk
        self.pixels, self.device = pixels_BCHW, pixels_BCHW.device
        self.absent = box_blur(pixels_BCHW, max(1, round(blur * self.width)))
        self.evaluations = 0.0

    def rows(self, index_R: Tensor, masks_RCHW: Tensor) -> Tensor:
        scores = []
        with torch.no_grad():
            for part in _chunks(len(index_R), self.chunk):
                index, keep = index_R[part], enlarge(masks_RCHW[part], self.height, self.width)
                shown = torch.where(keep, self.pixels[index], self.absent[index])
                scores.append(self.scorer.score_pixels(shown, [self.prompts[i] for i in index.tolist()]).double())
        self.evaluations += len(index_R) / self.count
        return _finite(torch.cat(scores), self.device)

    def part(self, chosen: Tensor) -> BlurGame:
        part = copy.copy(self)
        part.pixels, part.absent, part.count = self.pixels[chosen], self.absent[chosen], len(chosen)
        part.prompts, part.evaluations = [self.prompts[i] for i in chosen.tolist()], 0.0
        return part

    def slopes(self, presence_HW: Tensor) -> Tensor | None:
        parts = []
        for part in _chunks(self.count, self.chunk):
            presence = presence_HW.to(self.pixels).repeat(part.stop - part.start, 1, 1, 1).requires_grad_()
            absent = self.absent[part]
            shown = absent + enlarge(presence, self.height, self.width) * (self.pixels[part] - absent)
            with torch.enable_grad():
                scores = self.scorer.score_pixels(shown, self.prompts[part])
            if not scores.requires_grad:
                return None
            parts.append(torch.autograd.grad(scores.sum(), presence)[0][:, 0].double())
        self.evaluations += 3
        return _finite(torch.cat(parts), self.device)


class DropGame:
    """Absent patches are left out of the scorer's tower; the players are its patches. Exact at the full set, and cheaper at all others."""

    name = "drop"

    def __init__(self, scorer: GatedScorer, pixels_BCHW: Tensor, prompts: list[str], chunk: int = 256) -> None:
        if len(prompts) != len(pixels_BCHW):
            raise UsageError(f"Attribution got {len(pixels_BCHW)} pictures and {len(prompts)} prompts. Give one prompt for each picture.")
        self.scorer, self.pixels, self.prompts, self.chunk = scorer, pixels_BCHW, prompts, min(chunk, DROP_CHUNK)
        self.grid, self.count, self.device = scorer.patch_grid(), len(pixels_BCHW), pixels_BCHW.device
        self.evaluations = 0.0

    def rows(self, index_R: Tensor, masks_RCHW: Tensor) -> Tensor:
        keep_RN = masks_RCHW[:, 0].flatten(1)
        order = keep_RN.sum(1).argsort(stable=True)  # rows of like size share a chunk, so that little is padded
        scores = torch.empty(len(index_R), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for part in _chunks(len(index_R), self.chunk):
                chosen = order[part]
                shown, place_R = index_R[chosen].unique(return_inverse=True)  # only these pictures are embedded
                prompts = [self.prompts[i] for i in shown.tolist()]
                found = self.scorer.score_patches(self.pixels[shown], prompts, keep_RN[chosen], place_R)
                scores[chosen] = found.to(scores)
        self.evaluations += len(index_R) / self.count
        return _finite(scores, self.device)

    def part(self, chosen: Tensor) -> DropGame:
        part = copy.copy(self)
        part.pixels, part.count = self.pixels[chosen], len(chosen)
        part.prompts, part.evaluations = [self.prompts[i] for i in chosen.tolist()], 0.0
        return part

    def slopes(self, presence_HW: Tensor) -> Tensor | None:
        parts = []
        for part in _chunks(self.count, self.chunk):
            number = part.stop - part.start
            gates = presence_HW.float().clamp(min=FAINT).flatten().to(self.device).repeat(number, 1).requires_grad_()
            with torch.enable_grad():
                scores = self.scorer.score_patches(self.pixels[part], self.prompts[part], gates, torch.arange(number, device=self.device))
            if not scores.requires_grad:
                return None
            parts.append(torch.autograd.grad(scores.sum(), gates)[0].reshape(number, *self.grid).double())
        self.evaluations += 3
        return _finite(torch.cat(parts), self.device)


def _chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _finite(found: Tensor, device: torch.device) -> Tensor:
    if not bool(found.isfinite().all()):
        number = int((~found.isfinite()).sum())
        raise MmalignError(f"The scorer gave {number} values that are not finite on masked pictures. Check its weights and input range.")
    return found.to(device)
