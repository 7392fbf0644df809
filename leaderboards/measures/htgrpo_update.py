"""HT-GRPO's claims about one update of a trained masked model: ratios in different contexts, gradients of parts, cost.

Groups, structure and refinement are those of `htgrpo_model`. A gradient is that of the first update, where every ratio is one: of the
mean over pictures of A times the mean log-probability of the chosen codes, by all trained weights. A step is the trainer's own.

Legend: B pictures, N codes, D trained weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmalign.leaderboards.measures.htgrpo_model import ALPHA, Group, config_of, group, rows_of, streams, training
from mmalign.trainers import _masked as masked
from mmalign.trainers import _masked_choices as choices
from mmalign.trainers import ht_grpo
from torch import Tensor

from mmalign.loop import Loop


def plan_of(found: Group, tokens_BN: Tensor, **options: Any) -> tuple[ht_grpo.Config, choices.Plan]:
    """One update of these codes, in the context that the options configure."""
    config = config_of(0, **options)
    return config, ht_grpo.in_context(config, found.rollout, found.is_structure_BN, iter([("all", tokens_BN)]))


def scored(model: Any, rollout: masked.Rollout, hidden_BN: Tensor | None, chosen_BN: Tensor) -> Tensor:
    """[B, N] log-probabilities of the chosen codes when `hidden_BN` (None: everything) is hidden, 0 elsewhere."""
    if hidden_BN is None:
        return model.log_prob_blank(rollout.encoded, rollout.drawn, chosen_BN, "cond")
    return model.log_prob_given(rollout.encoded.select(rows_of(rollout)), rollout.drawn, hidden_BN, chosen_BN, "cond")


def gradient(loop: Loop, found: Group, tokens_BN: Tensor, weight_B: Tensor | None = None, **options: Any) -> Tensor:
    """float64 [D]. `weight_B` multiplies the pictures' advantages. A backward for each state, as in training."""
    plan = plan_of(found, tokens_BN, **options)[1]
    share_BN = tokens_BN / tokens_BN.sum(1, keepdim=True) / len(tokens_BN)
    credit_B1 = (found.advantage_B if weight_B is None else found.advantage_B * weight_B).float()[:, None]
    loop.optimizer.zero_grad()
    for name, chosen_BN in plan.updates[0].scored.items():
        if chosen_BN.any():
            (scored(loop.model, found.rollout, plan.contexts[name], chosen_BN) * share_BN * credit_B1).sum().backward()
    parts = [torch.zeros_like(value) if value.grad is None else value.grad for value in loop.parameters.values()]
    return torch.cat([part.flatten() for part in parts]).double()


def step(loop: Loop, found: Group, tokens_BN: Tensor, **options: Any) -> None:
    """One update of the trainer's, with its optimiser."""
    config, plan = plan_of(found, tokens_BN, **options)
    credit_BN = choices.credit(found.is_structure_BN, *(config.credit or (1.0, 1.0)), config.unit_mean)
    masked.update(loop.model, loop, found.rollout, found.advantage_B, plan, ht_grpo.how(config), credit_BN)


def cosine(one_D: Tensor, other_D: Tensor) -> float:
    return float(one_D @ other_D / (one_D.norm() * other_D.norm()))


# -- ratios ------------------------------------------------------------------------------------------------------------------------


def revealed(seed: int, name: str = "tiny-mmada") -> dict[str, float]:
    """Variance, over the refinement's codes, of the log-ratio after one update of the refinement, with everything hidden (`blank`) or
    with the structure seen (`revealed`), each updated in the context it is scored in; beside them in the other one's. `gradient`: the
    norm of that update's gradient."""
    found = group(seed, name)
    chosen_BN, numbers = ~found.is_structure_BN, {}
    hidden: Mapping[str, Tensor | None] = {"blank": None, "revealed": chosen_BN}
    for updated, context in (("blank", "blank"), ("revealed", "structure")):
        with training(config_of(seed), name) as loop:
            numbers[f"gradient {updated}"] = float(gradient(loop, found, chosen_BN, context=context).norm())
            loop.optimizer.zero_grad()
            before = _said(loop, found, hidden, chosen_BN)
            step(loop, found, chosen_BN, context=context)
            after = _said(loop, found, hidden, chosen_BN)
        for scene in hidden:
            label = scene if scene == updated else f"{scene}, updated {updated}"
            numbers[label] = float((after[scene] - before[scene])[chosen_BN].double().var(correction=0))
    return numbers


