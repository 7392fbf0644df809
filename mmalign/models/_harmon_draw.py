"""How Harmon's tokens come about: which step decides which tokens, where its random numbers come from, and the inner denoising.

Suffixes: B samples, N image tokens, R tokens of a step, C channels, E width of a condition, J denoising steps.
Source: wusize/Harmon at 4eb6087 (`sample`); MAR, arXiv 2406.11838. Changed: every sample has its own stream of random numbers; tokens that
guidance would draw twice are drawn once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmalign.models.layers.noise import normals, streams
from mmalign.models.layers.token_diffusion import Gaussian, Schedule, TokenDenoiser, decision_steps


def cosine(steps: int) -> tuple[float, ...]:
    """The share of tokens that stays hidden after each of so many steps."""
    return tuple(math.cos(math.pi / 2 * (step + 1) / steps) for step in range(steps))


def hidden_after(tokens: int, schedule: Sequence[float]) -> list[int]:
    """How many tokens each step leaves hidden: one less than before at most, one at least, none after the last."""
    left, counts = tokens, []
    for share in schedule:
        left = max(1, min(left - 1, math.floor(tokens * share)))
        counts.append(left)
    return [*counts[:-1], 0]


class Noise(Protocol):
    """Where the random numbers of a sampler come from."""

    def order(self, tokens: int) -> Tensor:
        """int [B, N] the places in the order in which they stay hidden: the first ones are decided last."""
        ...

    def start(self, count: int, channels: int) -> Tensor:
        """[B, count, C] what a step's tokens are denoised from."""
        ...

    def step(self, count: int, channels: int) -> Tensor:
        """[B, count, C] what one denoising step adds."""
        ...


class Streams:
    """One stream per sample: a number belongs to the seed and to what was drawn before it."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._sources, self._device = streams(seeds), device

    def order(self, tokens: int) -> Tensor:
        words = np.stack([source.random_raw(tokens) for source in self._sources])
        return torch.from_numpy(words.argsort(1, kind="stable")).to(self._device)

    def start(self, count: int, channels: int) -> Tensor:
        return normals(self._sources, count, channels).to(self._device)

    step = start


def steps_of(order_BN: Tensor, counts: Sequence[int]) -> Tensor:
    """int [B, N] the step that decides each token."""
    rank_BN = order_BN.argsort(1)
    return (rank_BN[..., None] < torch.tensor(counts, device=order_BN.device)).sum(-1)


@dataclass(frozen=True)
class Condition:
    """What the denoiser reads of R tokens [R, E], and of their unconditional twins (None: no guidance)."""

    cond: Tensor
    uncond: Tensor | None
    guidance: float = 1.0
    detaches: bool = False  # whether no gradient flows through the unconditional branch

    def repeated(self, times: int) -> Condition:
        """Every token so many times in turn."""
        many = [None if part is None else part.repeat_interleave(times, 0) for part in (self.cond, self.uncond)]
        return Condition(many[0], many[1], self.guidance, self.detaches)  # type: ignore[arg-type]


def step(net: TokenDenoiser, schedule: Schedule, x_RC: Tensor, condition: Condition, index_R: Tensor) -> Gaussian:
    """The distribution of each token's next state. Both branches go through one forward, unless only one of them takes a gradient."""
    time = schedule.time_of(index_R)
    if condition.uncond is None:
        eps, v = net(x_RC, time, condition.cond).chunk(2, -1)
        return schedule.step(eps, v, x_RC, index_R)
    if condition.detaches:
        with torch.no_grad():
            low = net(x_RC, time, condition.uncond)
        high = net(x_RC, time, condition.cond)
    else:
        high, low = net(x_RC.repeat(2, 1), time.repeat(2), torch.cat([condition.cond, condition.uncond])).chunk(2)
    eps, v = high.chunk(2, -1)
    other = low.chunk(2, -1)[0]
    return schedule.step(other + condition.guidance * (eps - other), v, x_RC, index_R)


def denoise(
    net: TokenDenoiser, schedule: Schedule, condition: Condition, noise: Noise, shape: tuple[int, int, int], levels: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """States [B, R / B, J + 1, C] from noise to token, and log-probabilities [B, R / B]: the mean over the steps that draw.

    `shape` is B, tokens of each sample, C. The last step adds no noise, but its numbers are drawn, as in the original.
    """
    samples, count, channels = shape
    x = noise.start(count, channels).flatten(0, 1)
    states, scores, drawing = [x], [], decision_steps(levels)
    for index, level in enumerate(levels):
        at = torch.full((len(x),), len(levels) - 1 - index, device=x.device)
        made = step(net, schedule, x, condition, at)
        number = noise.step(count, channels).flatten(0, 1)
        x = made.mean
        if index in drawing:
            x = made.mean + level * (0.5 * made.log_variance).exp() * number
            scores.append(made.log_prob(x, level))
        states.append(x)
    total = torch.stack(scores).mean(0) if scores else x.new_zeros(len(x))
    return torch.stack(states, 1).unflatten(0, (samples, count)), total.view(samples, count)


def score(
    net: TokenDenoiser, schedule: Schedule, condition: Condition, states_RJC: Tensor, levels: Sequence[float], chosen: Sequence[int]
) -> Tensor:
    """[R] mean log-probability of the chosen denoising steps of recorded states, in one forward."""
    now = states_RJC[:, list(chosen)].flatten(0, 1)
    then = states_RJC[:, [index + 1 for index in chosen]].flatten(0, 1)
    index = torch.tensor([len(levels) - 1 - one for one in chosen], device=now.device).repeat(len(states_RJC))
    level = torch.tensor([levels[one] for one in chosen], device=now.device).repeat(len(states_RJC))
    made = step(net, schedule, now, condition.repeated(len(chosen)), index)
    return made.log_prob(then, level).view(-1, len(chosen)).mean(1)
