"""BAGEL's network under the checkpoint's names: two experts, a vision tower, and the ways between latents and tokens.

Source of the format: ByteDance-Seed/Bagel at 056b5fd (modeling/bagel/bagel.py, modeling_utils.py). What its loader forces is fixed here
too: normalised queries and keys, an untied head, a vision tower one layer shorter than vit_config.json says. Grid sizes come from the
tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config

from mmalign.models.layers.mot import MotTrunk
from mmalign.models.layers.navit import SiglipNavit, TwoLayers

WAVES = 256  # width of the time's cosines and sines
PERIOD = 10000.0


class Grid(nn.Module):
    """Position embeddings of a square grid, looked up by row and column."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.pos_embed = nn.Parameter(torch.empty(side**2, width))

    def forward(self, cells: Tensor) -> Tensor:
        return self.pos_embed[cells]


class TimeEmbedder(nn.Module):
    """Times in [0, 1], as they are, to the trunk's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time_R: Tensor) -> Tensor:
        half = WAVES // 2
        rates = torch.exp(-math.log(PERIOD) / half * torch.arange(half, dtype=torch.float32, device=time_R.device))
        angle = time_R.float()[:, None] * rates
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(next(self.mlp.parameters()).dtype))


class LanguageModel(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.model = MotTrunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class BagelNet(nn.Module):
    """Everything in ema.safetensors. `tensors` give the sides of the grids and the size of a latent token."""

    def __init__(self, config: Qwen2Config, vision: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        width = config.hidden_size
        self.language_model = LanguageModel(config)
        self.vit_model = SiglipNavit(vision, vision["num_hidden_layers"] - 1)
        self.connector = TwoLayers(vision["hidden_size"], width, width)
        self.vit_pos_embed = Grid(math.isqrt(len(tensors["vit_pos_embed.pos_embed"])), width)
        self.latent_pos_embed = Grid(math.isqrt(len(tensors["latent_pos_embed.pos_embed"])), width)
        numbers = tensors["vae2llm.weight"].shape[1]
        self.vae2llm, self.llm2vae = nn.Linear(numbers, width), nn.Linear(width, numbers)
        self.time_embedder = TimeEmbedder(width)

    @property
    def lm_head(self) -> nn.Linear:
        return self.language_model.lm_head

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.model.embed_tokens

    def enable_gradient_checkpointing(self) -> None:
        self.language_model.model.checkpoints = True


def unused(vision: Mapping[str, Any]) -> re.Pattern[str]:
    """The vision tower's last layer, which a checkpoint may have and the model does not run."""
    return re.compile(rf"vit_model\.vision_model\.encoder\.layers\.{vision['num_hidden_layers'] - 1}\.")
