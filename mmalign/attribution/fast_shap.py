"""Fast SHAP: Shapley values of all cells by one Gaussian regression on a fixed bank of complementary masks; the default for training.

For a mask z and its complement, v(z) - v(1 - z) = (2z - 1) . phi + odd interactions, and 1 . phi = v(1) - v(0) holds exactly. The prior
is phi ~ N(0, S K S): K says that neighbours share credit (RBF with a nugget), S, from gradients on the way from the blurred
picture to the picture, says where credit may live; the evaluations say how much. The noise level is the one of a few whose
leave-one-out error, in closed form, is least. Nothing adapts to an answer, so that one batch serves a whole group of pictures.

Variant A: one gradient, at half presence. Variant B: eight gradients, and inside blocks of 3 x 3 cells the path's own split of the credit.
Against the papers' 500 evaluations of a partition tree it spends 133 (A) or 154 (B); measured in docs/attribution.md.

Legend: B pictures, P pairs, M = 2 P masks, h w cells, N = h * w players.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.attribution.game import Game, values

BLOBS = (3, 4, 6, 8)  # sides of the noise from which smooth masks are grown
NOISE = (1e-6, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # candidates, as a share of the prior variance of an equation


@dataclass(frozen=True)
class FastShap:
    """`pairs` of masks; `steps` of the gradient path (0: no gradients, every cell alike); `split`: side of the blocks inside which the
    path divides the credit (1: none); `length` of the kernel as a share of the grid's side."""

    pairs: int = 64
    steps: int = 1
    split: int = 1
    length: float = 2.5 / 24
    nugget: float = 0.02
    floor: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.steps < 0 or self.split < 1 or self.length <= 0 or self.nugget <= 0 or not 0 < self.floor <= 1:
            raise ValueError("pairs and split are at least 1, steps at least 0, length and nugget above 0, floor in (0, 1]")


VARIANTS = {"A": FastShap(), "B": FastShap(steps=8, split=3)}


def fast_shap(game: Game, config: FastShap = FastShap()) -> Tensor:
    """Credit [B, h, w], float64; its sum over a picture is v(whole) - v(empty)."""
    bank = mask_bank(game.grid, config.pairs, config.seed).to(game.device)
    whole = torch.ones(1, *game.grid, dtype=torch.bool, device=game.device)
    found = values(game, torch.cat([bank, ~bank, whole, ~whole]))
    pairs = config.pairs
    answers = torch.cat([found[:, :pairs] - found[:, pairs : 2 * pairs], found[:, -2:-1] - found[:, -1:]], dim=1)
    path = _path(game, config.steps)
    rows = torch.cat([bank.flatten(1).double() * 2 - 1, torch.ones(1, bank[0].numel(), device=game.device, dtype=torch.float64)])
    credit = regress(rows, answers, prior_factor(game.grid, path, config).to(game.device))
    credit = credit.unflatten(1, game.grid)
    return credit if path is None or config.split == 1 else divide(credit, path, config.split)


@lru_cache(maxsize=8)
def mask_bank(grid: tuple[int, int], pairs: int, seed: int) -> Tensor:
    """[pairs, h, w] bool: smooth noise cut at a uniformly drawn number of cells. The complements are the other half of the bank."""
    generator = torch.Generator().manual_seed(seed)
    players = grid[0] * grid[1]
    masks = []
    for number in range(pairs):
        side = BLOBS[number % len(BLOBS)]
        noise = torch.randn(1, 1, side, side, generator=generator)
        smooth = F.interpolate(noise, grid, mode="bicubic", align_corners=False).flatten()
        size = int(torch.randint(1, players, (), generator=generator))
        mask = torch.zeros(players, dtype=torch.bool)
        mask[smooth.topk(size).indices] = True
        masks.append(mask.reshape(grid))
    return torch.stack(masks)


def _path(game: Game, steps: int) -> Tensor | None:
    """Mean slope [B, h, w] at the midpoints of `steps` equal steps from empty to whole; None without gradients."""
    found = []
    for step in range(steps):
        slopes = game.slopes((step + 0.5) / steps)
        if slopes is None:
            return None
        found.append(slopes)
    return torch.stack(found).mean(0) if found else None


@lru_cache(maxsize=8)
def _kernel_root(grid: tuple[int, int], length: float, nugget: float) -> Tensor:
    """A square root [N, N] of the prior correlation: RBF in cells with a nugget on the diagonal."""
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) / side for side in grid), indexing="ij")
    points = torch.stack([rows.flatten(), columns.flatten()], 1)
    kernel = (1 - nugget) * torch.exp(-(torch.cdist(points, points) ** 2) / (2 * length**2)) + nugget * torch.eye(len(points)).double()
    return torch.linalg.cholesky(kernel)


def prior_factor(grid: tuple[int, int], path: Tensor | None, config: FastShap) -> Tensor:
    """Factors S L [B or 1, N, N] of the prior covariance S K S = (S L)(S L)^T; S is the smoothed size of the slopes, or flat."""
    root = _kernel_root(grid, config.length, config.nugget)
    if path is None:
        return root[None]
    size = path.abs()
    smooth = F.avg_pool2d(F.pad(size[:, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[:, 0].flatten(1)
    smooth = smooth / smooth.mean(1, keepdim=True).clamp(min=1e-300)
    return smooth.clamp(min=config.floor)[:, :, None] * root.to(path.device)


def regress(rows_EN: Tensor, answers_BE: Tensor, factor_BNN: Tensor) -> Tensor:
    """Posterior mean [B, N] of phi given rows . phi = answers, the last of them exactly and the others with noise.

    The noise variance is the candidate with the least leave-one-out error; the exact row is never left out. Answers of 0 everywhere
    give a map of 0.
    """
    spread = rows_EN @ factor_BNN  # [B, E, N]
    gram = spread @ spread.mT
    scale = gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(1)
    noisy = torch.ones(len(rows_EN), dtype=gram.dtype, device=gram.device)
    noisy[-1] = 0
    best_error = torch.full((len(answers_BE),), torch.inf, dtype=gram.dtype, device=gram.device)
    best = torch.zeros_like(answers_BE)
    for noise in NOISE:
        inverse = torch.linalg.inv(gram + torch.diag_embed((noise * scale)[:, None] * noisy))
        weights = (inverse @ answers_BE[:, :, None])[:, :, 0]
        error = (left_out(inverse, weights)[:, :-1] ** 2).sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better[:, None], weights, best)
    credit = (factor_BNN @ (spread.mT @ best[:, :, None]))[:, :, 0]
    short = answers_BE[:, -1] - credit.sum(1)  # rounding of the solve, spread evenly
    return credit + short[:, None] / credit.shape[1]


def left_out(inverse_BEE: Tensor, weights_BE: Tensor) -> Tensor:
    """Leave-one-out residuals [B, E], answer i less its prediction from all others: [G^-1 y]_i / [G^-1]_ii, G the answers' covariance."""
    return weights_BE / inverse_BEE.diagonal(dim1=1, dim2=2)


def divide(credit_BHW: Tensor, path_BHW: Tensor, side: int) -> Tensor:
    """The credit of each block of side x side cells, divided inside the block as the path's own credit is."""
    h, w = credit_BHW.shape[-2:]
    padding = (0, -w % side, 0, -h % side)
    count = _blocks(F.pad(torch.ones_like(credit_BHW), padding), side)
    gap = (_blocks(F.pad(credit_BHW, padding), side) - _blocks(F.pad(path_BHW, padding), side)) / count
    return path_BHW + gap.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :h, :w]


def _blocks(map_BHW: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(map_BHW[:, None], side)[:, 0] * side**2
