"""X-Omni's image tokenizer SigLIP-VQ: a SigLIP ViT for pictures of any shape, a codebook searched by cosine, and features of codes.

Format: X-Omni's remote code as carried by vladmandic/sdnext at 058a7f0 (modeling_vit.py, modeling_siglip_tokenizer.py); names are the
checkpoint's. The ViT is timm's without its last norm; its square grid of positions is resized bilinearly to the picture. Codes are
found in the normalised codebook, but become features through the codebook as it is stored.

Suffixes: B pictures, T patches, E the ViT's width, D codebook width, h w patches per side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.models.layers.weights import check_names, check_shapes, read_file
from mmalign.types import MmalignError

EPS = 1e-6
GROUPS = 32
UNUSED = re.compile(r"(norm|fc_norm|attn_pool|head)\.")  # timm's pooling and head, which the tokenizer does not run


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BTE: Tensor) -> Tensor:
        query, key, value = self.qkv(x_BTE).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.attn = Attention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x_BTE: Tensor) -> Tensor:
        x = x_BTE + self.attn(self.norm1(x_BTE))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class SiglipVit(nn.Module):
    """Pixels in [-1, 1] to features of patches. Sizes come from the tensors; only the number of heads does not show in them."""

    def __init__(self, tensors: Mapping[str, Tensor], heads: int) -> None:
        super().__init__()
        width, _, self.patch, _ = tensors["patch_embed.proj.weight"].shape
        hidden = len(tensors["blocks.0.mlp.fc1.weight"])
        self.pos_embed = nn.Parameter(torch.empty(tensors["pos_embed"].shape))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, self.patch, stride=self.patch)})
        depth = len({match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))})
        self.blocks = nn.ModuleList(Block(width, hidden, heads) for _ in range(depth))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, E, h, w]."""
        x = self.patch_embed["proj"](x_BCHW)
        size = tuple(x.shape[2:])
        side = round(self.pos_embed.shape[1] ** 0.5)
        grid = self.pos_embed.mT.unflatten(2, (side, side))
        if size != (side, side):
            grid = F.interpolate(grid, size, mode="bilinear", align_corners=False)
        x = (x + grid).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x.mT.unflatten(2, size)


class Residual(nn.Module):
    """Normalise, bend, convolve, twice, around a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, width), nn.GroupNorm(GROUPS, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BEhw: Tensor) -> Tensor:
        x = self.conv1(F.gelu(self.norm1(x_BEhw)))
        return x_BEhw + self.conv2(F.gelu(self.norm2(x)))


class Codebook(nn.Module):
    def __init__(self, codes: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, depth)


class Projector(nn.Module):
    """Features to codes, and codes to features."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        depth, width = tensors["quant_conv.weight"].shape[:2]
        codes = len(tensors["quantize.embedding.weight"])
        self.quant_conv, self.post_quant_conv = nn.Conv2d(width, depth, 1), nn.Conv2d(depth, width, 1)
        self.quantize = Codebook(codes, depth)
        blocks = len({match[1] for name in tensors if (match := re.match(r"post_conv\.(\d+)\.", name))})
        self.post_conv = nn.Sequential(*[Residual(width) for _ in range(blocks)])

    def codes_of(self, x_BEhw: Tensor) -> Tensor:
        """int [B, h, w]: the nearest code by cosine."""
        z_BhwD = self.quant_conv(x_BEhw).permute(0, 2, 3, 1)
        return (F.normalize(z_BhwD, dim=-1) @ F.normalize(self.quantize.embedding.weight, dim=-1).T).argmax(-1)

    def features_of(self, codes_Bhw: Tensor) -> Tensor:
        """[B, E, h, w]."""
        return self.post_conv(self.post_quant_conv(self.quantize.embedding(codes_Bhw).permute(0, 3, 1, 2)))


class SiglipTokenizer(nn.Module):
    """Pictures to codes and codes to the semantic features that a decoder draws from."""

    def __init__(self, vit: SiglipVit, projector: Projector) -> None:
        super().__init__()
        self.vit, self.projector = vit, projector

    @property
    def patch(self) -> int:
        return self.vit.patch

    @property
    def codes(self) -> int:
        return self.projector.quantize.embedding.num_embeddings

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """int [B, h, w] of pixels in [0, 1] whose sides are multiples of the patch."""
        weight = self.vit.pos_embed
        return self.projector.codes_of(self.vit(pixels_BCHW.to(weight.device, weight.dtype) * 2 - 1))

    @torch.no_grad()
    def features(self, codes_Bhw: Tensor) -> Tensor:
        """[B, h w, E] in raster order."""
        return self.projector.features_of(codes_Bhw).flatten(2).mT


def read_siglip_tokenizer(vit_file: Path, projector_file: Path, heads: int, dtype: torch.dtype) -> SiglipTokenizer:
    """The tokenizer of two weight files, every parameter present and none left over; MmalignError says what is wrong."""
    parts: list[nn.Module] = []
    for file in (vit_file, projector_file):
        tensors = {name: value for name, value in read_file(file).items() if file != vit_file or not UNUSED.match(name)}
        try:
            with torch.device("meta"):
                shell = SiglipVit(tensors, heads) if file == vit_file else Projector(tensors)
        except (KeyError, ValueError) as error:
            raise MmalignError(f"{file} is no part of a SigLIP-VQ tokenizer: it lacks {error}. Download the folder again.") from error
        expected = set(shell.state_dict())
        check_names(expected - set(tensors), set(tensors) - expected, file)
        check_shapes(tensors, shell, file)
        shell.load_state_dict(tensors, assign=True)
        parts.append(shell.to(dtype))
    return SiglipTokenizer(*parts).eval().requires_grad_(False)  # type: ignore[arg-type]
