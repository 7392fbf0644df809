"""A checkpoint's config.json as transformers' Qwen2Config: no size is assumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen2Config

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


def qwen2_config(content: Mapping[str, Any], rope: Mapping[str, Any]) -> Qwen2Config:
    """KeyError names the size that the config lacks."""
    sizes = {name: content[name] for name in SIZES}
    return Qwen2Config(**sizes, hidden_act=content.get("hidden_act", "silu"), rope_parameters=dict(rope), tie_word_embeddings=False)
