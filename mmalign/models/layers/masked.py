"""Masked decoding of image codes (MaskGIT, arXiv 2202.04200): all hidden at first, the surest of what is drawn kept at every step.

Suffixes: B samples, N image tokens, K slots of a step (its hidden tokens), V codes. `HIDDEN` stands for a token that is not decided.
Two forms are in use. Show-o and MMaDA (showlab/Show-o at 45a5a2d, Gen-Verse/MMaDA at 3cdb870) let the noise of the order fade, and
each step's factor multiplies those before it; they also never decide the last token before the last step. Lumina-DiMOO
(Alpha-VLLM/Lumina-DiMOO at 81344e6) keeps the noise constant. In both everything is decided after the last step.
Changed: logits are made for hidden tokens only, and noise comes from one stream per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.models.layers.noise import draw, uniforms

HIDDEN = -1
FLOOR = math.log(1e-20)  # least log-probability that the order looks at, as in the originals


@dataclass(frozen=True)
class Plan:
    """Per step: tokens that stay hidden after it, slots it has to draw (the tokens hidden before it), noise of the order."""

    hidden: tuple[int, ...]
    slots: tuple[int, ...]
    noise: tuple[float, ...]
    holds_last: bool

    def __len__(self) -> int:
        return len(self.hidden)


def make_plan(tokens: int, schedule: Sequence[float], noise: float, fades: bool, holds_last: bool) -> Plan:
    """The plan for N tokens. `schedule`: the share hidden after each step; `fades`: the noise does, compounding, else it is constant."""
    hidden, slots, levels = [], [tokens], []
    for step, share in enumerate(schedule):
        wanted = max(1, int(np.floor(np.float32(tokens) * np.float32(share))))  # float32, as the originals
        wanted = max(min(wanted, slots[-1] - 1), int(holds_last))
        hidden.append(0 if step == len(schedule) - 1 else wanted)
        slots.append(hidden[-1])
        noise = noise * (1 - (step + 1) / len(schedule)) if fades else noise
        levels.append(noise)
    return Plan(tuple(hidden), tuple(slots[:-1]), tuple(levels), holds_last)


def cosine(steps: int) -> tuple[float, ...]:
    """The share hidden after each of so many steps, cos(pi / 2 * step / steps), rounded like the originals (a floor follows)."""
    angles = (torch.tensor((step + 1) / steps) * math.pi * 0.5 for step in range(steps))
    return tuple(float(torch.cos(angle)) for angle in angles)


class Noise(Protocol):
    """Where the random numbers of a sampler come from."""

    def codes(self, log_prob_BKV: Tensor, step: int, slots_BK: Tensor, is_hidden_BK: Tensor) -> Tensor:
        """[B, K] drawn codes; those of slots that are not hidden are ignored."""
        ...

    def gumbel(self, step: int, slots_BK: Tensor) -> Tensor:
        """[B, K] standard Gumbel numbers for the order."""
        ...

    def order(self) -> Tensor:
        """[B, N] uniform numbers for an order that chance alone decides."""
        ...


class Streams:
    """One stream per sample: a code's number and its order's number belong to the seed, the step and the token's place."""

    def __init__(self, seeds: Sequence[int], steps: int, tokens: int, device: torch.device) -> None:
        self._numbers = uniforms(seeds, steps * tokens * 2).view(len(seeds), steps, tokens, 2).to(device)

    def codes(self, log_prob_BKV: Tensor, step: int, slots_BK: Tensor, is_hidden_BK: Tensor) -> Tensor:
        return draw(log_prob_BKV.flatten(0, 1), self._at(step, slots_BK, 0).flatten()).view(slots_BK.shape)

    def gumbel(self, step: int, slots_BK: Tensor) -> Tensor:
        number = self._at(step, slots_BK, 1).clamp_min(torch.finfo(torch.float64).tiny)
        return -(-number.log()).log().float()

    def order(self) -> Tensor:
        return self._numbers[:, 0, :, 1]

    def _at(self, step: int, slots_BK: Tensor, which: int) -> Tensor:
        return self._numbers[:, step, :, which].gather(1, slots_BK)


@dataclass(frozen=True)
class Decoded:
    """Codes [B, N], the step that decided each (int [B, N]) and its log-probability then, float32 [B, N]."""

    codes: Tensor
    step_of: Tensor
    log_prob: Tensor


LogitsAt = Callable[[Tensor, Tensor], Tensor]


