"""What attribution asks of a scorer: scores of pixels, and, where a scorer can give them, its patches, activations or heat map.

Legend: B pictures, R rows (masked copies of pictures), N patches, C channels, H W pixels, h w cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.types import Failure, MmalignError, Prompt, Request, Sample, Scorer, UsageError, Value


@runtime_checkable
class PixelScorer(Protocol):
    """A scorer that can be asked about pictures that no model made: masked copies, thousands at a time."""

    def score_pixels(self, pixels_BCHW: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of pictures (floats in [0, 1], any size; the scorer resizes and normalises) for one prompt each.

        Rows do not influence each other. A scorer that is differentiable in its pixels returns a tensor with a graph; one that is
        not returns a plain one, and attribution goes without gradients. Prompts repeat: a text is worth encoding once.
        """
        ...


@runtime_checkable
class ActivationScorer(PixelScorer, Protocol):
    """A scorer that names the convolution that embeds patches, for Grad-CAM."""

    @property
    def patch_embedding(self) -> nn.Module:
        """The module whose output, once per call of score_pixels, is the activation map [B, C, h, w]."""
        ...


@runtime_checkable
class GatedScorer(Protocol):
    """A scorer whose image tower can leave patches out (`masking="drop"`)."""

    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of the tower's patches."""
        ...

    def score_patches(self, pixels_BCHW: Tensor, prompts: list[str], gates_RN: Tensor, index_R: Tensor) -> Tensor:
        """Scores [R]: row r is picture index_R[r] seen through the patches that gates_RN[r] leaves (see dropping.py)."""
        ...


@runtime_checkable
class FeatureScorer(PixelScorer, Protocol):
    """A scorer that shows its joint space, for the amortised head."""

    def patch_tokens(self, pixels_BCHW: Tensor) -> Tensor:
        """Unit patch tokens in the joint space, [B, C, h, w]."""
        ...

    def text_features(self, prompts: list[str]) -> Tensor:
        """Unit text features [B, C] in the same space."""
        ...


@dataclass(frozen=True)
class BlackBox:
    """Any scorer, seen as a PixelScorer without gradients: pixels become uint8 samples of the prompts it was given.

    `prompts` lends the meta data that such scorers read beside the text. A Failure cannot enter an attribution and raises.
    """

    scorer: Scorer
    prompts: tuple[Prompt, ...] = ()

    def score_pixels(self, pixels_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([value.x for value in self.values(pixels_BCHW, prompts)], dtype=torch.float64)

    def heatmaps(self, pixels_BCHW: Tensor, prompts: list[str]) -> Tensor:
        """The scorer's own heat maps [B, h, w]."""
        maps = []
        for value in self.values(pixels_BCHW, prompts):
            if value.heatmap is None:
                name = self.scorer.name
                raise UsageError(f"The scorer '{name}' returned no heat map. Use one that has them, or turn its heat map option on.")
            maps.append(torch.as_tensor(np.asarray(value.heatmap), dtype=torch.float32))
        return torch.stack(maps)

    def values(self, pixels_BCHW: Tensor, prompts: Sequence[str]) -> list[Value]:
        images = (pixels_BCHW.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        known = {prompt.text: prompt for prompt in self.prompts}
        samples = [
            Sample(Request(known.get(text) or Prompt(f"attribution-{number}", text), number, 0), image=image)
            for number, (text, image) in enumerate(zip(prompts, images, strict=True))
        ]
        values = []
        for text, score in zip(prompts, self.scorer.score(samples), strict=True):
            if isinstance(score, Failure):
                raise MmalignError(f"The scorer '{self.scorer.name}' failed on a masked picture of {text!r}: {score.kind}, {score.message}")
            values.append(score)
        return values
