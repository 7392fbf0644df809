"""A mixture of two transformers (BAGEL): Qwen2 layers with normalised queries and keys, whose every weight exists twice.

Text and understood pictures go through the understanding expert, noisy latents through the generation expert (`_moe_gen`); attention
mixes both. Names are the checkpoint's (ByteDance-Seed/Bagel at 056b5fd, modeling/bagel/qwen2_navit.py). Tokens of the two experts stand
apart in a row, understanding first, so that each weight is applied to its own tokens alone.

Suffixes: R rows, U tokens of the understanding expert, N of the generation expert, T = U + N, H heads, D head size, E width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, Qwen2RotaryEmbedding, apply_rotary_pos_emb

GEN = "_moe_gen"


class MotAttention(nn.Module):
    """Grouped attention over the tokens of both experts."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        width, self.head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        shared = config.num_key_value_heads or config.num_attention_heads
        outputs = {"q": config.num_attention_heads, "k": shared, "v": shared}
        for twin in ("", GEN):
            for name, heads in outputs.items():
                setattr(self, f"{name}_proj{twin}", nn.Linear(width, heads * self.head_dim))
            setattr(self, f"o_proj{twin}", nn.Linear(width, width, bias=False))
            for name in "qk":
                setattr(self, f"{name}_norm{twin}", Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps))

    def project(self, x_RTE: Tensor, twin: str) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries and keys and plain values of one expert's tokens, each [R, H, T, D]."""
        q, k, v = (getattr(self, f"{name}_proj{twin}")(x_RTE).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for name in "qkv")
        return getattr(self, f"q_norm{twin}")(q), getattr(self, f"k_norm{twin}")(k), v


class MotLayer(nn.Module):
    """One layer of both experts."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.self_attn = MotAttention(config)
        for twin in ("", GEN):
            setattr(self, f"mlp{twin}", Qwen2MLP(config))
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(self, name + twin, Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps))

    def forward(self, und_RUE: Tensor, gen_RNE: Tensor | None, tables: tuple[Tensor, Tensor], allowed: Tensor) -> tuple[Tensor, Any]:
        attention = self.self_attn
        parts = [(und_RUE, "")] + ([] if gen_RNE is None else [(gen_RNE, GEN)])
        projected = [attention.project(getattr(self, f"input_layernorm{twin}")(x), twin) for x, twin in parts]
        query, key, value = (torch.cat(tensors, 2) for tensors in zip(*projected, strict=True))
        query, key = apply_rotary_pos_emb(query, key, *tables)
        is_grouped = query.shape[1] != key.shape[1]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=attention.scaling, enable_gqa=is_grouped)
        mixed_RTE, start, made = mixed.transpose(1, 2).flatten(2), 0, []
        for x, twin in parts:
            x = x + getattr(attention, f"o_proj{twin}")(mixed_RTE[:, start : start + x.shape[1]])
            start += x.shape[1]
            made.append(x + getattr(self, f"mlp{twin}")(getattr(self, f"post_attention_layernorm{twin}")(x)))
        return made[0], made[1] if len(made) > 1 else None


class MotTrunk(nn.Module):
    """Embeddings of both experts' tokens to last hidden states. For text alone it is a Llama-shaped trunk (`layers.cached`)."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config, self.checkpoints = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MotLayer(config) for _ in range(config.num_hidden_layers))
        self.norm, self.norm_moe_gen = (Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(2))
        self.rotary_emb = Qwen2RotaryEmbedding(config)

    def forward(self, und_RUE: Tensor, gen_RNE: Tensor | None, position_RT: Tensor, allowed_RTT: Tensor) -> tuple[Tensor, Tensor | None]:
        tables = self.rotary_emb(und_RUE, position_RT)
        for layer in self.layers:
            run: Callable[..., Any] = layer
            if self.checkpoints and torch.is_grad_enabled():
                und_RUE, gen_RNE = checkpoint(run, und_RUE, gen_RNE, tables, allowed_RTT[:, None], use_reentrant=False)
            else:
                und_RUE, gen_RNE = run(und_RUE, gen_RNE, tables, allowed_RTT[:, None])
        return self.norm(und_RUE), None if gen_RNE is None else self.norm_moe_gen(gen_RNE)


def block_layout(is_block_RT: Tensor, mask_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [R, T] and who may attend to whom [R, T, T] for text with one picture's block in it.

    Text is causal and takes a position per token; a block attends to all of itself and to what came before, and takes one position.
    Padding takes none and is seen by itself alone, because a softmax over nothing is not a number.
    """
    starts = is_block_RT & ~F.pad(is_block_RT, (1, 0))[:, :-1]
    position_RT = (((~is_block_RT | starts) & mask_RT).long().cumsum(-1) - 1).clamp(min=0)
    slots = mask_RT.shape[1]
    causal = torch.ones(slots, slots, dtype=torch.bool, device=mask_RT.device).tril()
    itself = torch.eye(slots, dtype=torch.bool, device=mask_RT.device)
    within = is_block_RT[:, :, None] & is_block_RT[:, None, :]
    return position_RT, ((causal | within) & mask_RT[:, None, :]) | itself
