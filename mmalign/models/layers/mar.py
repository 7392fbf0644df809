"""The masked autoencoder of MAR (arXiv 2406.11838) under its own parameter names: an encoder of visible tokens, a decoder of all of them.

Suffixes: B samples, N image tokens, V slots for visible ones, T = buffer + V, C channels of a token, E width.
Format: LTH14/mar, as wusize/Harmon at 4eb6087 keeps it (transformer blocks have timm's names). Tokens are continuous: a latent each. The
buffer is a few learned tokens before the image. Changed: rows may differ in how many tokens they see.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.models.layers.masked import first_slots
from mmalign.models.layers.token_diffusion import TokenDenoiser

EPSILON = 1e-6


@dataclass(frozen=True)
class MarSizes:
    """Everything that no released config says of a MAR, read off its tensors; heads alone leave no trace in a shape."""

    channels: int
    width: int
    decoder_width: int
    depth: int
    decoder_depth: int
    heads: int
    decoder_heads: int
    hidden: int
    buffer: int
    tokens: int
    classes: int
    denoiser_width: int
    denoiser_depth: int

    @staticmethod
    def of(tensors: Mapping[str, Tensor], heads: int, decoder_heads: int) -> MarSizes:
        """The sizes of a checkpoint's tensors; KeyError names one that is needed and missing."""

        def count(pattern: str) -> int:
            return len({match[1] for name in tensors if (match := re.match(pattern, name))})

        width, channels = tensors["z_proj.weight"].shape
        tokens, decoder_width = tensors["diffusion_pos_embed_learned"].shape[1:]
        return MarSizes(
            channels=channels,
            width=width,
            decoder_width=decoder_width,
            depth=count(r"encoder_blocks\.(\d+)\."),
            decoder_depth=count(r"decoder_blocks\.(\d+)\."),
            heads=heads,
            decoder_heads=decoder_heads,
            hidden=len(tensors["encoder_blocks.0.mlp.fc1.weight"]),
            buffer=tensors["encoder_pos_embed_learned"].shape[1] - tokens,
            tokens=tokens,
            classes=len(tensors["class_emb.weight"]),
            denoiser_width=len(tensors["diffloss.net.input_proj.weight"]),
            denoiser_depth=count(r"diffloss\.net\.res_blocks\.(\d+)\."),
        )


@dataclass(frozen=True)
class Seen:
    """Which tokens an encoder pass sees: their places [B, V] in raster order, which slots are real (None: all), the grid."""

    places: Tensor
    is_real: Tensor | None
    grid: tuple[int, int]

    @staticmethod
    def where(visible_BN: Tensor, grid: tuple[int, int]) -> Seen:
        counts = visible_BN.sum(1)
        places = first_slots(visible_BN, int(counts.max()))
        is_ragged = bool((counts != counts[0]).any())
        return Seen(places, visible_BN.gather(1, places) if is_ragged else None, grid)


