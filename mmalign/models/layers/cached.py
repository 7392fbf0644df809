"""Cached decoding of a Llama-shaped trunk: one prefill, then one row per sample and step, in preallocated memory.

Suffixes: R rows, P prompt slots, T cache slots, H heads, G query heads per key head, D head size, E model width.
The trunk's own modules do the work (so adapters and new weights count); what differs from its `forward` is the bookkeeping:
keys and values lie in two fixed tensors, the mask is kept instead of rebuilt, rotary tables are made once per step.

No shape here depends on what the rows hold, so the arithmetic of a row depends on that row, on the number of rows and on P and T only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.models.layers.linear import can_pack, fused


class Cache:
    """Keys and values of R rows: two tensors [layers, R, H, T, D], the additive mask [R, T], the position each row continues at."""

    def __init__(self, keys: Tensor, values: Tensor, bias_RT: Tensor, next_R: Tensor, used: int) -> None:
        self.keys, self.values, self.bias_RT, self.next_R, self.used = keys, values, bias_RT, next_R, used

    def rows(self, index: Tensor) -> Cache:
        """The cache of these rows, in this order; rows may repeat (samples of one prompt share its prefill)."""
        return Cache(self.keys[:, index], self.values[:, index], self.bias_RT[index], self.next_R[index], self.used)

    @staticmethod
    def joined(caches: Sequence[Cache]) -> Cache:
        """One cache of all rows of caches of equal shape."""
        keys, values = (torch.cat([getattr(cache, name) for cache in caches], 1) for name in ("keys", "values"))
        bias_RT, next_R = torch.cat([cache.bias_RT for cache in caches]), torch.cat([cache.next_R for cache in caches])
        return Cache(keys, values, bias_RT, next_R, caches[0].used)

    def widen(self, slots: int) -> None:
        """Add empty slots at the end; contents stay."""
        self.keys = F.pad(self.keys, (0, 0, 0, slots))
        self.values = F.pad(self.values, (0, 0, 0, slots))
        self.bias_RT = F.pad(self.bias_RT, (0, slots), value=float("-inf"))

    @property
    def is_full(self) -> bool:
        return self.used == self.bias_RT.shape[1]


class CachedTrunk:
    """A decoder of `transformers` with Llama's modules (Llama, Qwen2 without biases or with), ready to decode `rows` rows a step.

    Packed weights are copies: build a new one whenever the weights may have changed.
    """

    def __init__(self, trunk: Any, rows: int) -> None:
        self.trunk, self.config = trunk, trunk.config
        self.head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        pack = can_pack(trunk)
        self.layers = [_Layer(layer, rows, pack) for layer in trunk.layers]

    def prefill(self, embeds_RPE: Tensor, mask_RP: Tensor, extra: int) -> tuple[Tensor, Cache]:
        """Hidden state [R, E] at the last slot and a cache with room for `extra` more tokens. Prompts are padded on the left.

        Padding is masked out and takes no position, so it cannot change a result. Its own rows attend to themselves only, because a
        softmax over nothing is not a number.
        """
        rows, slots = mask_RP.shape
        heads, layers = self.config.num_key_value_heads, len(self.layers)
        keys = embeds_RPE.new_zeros(layers, rows, heads, slots + extra, self.head_dim)
        values = torch.zeros_like(keys)
        position_RP = (mask_RP.long().cumsum(-1) - 1).clamp(min=0)
        tables = self._rotary(embeds_RPE, position_RP)
        causal = torch.ones(slots, slots, dtype=torch.bool, device=mask_RP.device).tril()
        itself = torch.eye(slots, dtype=torch.bool, device=mask_RP.device)
        allowed = ((causal & mask_RP[:, None, :]) | itself)[:, None]
        hidden = embeds_RPE
        for index, layer in enumerate(self.layers):
            query, key, value = layer.project(hidden, tables)
            keys[index, :, :, :slots], values[index, :, :, :slots] = key, value
            mixed = F.scaled_dot_product_attention(
                query, key, value, attn_mask=allowed, scale=layer.scale, enable_gqa=query.shape[1] != heads
            )
            hidden = layer.finish(hidden, mixed)
        bias_RT = torch.full((rows, slots + extra), float("-inf"), dtype=hidden.dtype, device=hidden.device)
        bias_RT[:, :slots].masked_fill_(mask_RP, 0.0)
        return self.trunk.norm(hidden[:, -1]), Cache(keys, values, bias_RT, mask_RP.sum(-1), slots)

    def step(self, embeds_RE: Tensor, cache: Cache) -> Tensor:
        """Hidden state [R, E] of one more token per row, whose keys and values join the cache."""
        slot, cache.used = cache.used, cache.used + 1
        cache.bias_RT[:, slot] = 0.0
        hidden = embeds_RE[:, None]
        tables = self._rotary(hidden, cache.next_R[:, None])
        cache.next_R = cache.next_R + 1
        for index, layer in enumerate(self.layers):
            query, key, value = layer.project(hidden, tables)
            cache.keys[index, :, :, slot], cache.values[index, :, :, slot] = key[:, :, 0], value[:, :, 0]
            hidden = layer.finish(hidden, _attend(query, cache, index, layer.scale))
        return self.trunk.norm(hidden[:, 0])

    def _rotary(self, like: Tensor, position_RP: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [R, 1, P, D/2]; the trunk's tables repeat themselves in the second half."""
        cos, sin = self.trunk.rotary_emb(like, position_ids=position_RP)
        half = self.head_dim // 2
        return cos[:, None, :, :half], sin[:, None, :, :half]


