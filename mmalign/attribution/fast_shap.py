"""Fast SHAP: Shapley values of all cells by one Gaussian regression on a fixed bank of complementary masks; the default for training.

For a mask z and its complement, v(z) - v(1 - z) = (2z - 1) . phi + odd interactions, and 1 . phi = v(1) - v(0) holds exactly. The prior
is phi ~ N(0, S K S + t^2 g g^T). g is the mean slope of the score by presence on the way from the empty picture to the whole; S, its
smoothed size, says where credit may live; K says that neighbours share it (RBF with a nugget); the last term lets phi hold any multiple
of g, which the evaluations decide. The noise level is the one of a few whose leave-one-out error, in closed form, is least.
Nothing adapts to an answer, so that one batch serves a whole group of pictures.

The term g g^T is what brings most: without it slopes can only say where credit lives. Numbers are in docs/attribution.md.

With `probes`, g is the mean slope under masks of the bank and their complements: a sample of the marginal contributions whose mean the
Shapley value is, one gradient for all cells where a pair of evaluations speaks of their sum alone. Without pairs it is the credit itself.

Legend: B pictures, E equations (pairs and the total), h w cells, N = h * w players, F columns of a factor of the prior.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.attribution.game import Game, ends, values
from mmalign.types import UsageError

BLOBS = (3, 4, 6, 8)  # sides of the noise from which smooth masks are grown
SIZES = (0.25, 0.75)  # masks take a uniformly drawn share of the cells between these; emptier ones say little of single cells
NOISE = (1e-6, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # candidates, as a share of the prior variance of an equation


@dataclass(frozen=True)
class FastShap:
    """`pairs` of masks; `steps` of the gradient path (0: no gradients, every cell alike), or, instead of the path, slopes under this many
    `probes` and their complements; `follow`: t above, in units of the mean size of the slopes; `length` of the kernel as a share of the
    grid's side; `floor` of S as a share of its mean."""

    pairs: int = 32
    steps: int = 8
    probes: int = 0
    follow: float = 1.0
    length: float = 2.5 / 24
    nugget: float = 0.02
    floor: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs < 0 or self.steps < 0 or self.follow < 0 or self.length <= 0 or self.nugget <= 0 or not 0 < self.floor <= 1:
            raise ValueError("pairs, steps and follow are at least 0, length and nugget above 0, floor in (0, 1]")
        if self.probes < 0 or not (self.pairs or self.probes):
            raise ValueError("probes are at least 0, and 1 where there are no pairs")


VARIANTS = {"A": FastShap(pairs=64, steps=1), "B": FastShap(pairs=64)}


def fast_shap(game: Game, config: FastShap = FastShap()) -> Tensor:
    """Credit [B, h, w], float64; its sum over a picture is v(whole) - v(empty)."""
    if not config.pairs:
        full, empty = ends(game)
        slope = _probed(game, config)
        if slope is None:
            raise UsageError("fast_shap without pairs needs a scorer with gradients; set fast_shap.pairs to 32 for this one.")
        return completed(slope.flatten(1), full - empty).unflatten(1, game.grid)
    bank = mask_bank(game.grid, config.pairs, config.seed).to(game.device)
    whole = torch.ones(1, *game.grid, dtype=torch.bool, device=game.device)
    found = values(game, torch.cat([bank, ~bank, whole, ~whole]))
    pairs = config.pairs
    answers = torch.cat([found[:, :pairs] - found[:, pairs : 2 * pairs], found[:, -2:-1] - found[:, -1:]], dim=1)
    path = _probed(game, config) if config.probes else _path(game, config.steps)
    rows = torch.cat([bank.flatten(1).double() * 2 - 1, torch.ones(1, bank[0].numel(), device=game.device, dtype=torch.float64)])
    credit = regress(rows, answers, prior_factor(game.grid, path, config).to(game.device))
    return credit.unflatten(1, game.grid)


