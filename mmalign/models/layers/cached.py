"""Cached decoding of a Llama-shaped trunk: one prefill, then one row per sample and step, in preallocated memory.

Suffixes: R rows, P prompt slots, T cache slots, H heads, G query heads per key head, D head size, E model width.
The trunk's own modules do the work (so adapters and new weights count); what differs from its `forward` is the bookkeeping:
keys and values lie in two fixed tensors, the mask is kept instead of rebuilt, rotary tables are made once per step.

No shape here depends on what the rows hold, so the arithmetic of a row depends on that row, on the number of rows and on P and T only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.models.layers.linear import can_pack, fused


@dataclass(frozen=True)
class Prefix:
    """What reading prompts left: keys and values [layers, R, H, P, D], the mask [R, P], hidden states [R, E] at the last slot, and the
    position [R] of the next token."""

    keys: Tensor
    values: Tensor
    mask_RP: Tensor
    hidden_RE: Tensor
    next_R: Tensor

    @staticmethod
    def joined(parts: Sequence[Prefix]) -> Prefix:
        """The rows of several of equal shape, one after the other."""
        along = {"keys": 1, "values": 1, "mask_RP": 0, "hidden_RE": 0, "next_R": 0}
        return (
            parts[0]
            if len(parts) == 1
            else Prefix(**{name: torch.cat([getattr(part, name) for part in parts], d) for name, d in along.items()})
        )


class Cache:
    """Keys and values of R rows in fixed blocks [layers, R, H, T, D] each, the additive mask [R, all slots], where each row continues.

    The first block holds the prompts, the others `block` slots each: a step on the CPU reads only the blocks in use, each of them
    contiguous (one long block, read in part, was three times slower). Elsewhere there is one block, and the fused kernel reads its
    used part. Made once and used again for lane after lane: fresh memory each time would cost as much as a tenth of the arithmetic.
    """

    def __init__(self, prefix: Prefix, rows: int, extra: int, block: int) -> None:
        self._shape = (prefix.keys.shape[0], rows, prefix.keys.shape[2]), prefix.keys.shape[4]
        self._like, self._is_blocked = prefix.keys, prefix.keys.device.type == "cpu"
        slots = prefix.keys.shape[3]
        sizes = [slots, *(min(block, extra - start) for start in range(0, extra, block))] if self._is_blocked else [slots + extra]
        self.keys, self.values = ([self._empty(size) for size in sizes] for _ in range(2))
        self.bias_RT = self._like.new_empty(rows, slots + extra)
        self.used, self.next_R = 0, torch.zeros(rows, dtype=torch.long, device=self._like.device)

    def begin(self, prefix: Prefix, index: Tensor) -> Tensor:
        """Start anew: row r continues the prefix's row index[r] (samples of one prompt share it). Returns their hidden states [R, E]."""
        slots = prefix.mask_RP.shape[1]
        self.keys[0][:, :, :, :slots], self.values[0][:, :, :, :slots] = prefix.keys[:, index], prefix.values[:, index]
        self.bias_RT.fill_(float("-inf"))
        self.bias_RT[:, :slots].masked_fill_(prefix.mask_RP[index], 0.0)
        self.used, self.next_R = slots, prefix.next_R[index]
        return prefix.hidden_RE[index]

    def place(self) -> tuple[int, int]:
        """Block and slot of the next token, which from now on counts as used and seen."""
        slot, block = self.used, 0
        while slot >= self.keys[block].shape[3]:
            slot, block = slot - self.keys[block].shape[3], block + 1
        self.bias_RT[:, self.used] = 0.0
        self.used += 1
        return block, slot

    def widen(self, slots: int) -> None:
        """Add empty slots at the end; contents stay."""
        self.bias_RT = F.pad(self.bias_RT, (0, slots), value=float("-inf"))
        for blocks in (self.keys, self.values):
            if self._is_blocked:
                blocks.append(self._empty(slots))
            else:
                blocks[0] = F.pad(blocks[0], (0, 0, 0, slots))

    @property
    def is_full(self) -> bool:
        return self.used == self.bias_RT.shape[1]

    def _empty(self, slots: int) -> Tensor:
        # Zeros, not what memory holds: a masked slot has weight 0, and 0 times infinity is not a number.
        (layers, rows, heads), size = self._shape
        return self._like.new_zeros(layers, rows, heads, slots, size)


