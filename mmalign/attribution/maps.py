"""From credit to token weights: patch means, min-max to [0, 1], resizing between grids, top-k mass and entropy.

Paper: dense reward for T2I-R1, equations (7)-(14), (18), (24)-(31); readings of what it leaves open are in docs/attribution.md.
Legend: B pictures, H W pixels or cells, D side of the token grid, N = D * D image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.types import UsageError

Rule = Literal["signed", "positive"]


@dataclass(frozen=True)
class Maps:
    """What a tool found: `credit` [B, D, D] in the score's own units, `weights` [B, D, D] in [0, 1] by the paper's rule.

    `evaluations` is the cost of one picture in forward passes, one forward with backward counting as three. `sign` is -1 where a
    high weight marks a fault (RAHF), so that the caller's lambda must be negative.
    """

    tool: str
    credit: Tensor
    weights: Tensor
    evaluations: float
    sign: int = 1
    notes: dict[str, Any] = field(default_factory=dict)


def normalise(credit_BHW: Tensor, rule: Rule = "signed") -> Tensor:
    """Min-max of each map to [0, 1], equations (9), (26), (31); a constant map becomes 0.5.

    `signed` keeps the sign, so that the most harmful cell becomes 0 (SHAP); `positive` clips at 0 first (Grad-CAM; LIME, whose sizes
    are taken pixel by pixel before).
    """
    value = credit_BHW if rule == "signed" else credit_BHW.clamp(min=0)
    low, high = value.amin((-2, -1), keepdim=True), value.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (value - low) / (high - low).clamp(min=torch.finfo(value.dtype).tiny), torch.full_like(value, 0.5))


@cache
def _overlap(source: int, target: int) -> Tensor:
    """[target, source]: the share of each target cell that each source cell covers."""
    edges = torch.arange(target + 1, dtype=torch.float64) * source / target
    cells = torch.arange(source, dtype=torch.float64)
    shared = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
    return shared.clamp(min=0) * target / source


def resize_area(map_BHW: Tensor, height: int, width: int) -> Tensor:
    """Means over the area of each target cell, exact for any two sizes; the mean of the map stays what it was."""
    rows = _overlap(map_BHW.shape[-2], height).to(map_BHW)
    columns = _overlap(map_BHW.shape[-1], width).to(map_BHW)
    return rows @ map_BHW @ columns.T


def resize_bilinear(map_BHW: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation between cell centres, equation (18)."""
    return torch.nn.functional.interpolate(map_BHW[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]


def token_weights(map_BDD: Tensor, lam: float, grid: tuple[int, int] | int | None = None, normalise: bool = False) -> Tensor:
    """w = 1 + lam * m for each image token, [B, N] in raster order, equation (13); reasoning tokens keep weight 1, equation (12).

    A map of another grid is averaged over the token's area first. `normalise` divides by the mean over the picture's tokens, so
    that the weights redistribute the advantage and do not also scale the step (the paper does not divide).
    """
    if not bool(((map_BDD >= 0) & (map_BDD <= 1)).all()):
        low, high = float(map_BDD.min()), float(map_BDD.max())
        raise UsageError(f"Token weights need maps in [0, 1] and got {low:.4g} to {high:.4g}. Pass Maps.weights, not Maps.credit.")
    if lam < -1:
        raise UsageError(f"lambda is {lam}: below -1 a token's weight turns negative and its advantage changes sign. Use -1 or more.")
    height, width = (grid, grid) if isinstance(grid, int) else grid or map_BDD.shape[-2:]
    weights = 1 + lam * resize_area(map_BDD, height, width).flatten(1)
    return weights / weights.mean(1, keepdim=True) if normalise else weights


def top_mass(map_BDD: Tensor, share: float = 0.1) -> Tensor:
    """Mass of the floor(share * N) greatest weights when the weights of a picture sum to one, equation (10), [B]."""
    weights = _to_one(map_BDD)
    return weights.topk(int(share * weights.shape[1]), dim=1).values.sum(1)


def entropy(map_BDD: Tensor) -> Tensor:
    """Entropy in nats of the weights when those of a picture sum to one, equation (11), [B]; ln N when all are equal."""
    weights = _to_one(map_BDD)
    return -torch.xlogy(weights, weights).sum(1)


def overlay(image_HWC: Any, map_DD: Tensor, strength: float = 0.6) -> Any:
    """The picture (uint8 [H, W, 3]) under its map, uint8: grey where the weight is 0, towards red as it grows to 1."""
    import numpy as np

    image = np.asarray(image_HWC, np.float32)
    weight = resize_bilinear(map_DD[None].float().cpu(), *image.shape[:2])[0].numpy()[:, :, None]
    grey = image.mean(2, keepdims=True).repeat(3, 2)
    shown = grey + strength * weight * (np.array([255, 30, 0], np.float32) - grey)
    return shown.round().clip(0, 255).astype(np.uint8)


def _to_one(map_BDD: Tensor) -> Tensor:
    flat = map_BDD.flatten(1).double()
    return flat / flat.sum(1, keepdim=True)