class _Layer:
    """One decoder layer taken apart at its attention."""

    def __init__(self, layer: Any, rows: int, pack: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim, self.scale, self.act = attention.head_dim, attention.scaling, mlp.act_fn
        self.norm_in, self.norm_mlp = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = fused([attention.q_proj, attention.k_proj, attention.v_proj], rows, pack)
        self.out = fused([attention.o_proj], rows, pack)
        self.gate_up = fused([mlp.gate_proj, mlp.up_proj], rows, pack)
        self.down = fused([mlp.down_proj], rows, pack)
        config = attention.config
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)

    def project(self, hidden_RPE: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys and plain values, each [R, heads, P, D]."""
        rows, slots = hidden_RPE.shape[:2]
        joint = self.qkv(self.norm_in(hidden_RPE).flatten(0, 1)).view(rows, slots, sum(self.heads), self.head_dim)
        query, key, value = joint.transpose(1, 2).split(self.heads, 1)
        return _rotate(query, tables), _rotate(key, tables), value

    def finish(self, hidden_RPE: Tensor, mixed_RHPD: Tensor) -> Tensor:
        """The residual stream after attention's output and the MLP."""
        shape = hidden_RPE.shape
        hidden = hidden_RPE.flatten(0, 1) + self.out(mixed_RHPD.transpose(1, 2).flatten(2).flatten(0, 1))
        gate, up = self.gate_up(self.norm_mlp(hidden)).chunk(2, -1)
        return (hidden + self.down(self.act(gate) * up)).view(shape)


def _rotate(x_RHPD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding on halves (Llama's convention)."""
    (left, right), (cos, sin) = x_RHPD.chunk(2, -1), tables
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def _attend(query_RH1D: Tensor, cache: Cache, index: int, scale: float) -> Tensor:
    """One query per row and head against the whole cache, [R, H, 1, D].

    On the CPU two batched products over the contiguous cache beat the fused kernel, which is made for many queries; elsewhere the
    fused kernel reads only the slots in use.
    """
    keys_RHTD, values_RHTD = cache.keys[index], cache.values[index]
    rows, heads, _, size = query_RH1D.shape
    key_heads = keys_RHTD.shape[1]
    bias = cache.bias_RT[:, None, None]
    if query_RH1D.device.type != "cpu":
        used = cache.used
        return F.scaled_dot_product_attention(
            query_RH1D,
            keys_RHTD[:, :, :used],
            values_RHTD[:, :, :used],
            attn_mask=bias[..., :used],
            scale=scale,
            enable_gqa=heads != key_heads,
        )
    query_RHGD = (query_RH1D * scale).reshape(rows, key_heads, heads // key_heads, size)
    weights_RHGT = (query_RHGD @ keys_RHTD.mT + bias).softmax(-1)
    return (weights_RHGT @ values_RHTD).reshape(rows, heads, 1, size)
