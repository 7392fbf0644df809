"""Scorers whose credit is known: an additive one, a linear one behind a convolution, one with interactions, and tiny CLIPs to explain."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.types import Failure, Sample, Value

PROMPTS = ["a red circle", "two blue squares", "a green cross"]


def pictures(number: int = 3, size: int = 24, seed: int = 0) -> Tensor:
    """Smooth random pictures [B, 3, size, size] in [0, 1]."""
    noise = torch.rand(number, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (size, size), mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Additive:
    """The sum of pixels times fixed weights [3, H, W]: every cell's Shapley value is its own term."""

    weights_CHW: Tensor

    def score_pixels(self, pixels_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return (pixels_BCHW * self.weights_CHW).sum((1, 2, 3))

    def credit(self, present_BCHW: Tensor, absent_BCHW: Tensor, grid: int) -> Tensor:
        terms = ((present_BCHW - absent_BCHW).double() * self.weights_CHW.double()).sum(1)
        return terms.unflatten(2, (grid, -1)).sum(3).unflatten(1, (grid, -1)).sum(2)


def additive(size: int = 24, seed: int = 0) -> Additive:
    return Additive(torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed)))


@dataclass(frozen=True)
class Curved:
    """A smooth score with interactions: tanh of an additive one and its square."""

    inner: Additive

    def score_pixels(self, pixels_BCHW: Tensor, prompts: list[str]) -> Tensor:
        value = self.inner.score_pixels(pixels_BCHW, prompts) / 20
        return torch.tanh(value) + 0.3 * value**2


@dataclass(frozen=True)
class Convolved:
    """score = sum over positions and channels of head * convolution(pixels); Grad-CAM of it can be written down."""

    patch_embedding: nn.Conv2d
    head_Chw: Tensor

    def score_pixels(self, pixels_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return (self.patch_embedding(pixels_BCHW) * self.head_Chw).sum((1, 2, 3))


@dataclass(frozen=True)
class Tokens:
    """score = sum over patches of patch token . text feature, so that every patch's credit is its own product."""

    side: int
    texts: dict[str, Tensor] = field(default_factory=dict)

    def patch_tokens(self, pixels_BCHW: Tensor) -> Tensor:
        return F.normalize(F.avg_pool2d(pixels_BCHW, pixels_BCHW.shape[-1] // self.side) - 0.5, dim=1)

    def text_features(self, prompts: list[str]) -> Tensor:
        return torch.stack([F.normalize(torch.tensor([1.0, len(text) % 3 - 1, -1.0]), dim=0) for text in prompts])

    def score_pixels(self, pixels_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return (self.patch_tokens(pixels_BCHW) * self.text_features(prompts)[:, :, None, None]).sum((1, 2, 3))


@dataclass(frozen=True)
class BrightScorer:
    """A plain scorer without gradients: mean brightness, with the green channel as its heat map; a dark picture is a failure on demand."""

    fails: bool = False
    has_map: bool = True
    name: str = "bright"
    fingerprint: str = "bright"
    range: tuple[float, float] = (0.0, 1.0)

    def score(self, samples: list[Sample]) -> list[Value | Failure]:
        if self.fails:
            return [Failure("score", "timeout", "no answer in 3 s") for _ in samples]
        return [Value(float(s.image.mean()) / 255, heatmap=s.image[:, :, 1] / 255 if self.has_map else None) for s in samples]


def tiny_clip(folder: Path, seed: int = 0):
    """The scorer `clipscore` on a random CLIP of 32-pixel pictures with 4x4 patches: all of attribution's interfaces, in milliseconds."""
    from helpers.tiny_geneval import make_clip

    from mmalign.scorers import clipscore

    return clipscore.load(clipscore.Config(model=str(make_clip(folder, seed))))
