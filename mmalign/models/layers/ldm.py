"""The convolutional autoencoder of latent diffusion, under the parameter names that released image tokenizers use.

`down.N.block.M`, `mid.{block_1,attn_1,block_2}`, `up.N`: the layout of CompVis/taming-transformers, which MAGVIT-v2's image version
keeps. Shapes: B images, C channels, H and W pixels. Sizes are read from the tensors of a checkpoint, never assumed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32


class Residual(nn.Module):
    """Two normalised convolutions around a skip, which is projected where the width changes."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = _norm(n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        if n_in != n_out:
            self.nin_shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        changed = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x_BCHW))))))
        return changed + (self.nin_shortcut(x_BCHW) if hasattr(self, "nin_shortcut") else x_BCHW)


class Attention(nn.Module):
    """Single-head attention over all pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        normed = self.norm(x_BCHW)
        query, key, value = (layer(normed).flatten(2).mT for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value).mT.unflatten(2, x_BCHW.shape[2:])
        return x_BCHW + self.proj_out(mixed)


class Halve(nn.Module):
    """A strided convolution; the padding lies at the right and at the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Double(nn.Module):
    """Every pixel becomes four, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, with or without attention after each, then the way to the next one."""

    def __init__(self, n_in: int, n_out: int, blocks: int, attends: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(Residual(n_in if index == 0 else n_out, n_out) for index in range(blocks))
        self.attn = nn.ModuleList(Attention(n_out) for _ in range(blocks if attends else 0))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[index](x_BCHW)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x_BCHW = getattr(self, name)(x_BCHW)
        return x_BCHW


class Middle(nn.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Residual(width, width), Attention(width), Residual(width, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Encoder(nn.Module):
    """Pixels in [-1, 1] to features, `2 ** (levels - 1)` times smaller. `widths` and `blocks` are those of the levels, finest first;
    `attends` says which levels have attention (none, if empty), `projects` whether a 1 x 1 convolution ends it."""

    def __init__(
        self, first: int, widths: Sequence[int], blocks: Sequence[int], features: int, attends: Sequence[bool] = (), projects: bool = True
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, first, 3, padding=1)
        inputs = [first, *widths[:-1]]
        self.down = nn.ModuleList(Level(*sizes) for sizes in zip(inputs, widths, blocks, attends or [False] * len(widths), strict=True))
        for level, width in zip(self.down[:-1], widths, strict=False):
            level.downsample = Halve(width)
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), nn.Conv2d(widths[-1], features, 3, padding=1)
        self.quant_conv = nn.Conv2d(features, features, 1) if projects else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.conv_in(x_BCHW)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    """Features to pixels in about [-1, 1]. `up` is stored finest level first and run backwards; `projects`: a 1 x 1 one begins."""

    def __init__(self, features: int, last: int, widths: Sequence[int], blocks: Sequence[int], projects: bool = True) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(features, features, 1) if projects else nn.Identity()
        self.conv_in = nn.Conv2d(features, last, 3, padding=1)
        self.mid = Middle(last)
        inputs = [*widths[1:], last]
        self.up = nn.ModuleList(Level(*sizes) for sizes in zip(inputs, widths, blocks, strict=True))
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Double(width)
        self.norm_out, self.conv_out = _norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(z_BCHW)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def encoder_for(tensors: Mapping[str, Tensor], projects: bool = True) -> Encoder:
    """An encoder, without weights, of the sizes of its tensors; KeyError names a tensor that is needed to size it."""
    widths, blocks = _levels(tensors, "down")
    attends = [f"down.{level}.attn.0.q.weight" in tensors for level in range(len(widths))]
    return Encoder(len(tensors["conv_in.weight"]), widths, blocks, len(tensors["conv_out.weight"]), attends, projects)


def decoder_for(tensors: Mapping[str, Tensor], projects: bool = True) -> Decoder:
    """A decoder, without weights, of the sizes of its tensors; KeyError names a tensor that is needed to size it."""
    widths, blocks = _levels(tensors, "up")
    last, features = tensors["conv_in.weight"].shape[:2]
    return Decoder(features, last, widths, blocks, projects)


def _levels(tensors: Mapping[str, Tensor], part: str) -> tuple[list[int], list[int]]:
    """Output width and number of residual blocks of every level."""
    found: dict[int, set[int]] = {}
    for name in tensors:
        if match := re.match(rf"{part}\.(\d+)\.block\.(\d+)\.", name):
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    widths = [len(tensors[f"{part}.{level}.block.0.conv1.weight"]) for level in range(len(found))]
    return widths, [len(found[level]) for level in range(len(found))]


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=1e-6)
