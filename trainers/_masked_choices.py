"""Which image tokens of a masked model enter an update, in what context, with how much credit: pure functions on ranks and random numbers.

Sources: HT-GRPO (arXiv 2605.16842) eq. 7, 8, 10, 15, 16, 29; MaskGRPO (martian422/MaskGRPO b74ba3c, grpo/mask_grpo_trainer.py);
TraceRL (Gen-Verse/dLLM-RL 10b4fd1, train/rl_mmada.py); UniGRPO as MMaDA (arXiv 2505.15809) describes it.

Legend: B samples, N image tokens. Ranks run from 1, the first token decided, to N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Stage = Literal["global", "structure", "refinement"]
Mode = Literal["down", "up", "constant", "cosine"]
Subset = Literal["bernoulli", "fixed"]
STAGES: tuple[Stage, ...] = ("global", "structure", "refinement")
FULLEST = 0.999  # the greatest share that MaskGRPO masks anew
SEEDS = 2**12  # of the masks, in the official code


@dataclass(frozen=True)
class Update:
    """One optimiser step. `scored` says for each context (a key of `Plan.contexts`) which tokens [B, N] are decisions in it."""

    stage: str
    scored: Mapping[str, Tensor]

    @property
    def tokens(self) -> Tensor:
        """bool [B, N]: the decisions of this update, in whatever context."""
        return torch.stack(list(self.scored.values())).any(0)


@dataclass(frozen=True)
class Plan:
    """The updates on one rollout. `contexts` are the hidden tokens [B, N] of every state in which something is scored; None: all of them,
    a state that the samples of a prompt share."""

    contexts: Mapping[str, Tensor | None]
    updates: Sequence[Update]


def ranks(step_of_BN: Tensor) -> Tensor:
    """int [B, N] when each token was decided; tokens of one step follow each other in raster order."""
    return step_of_BN.argsort(dim=1, stable=True).argsort(dim=1) + 1


def permuted(rank_BN: Tensor, uniform_BN: Tensor) -> Tensor:
    """The control: as many tokens of every rank, at random places."""
    return rank_BN.gather(1, uniform_BN.argsort(1).to(rank_BN.device))


def structure(rank_BN: Tensor, share: float) -> Tensor:
    """bool [B, N]: the floor(share * N) tokens decided first (eq. 7)."""
    return rank_BN <= math.floor(share * rank_BN.shape[1])


def credit(is_structure_BN: Tensor, on_structure: float, on_refinement: float, has_unit_mean: bool) -> Tensor:
    """[B, N] float32 factors of the advantage (eq. 10); with `has_unit_mean` divided by their mean over each image, so that nothing but
    the share between the two kinds changes."""
    weight_BN = torch.where(is_structure_BN, float(on_structure), float(on_refinement))
    return weight_BN / weight_BN.mean(1, keepdim=True) if has_unit_mean else weight_BN


def rate(mode: Mode, number: int, updates: int, greatest: float, least: float) -> float:
    """The share of a stage's tokens in its update `number` of `updates` (eq. 29): least + (greatest - least) phi(p).

    phi is 1 - p (down), p (up), 1 (constant), (1 + cos(pi p)) / 2 (cosine). The paper prints the first; its figures name the other two
    straight ones, and the body of its table is not public.
    """
    p = number / max(1, updates - 1)
    shape = {"down": 1 - p, "up": p, "constant": 1.0, "cosine": (1 + math.cos(math.pi * p)) / 2}[mode]
    return least + (greatest - least) * shape


def subset(uniform_BN: Tensor, among_BN: Tensor, share: float, form: Subset) -> Tensor:
    """bool [B, N]: a random part of the tokens in `among`, each with this probability, or round(share * their number) of them."""
    if form == "bernoulli":
        return among_BN & (uniform_BN < share)
    order_BN = uniform_BN.masked_fill(~among_BN, math.inf).argsort(1).argsort(1)
    return among_BN & (order_BN < (share * among_BN.sum(1, keepdim=True)).round())


def progressive(number: int, updates: int, least: float) -> float:
    """MaskGRPO's share of tokens that update `number` (from 0) masks anew: least + (1 - least) (number + 1) / updates, 0.999 at most."""
    return min(least + (1 - least) * (number + 1) / updates, FULLEST)


def spaced(number: int, updates: int, start: float) -> float:
    """UniGRPO's share: `updates` evenly spaced ones whose first lies at random in the first interval (`start` in [0, 1))."""
    return min((number + start) / updates, FULLEST)


def upstream_masks(seed: int, rows: int, row_length: int, tokens: int, share: float) -> Tensor:
    """bool [rows, tokens]: the tokens that MaskGRPO masks anew with one of its seeds, on a CPU, for rows that end with the image and one
    more token. It seeds the global generator for every log-probability; here the same numbers come from a generator of their own."""
    numbers = torch.rand((rows, row_length), generator=torch.Generator().manual_seed(seed))
    return numbers[:, -(tokens + 1) : -1] < share


def trace_groups(step_of_BN: Tensor, shrink: int) -> Tensor:
    """int [B, N]: which of its trajectory's states a token is scored in. `shrink` neighbouring steps that decided something share one, the
    state before the first of them (TraceRL)."""
    decided_BK = torch.zeros(len(step_of_BN), int(step_of_BN.max()) + 1, dtype=torch.long, device=step_of_BN.device)
    place_BK = decided_BK.scatter(1, step_of_BN, 1).cumsum(1) - 1
    return place_BK.gather(1, step_of_BN) // shrink


def uniforms(seeds: Sequence[int], tokens: int) -> Tensor:
    """[len(seeds), tokens] float64 in [0, 1): one stream per sample, so that a subset does not depend on the batch or on processes."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=seed)).random(tokens) for seed in seeds]))
