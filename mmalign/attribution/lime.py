"""LIME: a weighted ridge regression of the score on which superpixels of a picture are present.

Paper: dense reward for T2I-R1, appendix A.2, equations (19)-(24). The number of samples, the ridge's alpha and the kernel's sigma are not
public: 500, 1 and 0.5 here. `target` holds the two readings of (20) and (22): the score itself, or its logistic with temperature 10.
The printed model has no intercept, as the `lime` package's has; without one the score of the empty picture is spread over the
superpixels, so an intercept is the default and `intercept=False` the print. Absent superpixels are blurred, as in all games here.

Legend: B pictures, M samples, K superpixels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmalign.attribution.game import BlurGame


@dataclass(frozen=True)
class Lime:
    """`superpixels` wanted of SLIC (the paper: 50 to 150), `samples` per picture, ridge `alpha`, kernel width `sigma`, `temperature`."""

    superpixels: int = 100
    samples: int = 500
    target: Literal["score", "probability"] = "score"
    intercept: bool = True
    alpha: float = 1.0
    sigma: float = 0.5
    temperature: float = 10.0
    compactness: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.superpixels < 2 or self.samples < 1 or self.alpha <= 0 or self.sigma <= 0 or self.temperature <= 0:
            raise ValueError("superpixels is at least 2, samples at least 1; alpha, sigma and temperature are above 0")


def lime(game: BlurGame, config: Lime = Lime()) -> Tensor:
    """Coefficients painted on the pixels of their superpixels, [B, H, W] float64, signed (equation (23))."""
    segments = superpixels(game.pixels, config)
    switches = [switch_bank(int(segment.max()) + 1, config.samples, config.seed) for segment in segments]
    masks = torch.cat([switch[:, segment] for switch, segment in zip(switches, segments, strict=True)])[:, None]
    index = torch.arange(game.count, device=game.device).repeat_interleave(config.samples)
    answers = game.rows(index, masks.to(game.device)).cpu().reshape(game.count, config.samples)
    if config.target == "probability":
        answers = torch.sigmoid(answers / config.temperature)
    painted = []
    for switch, segment, answer in zip(switches, segments, answers, strict=True):
        coefficients = weighted_ridge(switch.double(), answer, proximity(switch.double(), config.sigma), config.alpha, config.intercept)
        painted.append(coefficients[segment])
    return torch.stack(painted).to(game.device)


def superpixels(pixels_BCHW: Tensor, config: Lime) -> list[Tensor]:
    """SLIC labels [H, W] from 0 of every picture; their number may differ from the number wanted."""
    from skimage.segmentation import slic

    labels = []
    for picture in pixels_BCHW.detach().cpu().double().permute(0, 2, 3, 1).numpy():
        found = slic(picture, n_segments=config.superpixels, compactness=config.compactness, start_label=0, channel_axis=2)
        labels.append(torch.from_numpy(found).unique(return_inverse=True)[1])
    return labels


def switch_bank(number: int, samples: int, seed: int) -> Tensor:
    """[samples, number] bool: each superpixel present with probability one half; the first sample is the whole picture."""
    generator = torch.Generator().manual_seed(seed)
    switches = torch.rand(samples, number, generator=generator) < 0.5
    switches[0] = True
    return switches


def proximity(switches_MK: Tensor, sigma: float) -> Tensor:
    """exp(-d / sigma^2) with d the cosine distance to the whole picture, equation (21); the empty picture has distance 1."""
    share = switches_MK.mean(1)
    return torch.exp(-(1 - share.sqrt()) / sigma**2)


def weighted_ridge(switches_MK: Tensor, answers_M: Tensor, weights_M: Tensor, alpha: float, intercept: bool) -> Tensor:
    """argmin over w [K] of sum weights (answers - w . z - b)^2 + alpha |w|^2, equation (20); b is 0 without intercept and not penalised."""
    z, y = switches_MK, answers_M
    if intercept:
        share = weights_M / weights_M.sum()
        z, y = z - share @ z, y - share @ y
    gram = (z * weights_M[:, None]).T @ z
    return torch.linalg.solve(gram + alpha * torch.eye(len(gram), dtype=gram.dtype), (z * weights_M[:, None]).T @ y)
