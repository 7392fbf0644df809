"""Diffusion of single tokens: the small denoiser of MAR (arXiv 2406.11838, section 3), its schedule, its steps as Gaussians, its loss.

Suffixes: R tokens, C channels, E width of the condition, J denoising steps. The schedule is the cosine one of Improved DDPM (arXiv
2102.09672) over 1000 times; the network predicts the noise and, per channel, where the log-variance lies between its two bounds.
Format and constants: LTH14/mar (diffloss.py), as wusize/Harmon at 4eb6087 keeps them. Guidance moves the noise alone; the variance is the
conditional branch's. A step of fewer than 1000 is taken on an even selection of the times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.types import UsageError

TIMES = 1000
EPSILON = 1e-6
FREQUENCIES = 128


class TokenDenoiser(nn.Module):
    """(x [R, C], time [R], condition [R, E]) -> [R, 2 C]: the noise in x, and v in about [-1, 1] for the variance."""

    def __init__(self, channels: int, width: int, depth: int, condition: int) -> None:
        super().__init__()
        self.time_embed = nn.ModuleDict({"mlp": _two_layers(2 * FREQUENCIES, width, width)})
        self.cond_embed, self.input_proj = nn.Linear(condition, width), nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(_Residual(width) for _ in range(depth))
        self.final_layer = nn.ModuleDict({"adaLN_modulation": _modulation(width, 2), "linear": nn.Linear(width, 2 * channels)})

    def forward(self, x_RC: Tensor, time_R: Tensor, condition_RE: Tensor) -> Tensor:
        dtype = self.input_proj.weight.dtype
        rate = torch.exp(torch.arange(FREQUENCIES, device=x_RC.device) * (-math.log(10000.0) / FREQUENCIES))
        angle = time_R[:, None].float() * rate
        guide = self.time_embed["mlp"](torch.cat([angle.cos(), angle.sin()], -1).to(dtype)) + self.cond_embed(condition_RE.to(dtype))
        x = self.input_proj(x_RC.to(dtype))
        for block in self.res_blocks:
            x = block(x, guide)
        shift, scale = self.final_layer["adaLN_modulation"](guide).chunk(2, -1)
        return self.final_layer["linear"](F.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale) + shift).float()


class _Residual(nn.Module):
    """A residual MLP whose normalisation and gate follow the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=EPSILON)
        self.mlp, self.adaLN_modulation = _two_layers(width, width, width), _modulation(width, 3)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(guide).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


@dataclass(frozen=True)
class Gaussian:
    """Mean and log-variance of a step, [R, C] float32."""

    mean: Tensor
    log_variance: Tensor

    def log_prob(self, x_RC: Tensor, level: Tensor | float) -> Tensor:
        """[R] log-density of x under the Gaussian with its deviation times `level`: the mean over channels, as `mmalign.sde` takes it."""
        squared = (x_RC.detach() - self.mean) ** 2 * (-self.log_variance).exp()
        level_R = torch.as_tensor(level, dtype=torch.float32, device=x_RC.device)
        each = -0.5 * (squared / (level_R**2).reshape(-1, 1) + self.log_variance + math.log(2 * math.pi))
        return each.mean(-1) - level_R.log()


