"""Group-relative policy optimisation on tensors: advantages, ratios, clipping, KL, credit. Pure functions; no model, no loop.

Every method of this package is one objective with three choices: which decisions enter an update (`mask`), in what context their
ratio is taken (the caller's `log_prob`), and how much credit each gets (`weight`, or an advantage per decision):

    loss = - sum_bs mask * min(r * A * w, clip(r, 1 - low, 1 + high) * A * w) / Z  +  beta * sum_bs mask * KL / Z,   r = exp(log_prob - old)

Conventions in which public code differs silently are named options: the degrees of freedom of the spread and its scope, epsilon, the
form of the KL, the normaliser Z. Sources: GRPO (arXiv 2402.03300) eq. 3; T2I-R1 (CaraJ7/T2I-R1 2d9d4d1); flow_grpo (ac4c86e).

Legend: P prompts, G samples of a prompt, B = P*G samples, S decisions of a sample (tokens or denoising steps).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Scope = Literal["group", "batch", "none"]
Combine = Literal["sum_then_normalize", "normalize_then_sum"]
KLForm = Literal["k1", "k2", "k3"]
Reduction = Literal["token_mean", "sample_mean", "constant"]


@dataclass(frozen=True)
class AdvantageRule:
    """How rewards become advantages. `ddof` 1 is the sample spread (T2I-R1, TRL), 0 the population spread (flow_grpo)."""

    ddof: int = 1
    epsilon: float = 1e-4
    scope: Scope = "group"
    combine: Combine = "sum_then_normalize"
    limit: float | None = None  # advantages are clipped to [-limit, limit]


@dataclass(frozen=True)
class Advantages:
    """`value` is 0 where a sample has no reward; `flat_groups` counts groups whose rewards do not differ (they teach nothing)."""

    value: Float[Tensor, "P G"]
    flat_groups: int
    spread: float  # mean standard deviation of the rewards within a group


def advantages(
    parts: Mapping[str, Float[Tensor, "P G"]], weights: Mapping[str, float], ok: Bool[Tensor, "P G"], rule: AdvantageRule = AdvantageRule()
) -> Advantages:
    """Group-relative advantages of named rewards.

    `sum_then_normalize`: the weighted sum is normalised (T2I-R1, flow_grpo). `normalize_then_sum`: each reward is normalised in its
    group first, so that none drowns another, and the sum is normalised over the batch (GDPO). Samples that are not `ok` enter no mean
    and no spread and get advantage 0. Rewards keep their precision (use float64).
    """
    total = sum((weights[name] * value.nan_to_num(0.0) for name, value in parts.items()), torch.zeros_like(ok, dtype=torch.float64))
    if rule.combine == "sum_then_normalize":
        value = _normalize(total, ok, rule)
    else:
        each = [weights[name] * _normalize(part.nan_to_num(0.0).double(), ok, rule) for name, part in parts.items()]
        value = _normalize(sum(each, torch.zeros_like(total)), ok, AdvantageRule(rule.ddof, rule.epsilon, "batch"))
    if rule.limit is not None:
        value = value.clamp(-rule.limit, rule.limit)
    spread_P1 = _spread(total, ok, rule.ddof)
    return Advantages(torch.where(ok, value, 0.0), int((spread_P1 < 1e-8).sum()), float(spread_P1.mean()))


def _mean(x_PG: Tensor, ok_PG: Tensor) -> Tensor:
    return (x_PG * ok_PG).sum(1, keepdim=True) / ok_PG.sum(1, keepdim=True).clamp(min=1)


def _spread(x_PG: Tensor, ok_PG: Tensor, ddof: int) -> Tensor:
    centred = (x_PG - _mean(x_PG, ok_PG)) * ok_PG
    return ((centred**2).sum(1, keepdim=True) / (ok_PG.sum(1, keepdim=True) - ddof).clamp(min=1)).sqrt()


def _normalize(x_PG: Tensor, ok_PG: Tensor, rule: AdvantageRule) -> Tensor:
    if rule.scope == "batch":
        flat, flat_ok = x_PG.reshape(1, -1), ok_PG.reshape(1, -1)
        # Means stay per prompt, so that an easy prompt does not lend its level to a hard one; only the spread is shared.
        return (x_PG - _mean(x_PG, ok_PG)) / (_spread(flat, flat_ok, rule.ddof) + rule.epsilon) * ok_PG
    centred = (x_PG - _mean(x_PG, ok_PG)) * ok_PG
    return centred if rule.scope == "none" else centred / (_spread(x_PG, ok_PG, rule.ddof) + rule.epsilon)


@dataclass(frozen=True)
class Objective:
    """The clipped surrogate's options. `clip_low = clip_high = inf` never clips; `beta` 0 needs no reference."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.01
    kl: KLForm = "k3"
    reduction: Reduction = "token_mean"


