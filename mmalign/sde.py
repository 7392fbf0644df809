"""One denoising step as a Gaussian: its mean, its spread, its log-probability. Pure functions; no model, no schedule.

Every rule below is linear in the state x and in the model's prediction p, so one kernel serves them all:

    next = c_x x + c_p p + std * noise,   noise ~ N(0, 1)

    rule          prediction       times         std
    flow          velocity v       sigma         s sqrt|dt|, s = level sqrt(sigma / (1 - sigma))        Flow-GRPO (arXiv 2505.05470)
    constant      velocity v       sigma         s sqrt|dt|, s = level    DanceGRPO (2505.07818); psi(t) of DenseGRPO (2601.20218, eq. 11)
    coefficient   velocity v       sigma         sigma' sin(level pi / 2): as much noise taken out as put in (Flow-CPS, 2509.05952)
    ddim          noise eps        alpha-bar     level sqrt((1 - a') / (1 - a) (1 - a / a')) (DDIM, 2010.02502, eq. 16)

`flow` and `constant` share the mean  x (1 + s^2 dt / 2 sigma) + v dt (1 + s^2 (1 - sigma) / 2 sigma), with dt = sigma' - sigma < 0: the
SDE whose marginals are the ODE's in the limit of many steps (`coefficient` keeps the amount of noise at any number of steps, and not the
marginals). Equation 6 of the DenseGRPO paper writes the noise as sigma_t dt; the square root belongs over |dt|, as
in the public code (yifan123/flow_grpo ac4c86e, sd3_sde_with_logprob.py). There, too, sigma = 1 would divide by zero, and the next sigma
takes its place in the denominator. A level of 0 is the deterministic step of every rule: Euler's, or DDIM's.

Legend: R rows; a time or level is one number, or one number per row [R].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Noise = Literal["flow", "constant", "coefficient", "ddim"]
Number = float | Tensor


@dataclass(frozen=True)
class Step:
    """The distribution of the next state. `std` [R] is the spread of each number of it, sqrt|dt| included; 0: nothing is random.

    `rate` [R] is the spread per square root of time, which flow_grpo's KL divides by; rules without a dt have rate = std.
    """

    mean: Tensor  # [R, ...] float32
    std: Tensor
    rate: Tensor


def step(state: Tensor, prediction: Tensor, before: Number, after: Number, level: Number, rule: Noise) -> Step:
    """The step from time `before` to `after`, in float32 whatever the model computed in: late steps have a spread below bf16's grain."""
    x, p = state.float(), prediction.float()
    c_x, c_p, std, rate = (value.to(x.device, torch.float32) for value in coefficients(before, after, level, rule))
    return Step(_rows(c_x, x) * x + _rows(c_p, p) * p, std.expand(len(x)), rate.expand(len(x)))


def coefficients(before: Number, after: Number, level: Number, rule: Noise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_x, c_p, std and rate of a step, in float64."""
    t, u, a = (torch.as_tensor(value, dtype=torch.float64) for value in (before, after, level))
    if rule in ("flow", "constant"):
        dt = u - t
        s = a * (t / (1 - torch.where(t < 1, t, u))).sqrt() if rule == "flow" else a.expand_as(dt)
        pull = s**2 / (2 * t) * dt
        return 1 + pull, dt + pull * (1 - t), s * (-dt).sqrt(), s
    if rule == "coefficient":
        std = u * (a * math.pi / 2).sin()
        kept = (u**2 - std**2).sqrt()
        return 1 - u + kept, kept * (1 - t) - t * (1 - u), std, std
    std = a * ((1 - u) / (1 - t) * (1 - t / u)).clamp(min=0).sqrt()
    return (u / t).sqrt(), (1 - u - std**2).clamp(min=0).sqrt() - (u * (1 - t) / t).sqrt(), std, std


def log_prob(state: Tensor, step: Step) -> Tensor:
    """[R] log-density of the state that was reached: the mean over its numbers, as flow_grpo and DanceGRPO take it (a sum would make
    the ratio depend on the resolution). The state is taken as it is: gradients flow through the mean alone. 0 where nothing is random."""
    std = torch.where(step.std > 0, step.std, 1.0)
    each = -((state.detach().float() - step.mean) ** 2) / (2 * _rows(std, step.mean) ** 2)
    value = each.flatten(1).mean(1) - std.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(step.std > 0, value, 0.0)


def divergence(mean: Tensor, reference: Tensor, spread: Tensor) -> Tensor:
    """[R] KL between two Gaussians of equal spread [R], the mean over their numbers. With `Step.std` it is the KL of the step; with
    `Step.rate` it is flow_grpo's, which leaves |dt| out and is smaller by that factor. 0 where nothing is random."""
    safe = torch.where(spread > 0, spread, 1.0)
    value = ((mean - reference.detach()) ** 2).flatten(1).mean(1) / (2 * safe**2)
    return torch.where(spread > 0, value, 0.0)


def stops(left: int, n: int) -> list[int]:
    """The stops of an n-step completion of a state with `left` sampling steps to go, as steps to go, the state itself first.

    [4, 3, 2, 1, 0] for n >= 4, [4, 2, 0] for n = 2, [4, 0] for n = 1; the last stop before the end is floor(left / n) (DenseGRPO, eq. 8).
    """
    n = min(n, left)
    return [left * (n - number) // n for number in range(n)] + [0] if left else [0]


def _rows(value: Tensor, like: Tensor) -> Tensor:
    """One number per row, in the shape that multiplies rows."""
    return value.reshape(-1, *[1] * (like.ndim - 1))
