"""Writes image codes one by one: batched guidance in one forward, a cache of fixed shape, one stream of noise per sample.

Suffixes: B samples, N image tokens, V image codes, E model width, R rows of a forward ([conditional; unconditional] when guided).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.models.layers.cached import Cache, CachedTrunk, Prefix
from mmalign.models.layers.lanes import lanes
from mmalign.models.layers.linear import can_pack
from mmalign.models.layers.noise import draw
from mmalign.trajectory import Policy, Prompts

QUARTERS = 4  # blocks of a picture's cache: a step reads the quarters that are begun


class CodeWriter:
    """Writes image codes in lanes of one number of rows, with the weights as they are now. A family adds its head and its input."""

    def __init__(self, model: Any, trunk: CachedTrunk, is_guided: bool) -> None:
        self.model, self.trunk, self.is_guided = model, trunk, is_guided
        self.is_small = can_pack(model.trunk)

    def logits(self, hidden_RE: Tensor) -> Tensor:
        """[R, V] float32 logits of the next code."""
        raise NotImplementedError

    def embed(self, code_R: Tensor) -> Tensor:
        """[R, E] what the trunk reads of codes."""
        raise NotImplementedError

    @torch.inference_mode()
    def write(self, prompts: Prompts, slots: int, policy: Policy, noise_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and log-probs [B, N] of one lane; rows of a guided forward are [conditional; unconditional]."""
        number = noise_BN.shape[1]
        prefix, index_R = self._read(prompts, slots)
        cache = self._cache(prefix, len(index_R), number)
        hidden = cache.begin(prefix, index_R)
        codes, log_probs = [], []
        for position in range(number):
            logits = self.logits(hidden)
            if self.is_guided:
                logits = guide(logits, policy.guidance)
            log_prob_BV = self.model.log_probs(logits, policy)
            code_B = draw(log_prob_BV, noise_BN[:, position])
            codes.append(code_B)
            log_probs.append(log_prob_BV.gather(-1, code_B[:, None])[:, 0])
            if position + 1 < number:
                embeds = self.embed(code_B)
                hidden = self.trunk.step(embeds.repeat(2, 1) if self.is_guided else embeds, cache)
        return torch.stack(codes, 1), torch.stack(log_probs, 1)

    def _cache(self, prefix: Prefix, rows: int, number: int) -> Cache:
        """A cache for so many rows and codes: the last one if it is of the same shape."""
        key = (rows, number, *prefix.keys.shape[2:], prefix.keys.dtype)
        cache = self.model.kept.get(key) or Cache(prefix, rows, number - 1, block=-(-number // QUARTERS))
        self.model.kept = {key: cache} if self.is_small else {}
        return cache

    def _read(self, prompts: Prompts, slots: int) -> tuple[Prefix, Tensor]:
        """The prefix of every distinct prompt, and which of them each row continues: samples of one prompt share its reading, and so do
        all blanked prompts of one length."""
        pairs = [(prompts.ids, prompts.mask)] + ([(prompts.uncond_ids, prompts.uncond_mask)] if self.is_guided else [])
        pad = self.model.chat.pad
        ids = torch.cat([to_slots(ids, slots, pad) for ids, _ in pairs])
        mask = torch.cat([to_slots(mask, slots, False) for _, mask in pairs])
        ids = torch.where(mask, ids, pad)
        distinct, index_R = torch.unique(torch.cat([ids, mask.long()], 1), dim=0, return_inverse=True)
        parts = []
        for lane in lanes([0] * len(distinct), self.model.width):
            rows = distinct[lane.rows]
            parts.append(self.model.prefill(self.trunk, rows[:, :slots], rows[:, slots:].bool(), [None] * len(rows)))
        return Prefix.joined(parts), index_R


def guide(logits_RV: Tensor, guidance: float) -> Tensor:
    """u + w (c - u) of rows [conditional; unconditional]."""
    cond, uncond = logits_RV.chunk(2)
    return uncond + guidance * (cond - uncond)


def to_slots(tensor_BL: Tensor, slots: int, value: int | bool) -> Tensor:
    """The last `slots` columns of a left-padded tensor, with more padding in front when it has fewer."""
    return F.pad(tensor_BL, (slots - tensor_BL.shape[1], 0), value=value)
