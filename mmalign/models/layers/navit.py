"""SigLIP for pictures of any shape as BAGEL runs it: patches in raster order, learned positions looked up by row and column.

Names are the checkpoint's (ByteDance-Seed/Bagel at 056b5fd, modeling/bagel/siglip_navit.py). The patch embedding is a linear layer over
a patch's numbers in the order row, column, channel. Suffixes: B pictures of one shape, T patches, E width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BTE: Tensor) -> Tensor:
        query, key, value = (
            layer(x_BTE).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class TwoLayers(nn.Module):
    """A linear layer, the tanh form of GELU, a linear layer."""

    def __init__(self, n_in: int, hidden: int, n_out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(n_in, hidden), nn.Linear(hidden, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, eps: float) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.self_attn, self.mlp = Attention(width, heads), TwoLayers(width, hidden, width)

    def forward(self, x_BTE: Tensor) -> Tensor:
        x = x_BTE + self.self_attn(self.layer_norm1(x_BTE))
        return x + self.mlp(self.layer_norm2(x))


class SiglipNavit(nn.Module):
    """Pixels in [-1, 1] to features of patches. `config` has transformers' names of a SigLIP vision tower."""

    def __init__(self, config: Mapping[str, Any], layers: int) -> None:
        super().__init__()
        width, self.patch = config["hidden_size"], config["patch_size"]
        self.side = config["image_size"] // self.patch
        embeddings = {"patch_embedding": nn.Linear(3 * self.patch**2, width), "position_embedding": nn.Embedding(self.side**2, width)}
        eps = config.get("layer_norm_eps", 1e-6)
        blocks = [Layer(width, config["intermediate_size"], config["num_attention_heads"], eps) for _ in range(layers)]
        parts = {
            "embeddings": nn.ModuleDict(embeddings),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(blocks)}),
            "post_layernorm": nn.LayerNorm(width, eps),
        }
        self.vision_model = nn.ModuleDict(parts)

    def cells(self, height: int, width: int) -> Tensor:
        """The number of each patch's position, for a picture of this many pixels."""
        rows, columns = torch.arange(height // self.patch), torch.arange(width // self.patch)
        return (rows[:, None] * self.side + columns).flatten()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, T, E]."""
        embeddings: Any = self.vision_model["embeddings"]
        cells = self.cells(*x_BCHW.shape[-2:]).to(x_BCHW.device)
        patches = rearrange(x_BCHW, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        x = embeddings["patch_embedding"](patches) + embeddings["position_embedding"](cells)
        encoder: Any = self.vision_model["encoder"]
        for layer in encoder["layers"]:
            x = layer(x)
        return self.vision_model["post_layernorm"](x)