def decode(logits_at: LogitsAt, samples: int, plan: Plan, noise: Noise, temperature: float, device: torch.device) -> Decoded:
    """Fill B samples. `logits_at(codes [B, N] with HIDDEN, slots [B, K])` gives guided float32 logits [B, K, V] of those slots.

    A sample depends on its own logits and noise alone, and every shape on the plan alone.
    """
    shape = (samples, plan.slots[0])
    codes = torch.full(shape, HIDDEN, device=device)
    step_of, log_prob_BN = torch.zeros_like(codes), torch.zeros(shape, device=device)
    for step in range(len(plan)):
        if not plan.slots[step]:
            break
        slots = first_slots(codes == HIDDEN, plan.slots[step])
        is_hidden = codes.gather(1, slots) == HIDDEN
        logits = logits_at(codes, slots)
        log_prob = (logits / temperature).log_softmax(-1)
        drawn = noise.codes(log_prob, step, slots, is_hidden)
        log_prob = log_prob.gather(-1, drawn[..., None])[..., 0]
        sureness = log_prob if temperature == 1 else logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        score = (sureness.clamp_min(FLOOR) + plan.noise[step] * noise.gumbel(step, slots)).masked_fill(~is_hidden, float("inf"))
        least = int(plan.holds_last and plan.hidden[step] > 0)
        n_hidden = (is_hidden.sum(1, keepdim=True) - 1).clamp(max=plan.hidden[step]).clamp(min=least)
        # A place past the last slot is the infinite one: with a single token left and one to hide, nothing is decided.
        cut = F.pad(score, (0, 1), value=float("inf")).sort(1).values.gather(1, n_hidden)
        decided = is_hidden & (score >= cut)
        codes = codes.scatter(1, slots, torch.where(decided, drawn, codes.gather(1, slots)))
        step_of = step_of.scatter(1, slots, torch.where(decided, step, step_of.gather(1, slots)))
        log_prob_BN = log_prob_BN.scatter(1, slots, torch.where(decided, log_prob, log_prob_BN.gather(1, slots)))
    return Decoded(codes, step_of, log_prob_BN)


def emerge(logits_at: LogitsAt, schedule: Sequence[float], noise: Noise, temperature: float, is_fixed: bool) -> Decoded:
    """Fill samples in a random order (MaskGRPO's emerge sampler, martian422/MaskGRPO at b74ba3c): a token that is hidden at a share k_t
    stays so at the next k_s with probability k_s / k_t, on its own, so the tokens of a step are a binomial number.

    Its step follows from one number of its own, drawn beforehand, so logits are made for the tokens of each step alone; with `is_fixed`
    for all tokens, so that shapes do not depend on other samples.
    """
    number_BN = noise.order()
    step_of = (number_BN[..., None] >= 1 - torch.tensor(schedule, dtype=torch.float64, device=number_BN.device)).sum(-1)
    step_of = step_of.clamp(max=len(schedule) - 1)  # the last share of a cosine is zero up to rounding
    codes, log_prob_BN = torch.full_like(step_of, HIDDEN), torch.zeros(step_of.shape, device=step_of.device)
    for step in range(len(schedule)):
        now_BN = step_of == step
        slots = first_slots(now_BN, step_of.shape[1] if is_fixed else int(now_BN.sum(1).max()))
        is_now = now_BN.gather(1, slots)
        log_prob = (logits_at(codes, slots) / temperature).log_softmax(-1)
        drawn = noise.codes(log_prob, step, slots, is_now)
        picked = log_prob.gather(-1, drawn[..., None])[..., 0]
        codes = codes.scatter(1, slots, torch.where(is_now, drawn, codes.gather(1, slots)))
        log_prob_BN = log_prob_BN.scatter(1, slots, torch.where(is_now, picked, log_prob_BN.gather(1, slots)))
    return Decoded(codes, step_of, log_prob_BN)


def first_slots(wanted_BN: Tensor, count: int) -> Tensor:
    """[B, count] places of the True entries in order; a row with fewer is filled up with its other places."""
    return wanted_BN.logical_not().byte().argsort(dim=1, stable=True)[:, :count]


def random_masks(uniform_BN: Tensor, tokens: int) -> Tensor:
    """bool [B, N] hidden tokens for training: cos(pi / 2 * u) of them, rounded, one at least, at random places.

    `uniform_BN` has N + 1 numbers per sample: the first decides how many, the others where (Show-o, training/utils.py).
    """
    rank_BN = uniform_BN[:, 1:].argsort(1).argsort(1)
    return rank_BN < random_number(uniform_BN[:, 0], tokens)[:, None]


def random_number(uniform_B: Tensor, tokens: int) -> Tensor:
    """int [B] how many of N tokens `random_masks` hides."""
    return (torch.cos(uniform_B * (math.pi / 2)) * tokens).round().clamp(min=1).long()
