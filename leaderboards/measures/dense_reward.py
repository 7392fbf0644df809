"""Claims of the dense-reward paper about maps: where they concentrate, what they cost, and what the order of steps does to a group."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from mmalign.leaderboards.measures.gvu import drawn
from torch import Tensor

from mmalign.attribution import Attribution, FastShap, Tool, attribute, entropy, resize_area, top_mass
from mmalign.attribution.maps import Maps
from mmalign.scorers import clipscore, shapes
from mmalign.testbed.crowds import scenes
from mmalign.types import Prompt

TOOLS: tuple[Tool, ...] = ("shap", "lime", "gradcam")
GRID, SIZE = 24, 96


@cache
def clip() -> clipscore.CosineScorer:
    return clipscore.load(clipscore.Config(model="tiny-clip"))


@cache
def crowd(seed: int, pictures: int) -> tuple[list[Prompt], Tensor, Tensor]:
    """Prompts, pictures [B, 3, 32, 32] that no training saw, and the cells [B, 24, 24] of what the prompts name."""
    prompts, pixels = scenes("val", pictures, seed=100 + seed)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    truth = attribute(Attribution(tool="oracle", grid=GRID), shapes.ShapesScorer(shapes.Config()), x, prompts)
    return prompts, x, truth.weights >= 0.5


@cache
def mapped(tool: Tool, seed: int, pictures: int) -> tuple[Maps, float]:
    """A tool's maps on tiny-clip, at 96 x 96 pixels and 24 x 24 cells, and the seconds of processor time for a picture."""
    prompts, x, _ = crowd(seed, pictures)
    large = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    begun = time.process_time()
    found = attribute(Attribution(tool=tool, grid=GRID, size=SIZE), clip(), large, prompts)
    return found, (time.process_time() - begun) / pictures


def concentration(seed: int, pictures: int = 4) -> dict[str, float]:
    """Mass of the top tenth of the cells when a map's weights sum to one; `uniform` is that of equal weights."""
    found = {tool: float(top_mass(mapped(tool, seed, pictures)[0].weights).mean()) for tool in TOOLS}
    return {**found, "uniform": (GRID**2 // 10) / GRID**2}


def spread(seed: int, pictures: int = 4) -> dict[str, float]:
    """Entropy of the maps, as a share of that of equal weights."""
    found = {tool: float(entropy(mapped(tool, seed, pictures)[0].weights).mean()) / math.log(GRID**2) for tool in TOOLS}
    return {**found, "uniform": 1.0}


def relevance(seed: int, pictures: int = 4, tools: Sequence[Tool] = (*TOOLS, "fast_shap")) -> dict[str, float]:
    """The probability that a cell of a named thing has more credit than another (0.5: no better than chance)."""
    truth = crowd(seed, pictures)[2]
    return {tool: area_under_curve(mapped(tool, seed, pictures)[0].credit, truth) for tool in tools}


def area_under_curve(maps: Tensor, truth: Tensor) -> float:
    found = []
    for credit, real in zip(maps.flatten(1), truth.flatten(1), strict=True):
        gap = credit[real][:, None] - credit[~real][None]
        found.append(float((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean()))
    return float(np.mean(found))


def seconds(seed: int, pictures: int = 4) -> dict[str, float]:
    """Processor seconds of a picture's map."""
    return {tool: mapped(tool, seed, pictures)[1] for tool in TOOLS}


def naive_design(seed: int, prompts: int = 12, each: int = 8, strength: float = 1.0) -> dict[str, float]:
    """Advantages weighted by the map, A (1 + lambda mean m), against advantages of a weighted reward, R (1 + lambda mean m): the gap
    between the better and the worse half of a group in units of its spread, and the share of pairs that change their order."""
    pictures, texts, _ = drawn(seed, prompts, each, "tiny-janus")
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    reward = clip().score_pixels(x, texts).double().reshape(prompts, each)
    option = Attribution(grid=8, masking="drop", fast_shap=FastShap(pairs=0, probes=4))
    weight = 1 + strength * resize_area(attribute(option, clip(), x, texts).weights, 8, 8).mean((1, 2)).reshape(prompts, each)
    dense = _standard(reward) * weight
    naive = _standard(reward * weight)
    return {
        "gap dense": _gap(dense, reward),
        "gap naive": _gap(naive, reward),
        "flips dense": _flips(dense, reward),
        "flips naive": _flips(naive, reward),
    }


def _standard(value: Tensor) -> Tensor:
    return (value - value.mean(1, keepdim=True)) / value.std(1, keepdim=True).clamp(min=1e-12)


def _gap(credit: Tensor, reward: Tensor) -> float:
    ranked = credit.gather(1, reward.argsort(1))
    half = credit.shape[1] // 2
    return float(((ranked[:, half:].mean(1) - ranked[:, :half].mean(1)) / credit.std(1).clamp(min=1e-12)).mean())


def _flips(credit: Tensor, reward: Tensor) -> float:
    """Share of pairs of a group that the credit ranks the other way round than the reward."""
    product = (credit[:, :, None] - credit[:, None]) * (reward[:, :, None] - reward[:, None])
    return float((product < 0).double().mean())
