"""Writes Janus' image codes: batched guidance in one forward, a cache of fixed shape, one stream of noise per sample.

Suffixes: B samples, N image tokens, V image codes, E model width, R rows of a forward ([conditional; unconditional] when guided).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.models.layers.cached import Cache, CachedTrunk, Prefix
from mmalign.models.layers.lanes import lanes
from mmalign.models.layers.linear import can_pack, fused
from mmalign.models.layers.noise import draw
from mmalign.trajectory import Policy, Prompts

if TYPE_CHECKING:
    from mmalign.models._janus import Janus

QUARTERS = 4  # blocks of a picture's cache: a step reads the quarters that are begun


class CodeWriter:
    """Writes image codes in lanes of one number of rows, with the weights as they are now."""

    def __init__(self, janus: Janus, n_samples: int, is_guided: bool) -> None:
        self.janus, self.n_samples, self.is_guided = janus, n_samples, is_guided
        rows = n_samples * (2 if is_guided else 1)
        self.trunk = CachedTrunk(janus.trunk, rows)
        head, aligner = janus.net.model.generation_head, janus.net.model.generation_aligner
        pack = can_pack(janus.trunk)
        self.head = (fused([head.proj_out], rows, pack), head.activation_fn, fused([head.vision_head], rows, pack))
        self.aligner = [fused([layer], rows, pack) for layer in (aligner.fc1, *aligner.hidden_layers)]
        self.act, self.table = aligner.activation_fn, janus.net.model.generation_embeddings
        self.is_small = pack

    @torch.inference_mode()
    def write(self, prompts: Prompts, slots: int, policy: Policy, noise_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and log-probs [B, N] of one lane; rows of a guided forward are [conditional; unconditional]."""
        number = noise_BN.shape[1]
        prefix, index_R = self._read(prompts, slots)
        cache = self._cache(prefix, len(index_R), number)
        hidden = cache.begin(prefix, index_R)
        codes, log_probs = [], []
        for position in range(number):
            logits = self._logits(hidden)
            if self.is_guided:
                logits = guide(logits, policy.guidance)
            log_prob_BV = (logits / policy.temperature).log_softmax(-1)
            code_B = draw(log_prob_BV, noise_BN[:, position])
            codes.append(code_B)
            log_probs.append(log_prob_BV.gather(-1, code_B[:, None])[:, 0])
            if position + 1 < number:
                embeds = self._embed(code_B)
                hidden = self.trunk.step(embeds.repeat(2, 1) if self.is_guided else embeds, cache)
        return torch.stack(codes, 1), torch.stack(log_probs, 1)

    def _cache(self, prefix: Prefix, rows: int, number: int) -> Cache:
        """A cache for so many rows and codes: the last one if it is of the same shape."""
        key = (rows, number, *prefix.keys.shape[2:], prefix.keys.dtype)
        cache = self.janus.kept.get(key) or Cache(prefix, rows, number - 1, block=-(-number // QUARTERS))
        self.janus.kept = {key: cache} if self.is_small else {}
        return cache

    def _read(self, prompts: Prompts, slots: int) -> tuple[Prefix, Tensor]:
        """The prefix of every distinct prompt, and which of them each row continues: samples of one prompt share its reading, and so do
        all blanked prompts of one length."""
        pairs = [(prompts.ids, prompts.mask)] + ([(prompts.uncond_ids, prompts.uncond_mask)] if self.is_guided else [])
        ids = torch.cat([_to_slots(ids, slots, self.janus.chat.pad) for ids, _ in pairs])
        mask = torch.cat([_to_slots(mask, slots, False) for _, mask in pairs])
        ids = torch.where(mask, ids, self.janus.chat.pad)
        distinct, index_R = torch.unique(torch.cat([ids, mask.long()], 1), dim=0, return_inverse=True)
        parts = []
        for lane in lanes([0] * len(distinct), self.janus.width):
            rows = distinct[lane.rows]
            parts.append(self.trunk.prefill(self.janus.net.get_input_embeddings()(rows[:, :slots]), rows[:, slots:].bool()))
        return Prefix.joined(parts), index_R

    def _logits(self, hidden_RE: Tensor) -> Tensor:
        first, act, last = self.head
        return last(act(first(hidden_RE))).float()

    def _embed(self, code_R: Tensor) -> Tensor:
        x = self.aligner[0](self.table(code_R))
        for layer in self.aligner[1:]:
            x = layer(self.act(x))
        return x


def guide(logits_RV: Tensor, guidance: float) -> Tensor:
    """u + w (c - u) of rows [conditional; unconditional]."""
    cond, uncond = logits_RV.chunk(2)
    return uncond + guidance * (cond - uncond)


def _to_slots(tensor_BL: Tensor, slots: int, value: int | bool) -> Tensor:
    """The last `slots` columns of a left-padded tensor, with more padding in front when it has fewer."""
    return F.pad(tensor_BL, (slots - tensor_BL.shape[1], 0), value=value)
