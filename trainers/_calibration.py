"""Exploration calibration: how much noise each denoising step takes before its gains stop being balanced (DenseGRPO, Algorithm 1).

Per iteration: N trajectories under the present psi, the gain of every step, and per step psi + eps2 where the numbers of positive and
negative gains differ by less than eps1, else psi - eps2. The paper leaves open where psi starts, N, the number of iterations and how low
psi may fall; all are options here and kept with the run.

A property to know: the test compares counts. Those of a truly balanced step still differ by about sqrt(N), so for large N and small eps1
psi falls nearly everywhere, balanced or not. `drift` shows it: the mean change per iteration over the last half, in units of eps2 (-1:
falling at every iteration; 0: settled).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Calibration:
    """Options of Algorithm 1. `tolerance` is eps1, `change` eps2 (the paper: 2 and 0.01); the others are not public and our choice."""

    start: Literal["flow", "constant"] = "flow"  # psi begins as Flow-GRPO's s(t) at level `initial`, or as `initial` at every step
    initial: float = 0.7
    trajectories: int = 24  # N: the group size, with which eps1 = 2 is a difference of one sample
    iterations: int = 50
    tolerance: float = 2.0
    change: float = 0.01
    floor: float = 0.05  # the noise never vanishes: a step without noise has no ratio

    def __post_init__(self) -> None:
        if not (self.floor > 0 and self.initial > 0 and self.trajectories > 0 and self.iterations > 0):
            raise ValueError("calibration needs a positive floor, initial level, number of trajectories and of iterations")


@dataclass(frozen=True)
class Calibrated:
    """`levels` [K]: psi by step, first step (t = T) first. `history` [iterations + 1, K]; `positive`, `negative` [iterations, K] counts."""

    levels: tuple[float, ...]
    history: list[list[float]] = field(default_factory=list)
    positive: list[list[int]] = field(default_factory=list)
    negative: list[list[int]] = field(default_factory=list)
    drift: tuple[float, ...] = ()


def calibrate(
    start: Sequence[float], measure: Callable[[tuple[float, ...], int], tuple[np.ndarray, np.ndarray]], options: Calibration
) -> Calibrated:
    """psi after all iterations. `measure(levels, iteration)` gives the numbers of positive and of negative gains of each step."""
    levels = np.array(start, dtype=np.float64)
    history, positives, negatives = [levels.tolist()], [], []
    for iteration in range(options.iterations):
        positive, negative = measure(tuple(levels.tolist()), iteration)
        is_balanced = np.abs(positive - negative) < options.tolerance
        # Rounded, so that a thousand steps of 0.01 add up to what they say, on every machine.
        levels = np.maximum(np.round(levels + np.where(is_balanced, options.change, -options.change), 10), options.floor)
        history.append(levels.tolist())
        positives.append([int(count) for count in positive])
        negatives.append([int(count) for count in negative])
    half = options.iterations // 2
    drift = (levels - np.array(history[half])) / (max(1, options.iterations - half) * options.change)
    return Calibrated(tuple(levels.tolist()), history, positives, negatives, tuple(drift.tolist()))
