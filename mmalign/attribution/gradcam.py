"""Grad-CAM on the patch-embedding convolution: activation maps weighted by the mean gradient of the score, negatives cut.

Paper: dense reward for T2I-R1, appendix A.3, equations (27)-(28); one forward and one backward for a whole batch.
Legend: B pictures, C channels of the convolution, h w its map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmalign.attribution.protocol import ActivationScorer
from mmalign.types import UsageError


def gradcam(scorer: ActivationScorer, pixels_BCHW: Tensor, prompts: list[str], chunk: int = 256) -> Tensor:
    """ReLU(sum_c alpha_c A_c), alpha_c the mean over positions of d score / d A_c: [B, h, w], float64."""
    maps = []
    for start in range(0, len(pixels_BCHW), chunk):
        part = slice(start, start + chunk)
        caught: list[Tensor] = []

        def keep(_module, _inputs, output: Tensor, caught: list[Tensor] = caught) -> Tensor:
            caught.append(output.detach().requires_grad_())
            return caught[-1]

        handle = scorer.patch_embedding.register_forward_hook(keep)
        try:
            with torch.enable_grad():
                scores = scorer.score_pixels(pixels_BCHW[part], prompts[part])
        finally:
            handle.remove()
        if len(caught) != 1 or not scores.requires_grad:
            found = f"ran it {len(caught)} times" if len(caught) != 1 else "returned no gradient"
            raise UsageError(
                f"Grad-CAM needs a scorer that runs its patch embedding once and is differentiable behind it; this one {found}."
            )
        gradient = torch.autograd.grad(scores.sum(), caught[0])[0].double()
        alpha = gradient.mean((2, 3), keepdim=True)
        maps.append((alpha * caught[0].detach().double()).sum(1).clamp(min=0))
    return torch.cat(maps)
