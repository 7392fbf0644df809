"""The image tokenizer of aMUSEd (diffusers' VQModel): pictures to codebook entries and back; Lumina-DiMOO carries one.

Paper: aMUSEd (arXiv 2401.01808). Pixels in [0, 1] on both sides, as Lumina-DiMOO uses it (do_normalize False). It runs in float32 always.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign import hub
from mmalign.models.layers.weights import check_names, check_shapes, read_tensors


class AmusedTokenizer:
    """A VQModel with codes in raster order. `scale` pixels per code."""

    def __init__(self, net: Any) -> None:
        self.net = net
        self.scale = 2 ** (len(net.config.block_out_channels) - 1)

    @property
    def codes(self) -> int:
        return self.net.config.num_vq_embeddings

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N] codes in raster order of pixels in [0, 1], whose sides are multiples of `scale`."""
        return self.net.quantize(self.net.encode(pixels_BCHW.float()).latents)[2][2].view(len(pixels_BCHW), -1)

    def decode(self, codes_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, 3, H, W] pixels, about [0, 1] and not clipped, of codes on a grid (rows, columns)."""
        shape = (len(codes_BN), *grid, self.net.config.latent_channels)
        return self.net.decode(codes_BN.view(shape[:3]), force_not_quantize=True, shape=shape).sample


def read_amused(folder: Path, device: str = "cpu") -> AmusedTokenizer:
    """The tokenizer in a folder, every parameter present and none left over."""
    from diffusers import VQModel

    tensors = read_tensors(folder)
    net = VQModel.from_config({**hub.read_config(folder), "lookup_from_codebook": True})
    expected = set(net.state_dict())
    check_names(expected - set(tensors), set(tensors) - expected, folder)
    check_shapes(tensors, net, folder)
    net.load_state_dict({name: value.float() for name, value in tensors.items()})
    return AmusedTokenizer(net.to(device).eval().requires_grad_(False))
