"""DenseGRPO's claims that need no training: the marginals of its sampler on a target with a known velocity."""

from __future__ import annotations

import torch

from mmalign import sde

CENTER, SPREAD = 1.5, 0.5  # of the Gaussian target; noise is standard


def marginals(seed: int, samples: int = 20_000, level: float = 0.7) -> dict[str, float]:
    """How far the samples of the stochastic sampler are from the target, |mean error| + |error of the standard deviation|, for some
    numbers of steps."""
    return {f"{steps} steps": _distance(seed, samples, level, steps) for steps in (10, 40, 160)}


def _distance(seed: int, samples: int, level: float, steps: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(samples, 1, generator=generator, dtype=torch.float64)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for before, after in zip(times, times[1:], strict=False):
        step = sde.step(state, _velocity(state, before), before, after, level, "constant")
        fresh = torch.randn(state.shape, generator=generator, dtype=torch.float64) if after > 0 else torch.zeros_like(state)
        state = step.mean + step.std.reshape(-1, 1) * fresh
    return float((state.mean() - CENTER).abs() + (state.std() - SPREAD).abs())


def _velocity(state: torch.Tensor, time: float) -> torch.Tensor:
    """The exact velocity noise - data, given the state, of x_t = (1 - t) data + t noise."""
    variance = (1 - time) ** 2 * SPREAD**2 + time**2
    surprise = (state - (1 - time) * CENTER) / variance
    return time * surprise - (CENTER + (1 - time) * SPREAD**2 * surprise)
