"""MAGVIT-v2 for images (showlab/magvitv2): pictures to codes of sign bits and back; the image tokenizer of Show-o and MMaDA.

Paper: Language Model Beats Diffusion (arXiv 2310.05737); format: showlab/Show-o at 45a5a2d (models/modeling_magvitv2.py). A code
is read off the signs of the encoder's channels, first channel the highest bit, so there is no codebook to search. The released
config.json has no sizes; they come from the tensors. It runs in float32 always, as the official scripts do.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mmalign.models.layers.ldm import decoder_for, encoder_for
from mmalign.models.layers.weights import check_names, check_shapes, read_tensors
from mmalign.types import MmalignError

TABLES = ("quantize.embedding", "quantize.power_vals")  # the quantiser's bits written out, which nothing needs


class Magvit(nn.Module):
    """Encoder and decoder with the sign quantiser between them. `bits` is log2 of the number of codes, `scale` pixels per code."""

    powers: Tensor

    def __init__(self, encoder: nn.Module, decoder: nn.Module, bits: int, scale: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.bits, self.scale = bits, scale
        self.register_buffer("powers", 2 ** torch.arange(bits - 1, -1, -1), persistent=False)

    @property
    def codes(self) -> int:
        return 2**self.bits

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N] codes in raster order of pixels in [0, 1], whose sides are multiples of `scale`."""
        features_BCHW = self.encoder(pixels_BCHW.float() * 2 - 1)
        return ((features_BCHW > 0) * self.powers[:, None, None]).sum(1).flatten(1)

    def decode(self, codes_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, 3, H, W] pixels, about [0, 1] and not clipped, of codes on a grid (rows, columns)."""
        bits_BNC = (codes_BN[..., None] & self.powers) > 0
        features_BCHW = (bits_BNC.float() * 2 - 1).mT.unflatten(2, grid)
        return (self.decoder(features_BCHW) + 1) / 2


def read_magvit(folder: Path) -> Magvit:
    """The tokenizer in a folder, every parameter present and none left over; MmalignError says what is wrong."""
    tensors = read_tensors(folder)
    parts = {
        part: {name[len(part) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{part}.")}
        for part in ("encoder", "decoder")
    }
    try:
        with torch.device("meta"):
            encoder, decoder = encoder_for(parts["encoder"]), decoder_for(parts["decoder"])
    except (KeyError, IndexError) as error:
        raise MmalignError(f"{folder} is no MAGVIT-v2 tokenizer: it lacks {error}. Give the folder of showlab/magvitv2.") from error
    shell = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    expected = set(shell.state_dict())
    check_names(expected - set(tensors), set(tensors) - expected - set(TABLES), folder)
    check_shapes(tensors, shell, folder)
    shell.load_state_dict({name: tensors[name].float() for name in expected}, assign=True)
    bits, scale = len(tensors["encoder.conv_out.weight"]), 2 ** (len(encoder.down) - 1)
    return Magvit(encoder, decoder, bits, scale).eval().requires_grad_(False)
