"""What the methods on masked models share: a group's rollout, log-probabilities in the states of a plan, and the update.

A decision is one image token; its state is which tokens of the image are hidden when it is scored. The state in which all of them are
depends on the prompt alone: it is computed once for each prompt, not once for each sample. The method chooses the plan and the credit.

Legend: P prompts, G samples of a prompt, B = P*G samples, N image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from mmalign.trainers import _masked_choices as choices
from torch import Tensor

from mmalign import distributed, grpo
from mmalign.attribution import normalise, overlay
from mmalign.loop import Loop
from mmalign.reward import RewardBatch
from mmalign.trajectory import Policy, Prompts, Trajectory, Which
from mmalign.types import Prompt, Request, Sample, UsageError

GROUP_SHOWN = 8  # pictures of a group that are kept to be looked at

Reduction = Literal["token_mean", "sample_mean", "state_mean"]


@dataclass(frozen=True)
class How:
    """How decisions become a gradient.

    `reduction`: the mean over all decisions of an update (MaskGRPO), of the samples' means (HT-GRPO), or of the means of a sample's
    states (TraceRL's code). `level` "sequence" takes one ratio of a sample, of its mean log-probability (UniGRPO). `kl_to_old` is
    TraceRL's KL: to the policy that drew, summed over a state's tokens.
    """

    objective: grpo.Objective
    reduction: Reduction
    level: Literal["token", "sequence"]
    log_prob: Which
    micro_batch: int
    kl_to_old: bool = False


@dataclass(frozen=True)
class Rollout:
    """What one step drew: B samples, those of one prompt neighbours, and the P encoded prompts."""

    prompts: list[Prompt]  # P
    samples: list[Sample]  # B, with images
    encoded: Prompts  # P
    drawn: Trajectory  # B

    @property
    def group(self) -> int:
        return len(self.samples) // len(self.prompts)

    def batches(self, rows: int, is_shared: bool) -> list[list[int]]:
        """Samples whose log-probabilities come from one forward of so many rows: whole groups where the state is the prompt's."""
        size = rows * self.group if is_shared else rows
        everything = list(range(len(self.samples)))
        return [everything[at : at + size] for at in range(0, len(everything), size)]


def check_family(model: Any) -> None:
    if not hasattr(model, "log_prob_blank"):
        raise UsageError(
            f"ht_grpo trains models that fill in hidden image tokens (mmada, lumina_dimoo, showo); {model.name} ({model.family}) does not. "
            "Try t2i_r1 for autoregressive models and flow_grpo for flow models."
        )


def make_rollout(
    model: Any, loop: Loop, prompts: Sequence[Prompt], group: int, policy: Policy, size: tuple[int, int] | None, micro_batch: int
) -> Rollout:
    """G pictures of each prompt, each from its own seed."""
    rows = [prompt for prompt in prompts for _ in range(group)]
    where = {} if size is None else {"size": size}
    with loop.rollout(), loop.autocast():
        encoded = model.encode_prompts([prompt.text for prompt in prompts], **where)
        repeated = encoded.select([row for row in range(len(prompts)) for _ in range(group)])
        drawn = model.sample(repeated, policy, loop.seeds(prompts, group, "image"))
        pixels = torch.cat([model.decode(codes, **where) for codes in drawn.actions.split(micro_batch)])
    # Cut off, not rounded, exactly as `Model.generate` makes its pictures, so that a reward equals a benchmark's value.
    images = rearrange((pixels * 255).to(torch.uint8), "b c h w -> b h w c").cpu().numpy()
    samples = [
        Sample(Request(prompt, index, seed), image=np.ascontiguousarray(image))
        for index, (prompt, image, seed) in enumerate(zip(rows, images, drawn.seeds, strict=True))
    ]
    return Rollout(list(prompts), samples, encoded, drawn)


def update(
    model: Any, loop: Loop, rollout: Rollout, advantage_B: Tensor, plan: choices.Plan, how: How, credit_BN: Tensor | None = None
) -> None:
    """The plan's optimiser steps, all on one rollout. `credit_BN` multiplies the advantage of each token.

    Old and reference log-probabilities come from the same forwards as the new ones, in the same states: once for each state of the plan,
    however many updates score something in it.
    """
    with loop.timer("old_and_reference"), torch.no_grad():
        needed = {name: _any([one.scored[name] for one in plan.updates if name in one.scored]) for name in plan.contexts}
        old = {name: _score_all(model, loop, rollout, hidden, needed[name], how) for name, hidden in plan.contexts.items()}
        reference = old if how.kl_to_old else {}
        if how.objective.beta and not how.kl_to_old:
            with loop.reference():
                reference = {name: _score_all(model, loop, rollout, hidden, needed[name], how) for name, hidden in plan.contexts.items()}
    kl = counted = deviation = 0.0
    clipped: dict[str, list[float]] = {}
    for number, one in enumerate(plan.updates):
        hits = decisions = 0.0
        lengths_B, whole = one.tokens.sum(1), _normaliser(one, how)
        with loop.timer("update"):
            for name, scored_BN in one.scored.items():
                for rows in rollout.batches(how.micro_batch, plan.contexts[name] is None):
                    new = _score(model, loop, rollout, plan.contexts[name], scored_BN, rows, how.log_prob)
                    before = reference[name][rows] if reference else None
                    credit = None if credit_BN is None else credit_BN[rows].to(new)
                    advantage = advantage_B[rows].to(new)
                    loss = _loss(new, old[name][rows], before, advantage, scored_BN[rows], credit, lengths_B[rows], whole, how)
                    loop.backward(
                        loss.total, {"log_prob": new, "advantage": advantage}, [rollout.samples[row].request.prompt for row in rows]
                    )
                    kl, hits, decisions = kl + float(loss.kl), hits + float(loss.clipped), decisions + float(loss.decisions)
                    if number == 0:
                        deviation = max(deviation, float(loss.ratio_deviation))
            loop.update()
        counted += decisions
        clipped.setdefault(one.stage, []).append(distributed.total(hits) / max(1.0, distributed.total(decisions)))
    first = distributed.largest(deviation)
    if first > 1e-2:
        raise UsageError(
            f"Step {loop.step}: before any update the ratio of new to old policy is off by {first:.2g} (expected 0). "
            "Two forwards in one state disagree; train in float32."
        )
    loop.log(ratio_deviation=first, kl=distributed.total(kl) / max(1.0, distributed.total(counted)))
    loop.log(**{f"clipped/{stage}": sum(shares) / len(shares) for stage, shares in clipped.items()})


def _loss(
    new: Tensor, old: Tensor, reference: Tensor | None, advantage_B: Tensor, scored: Tensor, credit: Tensor | None,
    lengths_B: Tensor, whole: float, how: How,
) -> grpo.Loss:  # fmt: skip
    """One micro-batch's share of an update's loss."""
    if how.level == "sequence":
        means = [
            value if value is None else (value * scored).sum(1, keepdim=True) / lengths_B[:, None].clamp(min=1)
            for value in (new, old, reference)
        ]
        assert means[0] is not None and means[1] is not None
        return grpo.surrogate(means[0], means[1], advantage_B, lengths_B[:, None] > 0, how.objective, means[2], normaliser=whole)
    divergence = None
    if how.kl_to_old:
        # Summed, not averaged, over a state's tokens: the mean's divisor is taken back.
        divergence = grpo.kl(new, old, how.objective.kl) * scored.sum(1, keepdim=True)
    return grpo.surrogate(
        new, old, advantage_B, scored, how.objective, reference, credit, whole, divergence,
        None if how.reduction == "state_mean" else lengths_B,
    )  # fmt: skip


def _normaliser(one: choices.Update, how: How) -> float:
    """Z of a whole update, over micro-batches and processes."""
    if how.reduction == "token_mean":
        return distributed.total(one.tokens.sum())
    if how.reduction == "sample_mean":
        return distributed.total(len(one.tokens))
    return distributed.total(sum(int(scored.any(1).sum()) for scored in one.scored.values()))


def _any(masks: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(masks)).any(0)


def _score(model: Any, loop: Loop, rollout: Rollout, hidden_BN: Tensor | None, scored_BN: Tensor, rows: list[int], which: Which) -> Tensor:
    """[b, N] log-probabilities of the rows' scored tokens in one state, 0 elsewhere."""
    drawn = rollout.drawn.select(rows)
    with loop.autocast():
        if hidden_BN is None:
            prompts = rollout.encoded.select([row // rollout.group for row in rows[:: rollout.group]])
            return model.log_prob_blank(prompts, drawn, scored_BN[rows], which)
        prompts = rollout.encoded.select([row // rollout.group for row in rows])
        return model.log_prob_given(prompts, drawn, hidden_BN[rows], scored_BN[rows], which)


def _score_all(model: Any, loop: Loop, rollout: Rollout, hidden_BN: Tensor | None, scored_BN: Tensor, how: How) -> Tensor:
    batches = rollout.batches(how.micro_batch, hidden_BN is None)
    return torch.cat([_score(model, loop, rollout, hidden_BN, scored_BN, rows, how.log_prob) for rows in batches])


def advantages_of(scored: RewardBatch, group: int, rule: grpo.AdvantageRule) -> grpo.Advantages:
    """Group advantages of a reward; rewards are clipped as `Reward.clip` says before anything else."""
    if rule.combine == "sum_then_normalize":
        parts, weights = {"total": scored.total}, {"total": 1.0}
    else:
        parts, weights = dict(scored.clipped), dict(scored.weights)
    grouped = {name: rearrange(torch.from_numpy(values), "(p g) -> p g", g=group) for name, values in parts.items()}
    return grpo.advantages(grouped, weights, rearrange(torch.from_numpy(scored.ok), "(p g) -> p g", g=group), rule)


def log_surprise(loop: Loop, rollout: Rollout, is_structure_BN: Tensor) -> None:
    """Mean of -log p of what was drawn, in the state it was drawn from, for the tokens decided first and for the rest: what the hierarchy
    rests on is that the first is greater."""
    for name, mask_BN in (("structure", is_structure_BN), ("refinement", ~is_structure_BN)):
        count = max(1.0, distributed.total(mask_BN.sum()))
        loop.log(**{f"surprise/{name}": distributed.total(-(rollout.drawn.log_prob * mask_BN).sum()) / count})


def keep_group(model: Any, loop: Loop, rollout: Rollout, scored: RewardBatch, rank_BN: Tensor, size: tuple[int, int] | None) -> None:
    """The first prompt's pictures with their rewards; beside each the order of its tokens, from the last (grey) to the first (red)."""
    if not loop.shows:
        return
    grid = model.grid if size is None else model.grid_of(size)
    pictures = [sample.image for sample in rollout.samples[: min(rollout.group, GROUP_SHOWN)]]
    maps_BDD = normalise(-rank_BN[: len(pictures)].float().cpu().unflatten(1, grid))
    pairs = [np.concatenate([image, overlay(image, shown)], axis=1) for image, shown in zip(pictures, maps_BDD, strict=True)]
    rewards = [f"reward {total:.3f}" if ok else "no reward" for total, ok in zip(scored.total, scored.ok, strict=True)]
    loop.keep("rollouts", list(zip(pairs, rewards, strict=False)), rollout.prompts[0].text)
