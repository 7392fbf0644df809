"""Inverse depth of pictures by DPT (MiDaS): greater is nearer, stretched to 0..255 in every picture, as T2I-CompBench stores it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmalign.scorers import _weights
from mmalign.scorers._clip import Dtype
from mmalign.scorers._preprocess import Squash
from mmalign.scorers._whole import load_whole

if TYPE_CHECKING:
    import numpy as np

HALF = (0.5, 0.5, 0.5)


class DepthModel:
    """A loaded DPT. `side`: pictures are squashed to this square, 480 in the official code."""

    def __init__(self, model: Any, side: int) -> None:
        self.model, self.side = model, side
        self.preprocess = Squash((side, side), "pil-bicubic", HALF, HALF)
        self.fingerprint = _weights.fingerprint_tensors(model)

    def maps(self, pictures: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """One uint8 map [height, width] per picture (uint8 RGB [H, W, 3]), at the size asked for. Each depends on its picture alone."""
        import torch

        like = next(self.model.parameters())
        found = []
        with torch.no_grad():
            for picture, size in zip(pictures, sizes, strict=True):
                x_BCHW = self.preprocess.image(picture).to(like.device, like.dtype)
                depth_HW = self.model(pixel_values=x_BCHW).predicted_depth[0].float()
                low, high = depth_HW.min(), depth_HW.max()
                depth_HW = (depth_HW - low) / (high - low) if high > low else torch.zeros_like(depth_HW)
                resized = torch.nn.functional.interpolate(depth_HW[None, None], size=size, mode="bilinear", align_corners=True)
                found.append((255 * resized[0, 0]).to(torch.uint8).cpu().numpy())
        return found


def load(name: str, side: int, device: str, dtype: Dtype, option: str) -> DepthModel:
    """A DPT checkpoint: hub id or folder."""
    from transformers import DPTForDepthEstimation

    model = load_whole(DPTForDepthEstimation, name, device, dtype, option, ("neck.fusion_stage.layers.0.residual_layer1",))
    return DepthModel(model.requires_grad_(False), side)