class Schedule:
    """The noise schedule with `steps` of its 1000 times. Step 0 is the last one, which adds no noise."""

    def __init__(self, steps: int = TIMES) -> None:
        if not 2 <= steps <= TIMES:
            raise UsageError(f"A token is denoised in 2 to {TIMES} steps; got {steps}.")
        share = np.cos((np.arange(TIMES + 1) / TIMES + 0.008) / 1.008 * np.pi / 2) ** 2
        kept = np.cumprod(1 - np.minimum(1 - share[1:] / share[:-1], 0.999))
        self.times = np.round(np.arange(steps) * ((TIMES - 1) / (steps - 1))).astype(int)
        now = kept[self.times]
        before = np.append(1.0, now[:-1])
        beta = 1 - now / before
        least = beta * (1 - before) / (1 - now)
        tables = {
            "signal": np.sqrt(now),
            "noise": np.sqrt(1 - now),
            "per_state": np.sqrt(1 / now),  # x0 = per_state x - per_noise eps
            "per_noise": np.sqrt(1 / now - 1),
            "from_clean": beta * np.sqrt(before) / (1 - now),  # mean = from_clean x0 + from_state x
            "from_state": (1 - before) * np.sqrt(1 - beta) / (1 - now),
            "most": np.log(beta),
            "least": np.log(np.append(least[1], least[1:])),  # the first one would be log 0
        }
        self._tables = {name: torch.tensor(table, dtype=torch.float32) for name, table in tables.items()}

    def __len__(self) -> int:
        return len(self.times)

    def at(self, name: str, step_R: Tensor) -> Tensor:
        """[R, 1] a table's entries."""
        return self._tables[name].to(step_R.device)[step_R][:, None]

    def time_of(self, step_R: Tensor) -> Tensor:
        return torch.from_numpy(self.times).to(step_R.device)[step_R]

    def noised(self, clean_RC: Tensor, step_R: Tensor, noise_RC: Tensor) -> Tensor:
        return self.at("signal", step_R) * clean_RC + self.at("noise", step_R) * noise_RC

    def step(self, eps_RC: Tensor, v_RC: Tensor, x_RC: Tensor, step_R: Tensor) -> Gaussian:
        """The distribution of the next state."""
        clean = self.at("per_state", step_R) * x_RC - self.at("per_noise", step_R) * eps_RC
        share = (v_RC + 1) / 2
        return Gaussian(self.posterior(clean, x_RC, step_R), share * self.at("most", step_R) + (1 - share) * self.at("least", step_R))

    def posterior(self, clean_RC: Tensor, x_RC: Tensor, step_R: Tensor) -> Tensor:
        """[R, C] mean of the state before, given the clean token."""
        return self.at("from_clean", step_R) * clean_RC + self.at("from_state", step_R) * x_RC


def loss(net: TokenDenoiser, schedule: Schedule, clean_RC: Tensor, condition_RE: Tensor, step_R: Tensor, noise_RC: Tensor) -> Tensor:
    """[R] the hybrid loss of Improved DDPM: squared error of the noise, plus the variational term in bits, which trains the variance only.

    The means over channels are taken. At step 0 the variational term is the likelihood of the token in bins of 1/255, as in the original.
    """
    x = schedule.noised(clean_RC, step_R, noise_RC)
    eps, v = net(x, schedule.time_of(step_R), condition_RE).chunk(2, -1)
    made = schedule.step(eps.detach(), v, x, step_R)
    true_mean, true_log = schedule.posterior(clean_RC, x, step_R), schedule.at("least", step_R)
    apart = made.log_variance - true_log
    divergence = 0.5 * (apart - 1 + (-apart).exp() + (true_mean - made.mean) ** 2 * (-made.log_variance).exp())
    bound = torch.where((step_R == 0)[:, None], -_binned(clean_RC, made), divergence).mean(-1) / math.log(2)
    return ((noise_RC - eps) ** 2).mean(-1) + bound


def _binned(x: Tensor, made: Gaussian) -> Tensor:
    """Log-likelihood of values in bins of half-width 1/255, the outermost ones open; the normal distribution by tanh, as the original."""

    def below(edge: Tensor) -> Tensor:
        z = (edge - made.mean) * (-0.5 * made.log_variance).exp()
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    high, low = below(x + 1 / 255), below(x - 1 / 255)
    inside = torch.where(x > 0.999, 1 - low, torch.where(x < -0.999, high, high - low))
    return inside.clamp(min=1e-12).log()


def decision_steps(levels: Sequence[float]) -> list[int]:
    """The denoising steps that draw something: those with noise, the last one excepted."""
    return [index for index, level in enumerate(levels[:-1]) if level > 0]


def _two_layers(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, hidden), nn.SiLU(), nn.Linear(hidden, n_out))


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))