@lru_cache(maxsize=8)
def mask_bank(grid: tuple[int, int], pairs: int, seed: int) -> Tensor:
    """[pairs, h, w] bool: smooth noise cut at a drawn number of cells (SIZES). The complements are the other half of the bank."""
    generator = torch.Generator().manual_seed(seed)
    players = grid[0] * grid[1]
    masks = []
    for number in range(pairs):
        side = BLOBS[number % len(BLOBS)]
        noise = torch.randn(1, 1, side, side, generator=generator)
        smooth = F.interpolate(noise, grid, mode="bicubic", align_corners=False).flatten()
        share = SIZES[0] + (SIZES[1] - SIZES[0]) * float(torch.rand((), generator=generator))
        size = min(max(round(share * players), 1), players - 1)
        mask = torch.zeros(players, dtype=torch.bool)
        mask[smooth.topk(size).indices] = True
        masks.append(mask.reshape(grid))
    return torch.stack(masks)


def _path(game: Game, steps: int) -> Tensor | None:
    """Mean slope [B, h, w] at the midpoints of `steps` equal steps from empty to whole; None without gradients."""
    return _mean([game.slopes(torch.full(game.grid, (step + 0.5) / steps)) for step in range(steps)])


def _mean(slopes: list[Tensor | None]) -> Tensor | None:
    found = [slope for slope in slopes if slope is not None]
    return torch.stack(found).mean(0) if found else None


def _probed(game: Game, config: FastShap) -> Tensor | None:
    """Mean slope [B, h, w] under the first masks of the bank and their complements; None without gradients."""
    bank = mask_bank(game.grid, config.probes, config.seed)
    return _mean([game.slopes(mask.double()) for mask in torch.cat([bank, ~bank])])


@lru_cache(maxsize=8)
def _kernel_root(grid: tuple[int, int], length: float, nugget: float) -> Tensor:
    """A square root [N, N] of the prior correlation: RBF in cells with a nugget on the diagonal."""
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) / side for side in grid), indexing="ij")
    points = torch.stack([rows.flatten(), columns.flatten()], 1)
    kernel = (1 - nugget) * torch.exp(-(torch.cdist(points, points) ** 2) / (2 * length**2)) + nugget * torch.eye(len(points)).double()
    return torch.linalg.cholesky(kernel)


def prior_factor(grid: tuple[int, int], path: Tensor | None, config: FastShap) -> Tensor:
    """Factors [S L, t g] of the prior covariance, [B, N, N + 1]; without a path the flat one, [1, N, N]."""
    root = _kernel_root(grid, config.length, config.nugget)
    if path is None:
        return root[None]
    size = F.avg_pool2d(F.pad(path.abs()[:, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[:, 0].flatten(1)
    unit = size.mean(1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
    local = (size / unit).clamp(min=config.floor)[:, :, None] * root.to(path.device)
    return torch.cat([local, config.follow * (path.flatten(1) / unit)[:, :, None]], 2)


def regress(rows_EN: Tensor, answers_BE: Tensor, factor_BNF: Tensor) -> Tensor:
    """Posterior mean [B, N] of phi given rows . phi = answers, the last of them exactly and the others with noise.

    The noise variance is the candidate with the least leave-one-out error; the exact row is never left out. Answers of 0 everywhere
    give a map of 0.
    """
    spread = rows_EN @ factor_BNF  # [B, E, N]
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
    credit = (factor_BNF @ (spread.mT @ best[:, :, None]))[:, :, 0]
    return completed(credit, answers_BE[:, -1])


def completed(credit_BN: Tensor, total_B: Tensor) -> Tensor:
    """Credit whose sum is the total: what is missing (of a solve, its rounding) is spread evenly."""
    return credit_BN + ((total_B - credit_BN.sum(1)) / credit_BN.shape[1])[:, None]


def left_out(inverse_BEE: Tensor, weights_BE: Tensor) -> Tensor:
    """Leave-one-out residuals [B, E], answer i less its prediction from all others: [G^-1 y]_i / [G^-1]_ii, G the answers' covariance."""
    return weights_BE / inverse_BEE.diagonal(dim1=1, dim2=2)