@dataclass(frozen=True)
class Loss:
    """`total` is differentiable; the rest are detached sums over decisions, to be divided by `decisions` when logged."""

    total: Tensor
    ratio_deviation: Tensor  # largest |r - 1|
    clipped: Tensor
    kl: Tensor
    decisions: Tensor


def surrogate(
    log_prob: Float[Tensor, "B S"],
    old: Float[Tensor, "B S"],
    advantage: Float[Tensor, " B"] | Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    objective: Objective,
    reference: Float[Tensor, "B S"] | None = None,
    weight: Float[Tensor, "B S"] | None = None,
    normaliser: float | None = None,
    divergence: Float[Tensor, "B S"] | None = None,
    lengths: Float[Tensor, " B"] | None = None,
) -> Loss:
    """The loss of one micro-batch. `weight` multiplies the advantage of each decision (dense rewards: 1 + lambda m).

    `normaliser` is Z of the *whole* batch (see `normaliser_of`), so that micro-batches and processes add up to the loss of the whole;
    None takes this micro-batch for the whole. `divergence` is a KL that the caller knows exactly (two Gaussians, say), in place of the
    estimate from `reference`; gradients flow through it. `lengths` are the samples' decisions in the whole batch, for `sample_mean` over
    micro-batches that hold parts of samples.
    """
    advantage_BS = advantage[:, None] if advantage.ndim == 1 else advantage
    credit = advantage_BS.to(log_prob.dtype) if weight is None else advantage_BS.to(log_prob.dtype) * weight
    log_ratio = torch.where(mask, log_prob - old.detach(), 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    per_decision = -torch.minimum(ratio * credit, clipped * credit)
    if divergence is None and objective.beta and reference is not None:
        divergence = kl(log_prob, torch.where(mask, reference.detach(), log_prob.detach()), objective.kl)
    divergence = torch.zeros_like(per_decision) if divergence is None else divergence
    per_decision = per_decision + objective.beta * divergence
    z = normaliser_of(mask, objective.reduction) if normaliser is None else normaliser
    counted_B = mask.sum(1) if lengths is None else lengths
    lengths_B1 = counted_B[:, None].clamp(min=1).to(per_decision.dtype)  # as whole numbers they would divide in float32
    scale = 1 / lengths_B1 if objective.reduction == "sample_mean" else 1.0
    with torch.no_grad():
        hit = mask & (torch.minimum(ratio * credit, clipped * credit) < ratio * credit)
    return Loss(
        total=(torch.where(mask, per_decision, 0.0) * scale).sum() / z,
        ratio_deviation=((ratio - 1).abs() * mask).max().detach(),
        clipped=hit.sum(),
        kl=torch.where(mask, divergence, 0.0).sum().detach(),
        decisions=mask.sum(),
    )


def normaliser_of(mask: Bool[Tensor, "B S"], reduction: Reduction) -> float:
    """Z: all decisions (`token_mean`: long samples weigh more), samples (`sample_mean`), or samples x longest (`constant`)."""
    match reduction:
        case "token_mean":
            return float(mask.sum().clamp(min=1))
        case "sample_mean":
            return float(max(len(mask), 1))
        case "constant":
            return float(max(mask.numel(), 1))


def kl(log_prob: Float[Tensor, "B S"], reference: Float[Tensor, "B S"], form: KLForm) -> Float[Tensor, "B S"]:
    """Single-sample estimates of KL(policy || reference), d = reference - log_prob: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 >= 0.

    Source: Schulman, "Approximating KL divergence" (2020). Gradients flow through `log_prob`.
    """
    d = reference - log_prob
    match form:
        case "k1":
            return -d
        case "k2":
            return d**2 / 2
        case "k3":
            return d.expm1() - d  # exp(d) - 1 as one function: the difference of two ones rounds below 0 for small d


def sequence_probability(
    log_prob_BL: Float[Tensor, "B L"], mask_BL: Bool[Tensor, "B L"], mean: Literal["geometric", "product", "arithmetic"] = "geometric"
) -> Float[Tensor, " B"]:
    """One number in [0, 1] for a text's token probabilities. `geometric` is GvU's eq. 5, exp of the mean log-probability, which keeps
    long texts comparable with short ones; `product` and `arithmetic` are its controls. An empty text has no probability: NaN."""
    count = mask_BL.sum(-1)
    match mean:
        case "geometric":
            value = ((log_prob_BL * mask_BL).sum(-1) / count).exp()
        case "product":
            value = (log_prob_BL * mask_BL).sum(-1).exp()
        case "arithmetic":
            value = (log_prob_BL.exp() * mask_BL).sum(-1) / count
    return torch.where(count > 0, value, torch.nan)