class Mar(nn.Module):
    """Visible tokens to features, features to a condition for every token, and the denoiser that reads it."""

    def __init__(self, sizes: MarSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width, wide, slots = sizes.width, sizes.decoder_width, sizes.buffer + sizes.tokens
        self.class_emb = nn.Embedding(sizes.classes, width)  # MAR's own classes, which Harmon's text replaces
        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.z_proj, self.z_proj_ln = nn.Linear(sizes.channels, width), _norm(width)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, slots, width))
        self.encoder_blocks = nn.ModuleList(Block(width, sizes.heads, sizes.hidden) for _ in range(sizes.depth))
        self.encoder_norm = _norm(width)
        self.mask_token, self.decoder_embed = nn.Parameter(torch.empty(1, 1, wide)), nn.Linear(width, wide)
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, slots, wide))
        hidden = sizes.hidden * wide // width
        self.decoder_blocks = nn.ModuleList(Block(wide, sizes.decoder_heads, hidden) for _ in range(sizes.decoder_depth))
        self.decoder_norm = _norm(wide)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, sizes.tokens, wide))
        self.diffloss = nn.ModuleDict({"net": TokenDenoiser(sizes.channels, sizes.denoiser_width, sizes.denoiser_depth, wide)})

    @property
    def denoiser(self) -> TokenDenoiser:
        """What draws a token, given its condition."""
        return cast(TokenDenoiser, self.diffloss["net"])

    @property
    def side(self) -> int:
        """Rows and columns of the grid that positions were learned for."""
        return round(self.sizes.tokens**0.5)

    def forward(self, how: Literal["encode", "decode"], x: Tensor, seen: Seen) -> Tensor:
        """Both halves go through here, because what shards a model gathers its weights at a module's call."""
        return self.encode(x, seen) if how == "encode" else self.decode(x, seen)

    def encode(self, tokens_BNC: Tensor, seen: Seen) -> Tensor:
        """[B, T, E] features, the buffer first."""
        taken = tokens_BNC.gather(1, seen.places[..., None].expand(-1, -1, tokens_BNC.shape[-1]))
        image = self.z_proj(taken.to(self.z_proj.weight.dtype))
        x = torch.cat([self.fake_latent.expand(len(image), self.sizes.buffer, -1), image], 1)
        x = self.z_proj_ln(x + self._positions(self.encoder_pos_embed_learned, seen))
        mask = None if seen.is_real is None else F.pad(seen.is_real, (self.sizes.buffer, 0), value=True)
        for block in self.encoder_blocks:
            x = block(x, mask)
        return self.encoder_norm(x)

    def decode(self, encoded_BTE: Tensor, seen: Seen) -> Tensor:
        """[B, N, E'] the condition of every token's denoiser."""
        buffer, tokens = self.sizes.buffer, seen.grid[0] * seen.grid[1]
        known = self.decoder_embed(encoded_BTE)
        blank = self.mask_token.to(known.dtype).expand(len(known), tokens, -1)
        image = known[:, buffer:]
        if seen.is_real is not None:
            image = torch.where(seen.is_real[..., None], image, blank[:, : image.shape[1]])
        image = blank.scatter(1, seen.places[..., None].expand(-1, -1, known.shape[-1]), image)
        x = torch.cat([known[:, :buffer], image], 1) + self._whole(self.decoder_pos_embed_learned, seen.grid)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, buffer:] + self._whole(self.diffusion_pos_embed_learned, seen.grid)

    def _positions(self, table: Tensor, seen: Seen) -> Tensor:
        """[B, T, E] the table's entries of the buffer and of the tokens that are seen."""
        buffer, image = self._whole(table, seen.grid).split([self.sizes.buffer, seen.grid[0] * seen.grid[1]], 1)
        picked = image.expand(len(seen.places), -1, -1).gather(1, seen.places[..., None].expand(-1, -1, image.shape[-1]))
        return torch.cat([buffer.expand(len(picked), -1, -1), picked], 1)

    def _whole(self, table_1SE: Tensor, grid: tuple[int, int]) -> Tensor:
        """The table for a grid: as learned, or stretched bilinearly to another one (Harmon draws 32 x 32 with a table of 16 x 16)."""
        if grid == (self.side, self.side):
            return table_1SE
        buffer, image = table_1SE.split([table_1SE.shape[1] - self.sizes.tokens, self.sizes.tokens], 1)
        square = image.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        stretched = F.interpolate(square.float(), size=grid, mode="bilinear").to(square.dtype)
        return torch.cat([buffer, stretched.flatten(2).mT], 1)


class Block(nn.Module):
    """A pre-normalised transformer block that sees everything, or what the mask [B, T] allows."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = _norm(width), Attention(width, heads)
        self.norm2, self.mlp = _norm(width), Mlp(width, hidden)

    def forward(self, x_BTE: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        x = x_BTE + self.attn(self.norm1(x_BTE), mask_BT)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Multi-head attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BTE: Tensor, mask_BT: Tensor | None) -> Tensor:
        query, key, value = self.qkv(x_BTE).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if mask_BT is None else mask_BT[:, None, None, :]
        return self.proj(F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=EPSILON)