def _said(loop: Loop, found: Group, hidden: Mapping[str, Tensor | None], chosen_BN: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {scene: scored(loop.model, found.rollout, hidden_BN, chosen_BN) for scene, hidden_BN in hidden.items()}


def trajectory_ratio(seed: int, name: str = "tiny-mmada") -> dict[str, float]:
    """Correlation, after one update of all codes with everything hidden, between log-ratios with everything hidden and along the
    trajectory: of `pictures` (sums over codes), of `pictures of a prompt` (less the prompt's mean), of single `codes`."""
    found = group(seed, name)
    rollout, everything_BN = found.rollout, found.everything_BN
    repeated = rollout.encoded.select(rows_of(rollout))
    with training(config_of(seed), name) as loop, torch.no_grad():
        blank = -scored(loop.model, rollout, None, everything_BN)
        with torch.enable_grad():
            step(loop, found, everything_BN)
        blank += scored(loop.model, rollout, None, everything_BN)
        along = loop.model.log_prob(repeated, rollout.drawn, "cond") - rollout.drawn.log_prob
    sums = [ratio_BN.double().sum(1) for ratio_BN in (blank, along)]
    within = [(sum_B.unflatten(0, (-1, rollout.group)) - sum_B.unflatten(0, (-1, rollout.group)).mean(1, keepdim=True)) for sum_B in sums]
    pairs = {"pictures": sums, "pictures of a prompt": within, "codes": [blank, along]}
    return {what: float(np.corrcoef(*(value.flatten().numpy() for value in pair))[0, 1]) for what, pair in pairs.items()}


# -- gradients ---------------------------------------------------------------------------------------------------------------------


def interference(seed: int, name: str = "tiny-mmada") -> dict[str, float]:
    """Cosine between the gradients of the structure and of the refinement with everything hidden, and how many times the first is as
    long; `random`: the same cosine for as many codes at random places and the others."""
    found = group(seed, name)
    rows, codes = found.rank_BN.shape
    shuffled_BN = choices.permuted(found.rank_BN, choices.uniforms(streams("parts", seed, rows), codes))
    random_BN = choices.structure(shuffled_BN, ALPHA)
    with training(config_of(seed), name) as loop:
        parts = [gradient(loop, found, chosen) for where in (found.is_structure_BN, random_BN) for chosen in (where, ~where)]
    return {"cosine": cosine(*parts[:2]), "norm ratio": float(parts[0].norm() / parts[1].norm()), "random": cosine(*parts[2:])}


def subsets(seed: int, draws: int = 16, name: str = "tiny-mmada") -> dict[str, float]:
    """Mean squared distance of a partial gradient to that of all codes of all pictures, as a share of the latter's squared norm: a random
    half of the codes of every picture (`parts`), all codes of a random half of each prompt's pictures (`whole`). `sets`: how many
    different sets of a picture's codes the eight updates of a rollout take, at the paper's rates and at rate 1."""
    found = group(seed, name)
    rows, codes = found.rank_BN.shape
    each = found.rollout.group
    distance: dict[str, list[float]] = {"parts": [], "whole": []}
    with training(config_of(seed), name) as loop:
        whole_D = gradient(loop, found, found.everything_BN)
        for draw in range(draws):
            part_BN = choices.subset(choices.uniforms(streams(f"codes/{draw}", seed, rows), codes), found.everything_BN, 0.5, "fixed")
            order_PG = choices.uniforms(streams(f"pictures/{draw}", seed, rows // each), each).argsort(1).argsort(1)
            kept_B = (order_PG < each // 2).flatten() * (each / (each // 2))
            partial = {"parts": gradient(loop, found, part_BN), "whole": gradient(loop, found, found.everything_BN, kept_B)}
            for what, partial_D in partial.items():
                distance[what].append(float((partial_D - whole_D).square().sum() / whole_D.square().sum()))
        sets = {}
        for label, rates in (("sets", {}), ("sets at rate 1", {"rate_min": (1.0,)})):
            chosen = list(ht_grpo.decisions(config_of(seed, **rates), found.rollout, found.is_structure_BN, loop))
            sets[label] = float(np.mean([len({tuple(tokens_BN[row].tolist()) for _, tokens_BN in chosen}) for row in range(rows)]))
    return {**{what: float(np.mean(values)) for what, values in distance.items()}, **sets}


def cost(seed: int, name: str = "tiny-mmada") -> dict[str, float]:
    """What the log-probabilities of all codes of a group and their gradient take: forwards, `rows` in all of them, and processor seconds,
    with everything hidden (`ht_grpo`) and in the states that codes were drawn from (`trace_grpo`). `cosine`: between the two gradients."""
    found = group(seed, name)
    numbers, found_D = {}, {}
    with training(config_of(seed), name) as loop:
        forward, rows = loop.model._hidden, list[int]()

        def counted(ids_RL: Tensor, mask_RL: Tensor) -> Tensor:
            rows.append(len(ids_RL))
            return forward(ids_RL, mask_RL)

        loop.model._hidden = counted
        for method in ("ht_grpo", "trace_grpo"):
            rows.clear()
            begun = time.process_time()
            found_D[method] = gradient(loop, found, found.everything_BN, method=method)
            spent = time.process_time() - begun
            numbers |= {f"{method} forwards": float(len(rows)), f"{method} rows": float(sum(rows)), f"{method} seconds": spent}
    return {**numbers, "cosine": cosine(found_D["ht_grpo"], found_D["trace_grpo"])}