class CachedTrunk:
    """A decoder with Llama's modules (Llama, Qwen2; queries and keys may have norms), ready to decode `rows` rows a step.

    Packed weights are copies: build a new one whenever the weights may have changed.
    """

    def __init__(self, trunk: Any, rows: int) -> None:
        self.trunk, self.config = trunk, trunk.config
        self.head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        pack = can_pack(trunk)
        self.layers = [_Layer(layer, rows, pack) for layer in trunk.layers]

    def prefill(self, embeds_RPE: Tensor, mask_RP: Tensor, layout: tuple[Tensor, Tensor] | None = None) -> Prefix:
        """Read prompts, which are padded on the left.

        Padding is masked out and takes no position, so it cannot change a result. Its own rows attend to themselves only, because a
        softmax over nothing is not a number. Where prompts are not plainly causal, `layout` gives positions [R, P] and who may attend
        to whom [R, P, P].
        """
        if layout is None:
            slots = mask_RP.shape[1]
            causal = torch.ones(slots, slots, dtype=torch.bool, device=mask_RP.device).tril()
            itself = torch.eye(slots, dtype=torch.bool, device=mask_RP.device)
            layout = (mask_RP.long().cumsum(-1) - 1).clamp(min=0), (causal & mask_RP[:, None, :]) | itself
        position_RP, allowed = layout[0], layout[1][:, None]
        tables = self._rotary(embeds_RPE, position_RP)
        hidden, keys, values = embeds_RPE, [], []
        for layer in self.layers:
            query, key, value = layer.project(hidden, tables)
            keys.append(key)
            values.append(value)
            is_grouped = query.shape[1] != key.shape[1]
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=layer.scale, enable_gqa=is_grouped)
            hidden = self.finish(len(keys) - 1, hidden, mixed)
        return Prefix(torch.stack(keys), torch.stack(values), mask_RP, self.norm(hidden[:, -1]), position_RP[:, -1] + 1)

    def step(self, embeds_RE: Tensor, cache: Cache) -> Tensor:
        """Hidden state [R, E] of one more token per row, whose keys and values join the cache."""
        block, slot = cache.place()
        hidden = embeds_RE[:, None]
        tables = self._rotary(hidden, cache.next_R[:, None])
        cache.next_R = cache.next_R + 1
        for index, layer in enumerate(self.layers):
            query, key, value = layer.project(hidden, tables)
            cache.keys[block][index, :, :, slot], cache.values[block][index, :, :, slot] = key[:, :, 0], value[:, :, 0]
            hidden = self.finish(index, hidden, _attend(query, cache, index, layer.scale))
        return self.norm(hidden[:, 0])

    def finish(self, index: int, hidden_RPE: Tensor, mixed_RHPD: Tensor) -> Tensor:
        """What layer `index` makes of the residual stream, given its attention's output."""
        return self.layers[index].finish(hidden_RPE, mixed_RHPD)

    def norm(self, hidden_RE: Tensor) -> Tensor:
        """The last normalisation."""
        return self.trunk.norm(hidden_RE)

    def _rotary(self, like: Tensor, position_RP: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [R, 1, P, D]; the first half of sin is negative, so that a rotation is x cos + (x with halves swapped) sin."""
        cos, sin = self.trunk.rotary_emb(like, position_ids=position_RP)
        left, right = sin.chunk(2, -1)
        return cos[:, None], torch.cat((-left, right), -1)[:, None]


class _Layer:
    """One decoder layer taken apart at its attention."""

    def __init__(self, layer: Any, rows: int, pack: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim, self.scale, self.act = attention.head_dim, attention.scaling, mlp.act_fn
        self.norms: tuple[Any, Any] | None = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
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
        turned, value = joint.transpose(1, 2).split((self.heads[0] + self.heads[1], self.heads[2]), 1)
        if self.norms is not None:
            parts = turned.split(self.heads[:2], 1)
            turned = torch.cat([norm(part) for norm, part in zip(self.norms, parts, strict=True)], 1)
        query, key = _rotate(turned, tables).split(self.heads[:2], 1)
        return query, key, value

    def finish(self, hidden_RPE: Tensor, mixed_RHPD: Tensor) -> Tensor:
        """The residual stream after attention's output and the MLP."""
        shape = hidden_RPE.shape
        hidden = hidden_RPE.flatten(0, 1) + self.out(mixed_RHPD.transpose(1, 2).flatten(2).flatten(0, 1))
        gate, up = self.gate_up(self.norm_mlp(hidden)).chunk(2, -1)
        return (hidden + self.down(self.act(gate) * up)).view(shape)


def _rotate(x_RHPD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding on halves (Llama's convention)."""
    cos, sin = tables
    return torch.addcmul(x_RHPD * cos, x_RHPD.roll(x_RHPD.shape[-1] // 2, -1), sin)


def _attend(query_RH1D: Tensor, cache: Cache, index: int, scale: float) -> Tensor:
    """One query per row and head against the cache, [R, H, 1, D].

    On the CPU, batched products over the blocks in use beat the fused kernel, which is made for many queries.
    """
    rows, heads, _, size = query_RH1D.shape
    key_heads = cache.keys[0].shape[2]
    if query_RH1D.device.type != "cpu":
        keys, values = (blocks[0][index, :, :, : cache.used] for blocks in (cache.keys, cache.values))
        bias = cache.bias_RT[:, None, None, : cache.used]
        return F.scaled_dot_product_attention(query_RH1D, keys, values, attn_mask=bias, scale=scale, enable_gqa=heads != key_heads)
    query = (query_RH1D * scale).reshape(rows * key_heads, heads // key_heads, size)
    scores, seen = [], 0
    for block in cache.keys:
        scores.append(torch.bmm(query, block[index].flatten(0, 1).mT))
        seen += block.shape[3]
        if seen >= cache.used:
            break
    joint = torch.cat(scores, -1).view(rows, heads, seen).add_(cache.bias_RT[:, None, :seen])
    weights = joint.softmax(-1).view(rows * key_heads, -1, seen).split([part.shape[-1] for part in scores], -1)
    mixed = torch.bmm(weights[0], cache.values[0][index].flatten(0, 1))
    for part, block in zip(weights[1:], cache.values[1:], strict=False):
        mixed = torch.baddbmm(mixed, part, block[index].flatten(0, 1))
    return mixed.view(rows, heads, 1, size)
