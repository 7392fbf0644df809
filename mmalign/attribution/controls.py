"""Controls that a dense reward must beat: random, constant and permuted maps, and maps read from a scorer's own heat map.

A random map belongs to its picture (its pixels, prompt and the seed), never to its place in a batch.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def picture_generator(pixels_CHW: Tensor, prompt: str, seed: int) -> torch.Generator:
    """The random stream of one picture, equal in every batch and process."""
    content = (pixels_CHW.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous().numpy().tobytes()
    digest = hashlib.sha256(content + prompt.encode() + str(seed).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def random_maps(pixels_BCHW: Tensor, prompts: list[str], grid: tuple[int, int], seed: int) -> Tensor:
    """Uniform noise [B, h, w]."""
    found = [torch.rand(grid, generator=picture_generator(x, text, seed)) for x, text in zip(pixels_BCHW, prompts, strict=True)]
    return torch.stack(found).double().to(pixels_BCHW.device)


def permuted_maps(map_BHW: Tensor, pixels_BCHW: Tensor, prompts: list[str], seed: int) -> Tensor:
    """Each map with its cells shuffled: the same weights, in the wrong places."""
    shuffled = []
    for cells, x, text in zip(map_BHW, pixels_BCHW, prompts, strict=True):
        order = torch.randperm(cells.numel(), generator=picture_generator(x, text, seed)).to(cells.device)
        shuffled.append(cells.flatten()[order].reshape(cells.shape))
    return torch.stack(shuffled)
