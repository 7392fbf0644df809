"""What the methods on denoising steps share: a group's rollout, the rewards of its states, and the update. The method chooses the credit.

A decision is one noisy step of one sample: state x_t, action x_(t-1). Decisions of a micro-batch may be of any samples and steps, because
every row of a forward has its own time.

Legend: P prompts, G samples of a prompt, B = P*G samples, K denoising steps (step k leaves timestep t = K - k), R decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign import distributed, grpo, sde
from mmalign.loop import Loop
from mmalign.reward import Reward, RewardBatch
from mmalign.trajectory import Policy, Prompts, Trajectory, Which
from mmalign.types import Prompt, Request, Sample, UsageError

Pairs = list[tuple[int, int]]  # (sample, step)


@dataclass(frozen=True)
class Rollout:
    """What one step drew, B rows; rows of one prompt are neighbours."""

    rows: list[Prompt]  # B: each prompt G times
    encoded: Prompts
    drawn: Trajectory


@dataclass(frozen=True)
class StateRewards:
    """`total` [B, S] float64 is the reward of S states of each sample, the finished picture last; NaN where it has none.

    `final` is what the reward said of the finished pictures; `pictures` are those, uint8 [H, W, 3].
    """

    total: np.ndarray
    final: RewardBatch
    pictures: list[Any]


def make_rollout(
    model: Any, loop: Loop, rows: Sequence[Prompt], policy: Policy, seeds: Sequence[int], size: tuple[int, int] | None
) -> Rollout:
    """One trajectory per row, each from its own seed."""
    with loop.rollout(), loop.autocast():
        encoded = model.encode_prompts([prompt.text for prompt in rows])
        return Rollout(list(rows), encoded, model.sample(encoded, policy, list(seeds), size))


def reward_states(model: Any, loop: Loop, rollout: Rollout, reward: Reward, ode_steps: int | None) -> StateRewards:
    """Rewards of the finished pictures (`ode_steps` None), or of every state's completion by that many deterministic steps (0: all that
    remain), decoded and scored in one call."""
    with loop.rollout(), loop.autocast():
        if ode_steps is None:
            latents = rollout.drawn.actions[:, -1:]
        else:
            latents = model.complete(rollout.encoded, rollout.drawn, ode_steps)
        count, states = latents.shape[:2]
        pictures = model.pictures(latents.flatten(0, 1))
    samples = [
        Sample(Request(rollout.rows[row], row, rollout.drawn.seeds[row]), image=pictures[row * states + state])
        for row in range(count)
        for state in range(states)
    ]
    scored = reward(samples)
    last = slice(states - 1, None, states)
    final = RewardBatch(
        total=scored.total[last],
        parts={name: values[last] for name, values in scored.parts.items()},
        clipped={name: values[last] for name, values in scored.clipped.items()},
        ok=scored.ok[last],
        weights=scored.weights,
        scores={name: values[last] for name, values in scored.scores.items()},
        failures=scored.failures,
    )
    return StateRewards(scored.total.reshape(count, states), final, pictures[last])


def advantages(values_BK: np.ndarray, samples: int, rule: grpo.AdvantageRule) -> Tensor:
    """[B, K] group-relative advantages of each step's own values, those of all processes together; 0 where a value is NaN."""
    whole = np.stack(distributed.gather(list(values_BK)))
    made = []
    for column in torch.from_numpy(whole).T:
        groups = column.reshape(-1, samples)
        made.append(grpo.advantages({"step": groups}, {"step": 1.0}, ~groups.isnan(), rule).value.flatten())
    start = distributed.rank() * len(values_BK)
    return torch.stack(made, 1)[start : start + len(values_BK)]


@dataclass(frozen=True)
class Update:
    """How decisions become a gradient. `kl` is a form of `grpo.kl`, or the exact Gaussian one with |dt| (`gaussian`) or without it, as
    flow_grpo computes it (`gaussian_nodt`)."""

    objective: grpo.Objective
    kl: str
    log_prob: Which
    inner_epochs: int
    micro_batch: int


def update(model: Any, loop: Loop, rollout: Rollout, advantage_BK: Tensor, steps: Sequence[int], how: Update) -> None:
    """`inner_epochs` optimiser steps on the decisions of these steps, one mean over all of them.

    Old and reference values come from the same forward as the new ones. With one inner epoch the old ones are the new ones detached: the
    ratio is 1 and its gradient is the policy gradient. `ratio_deviation` compares with what the sampler itself recorded.
    """
    pairs = [(row, step) for step in steps for row in range(len(rollout.rows))]
    batches = [pairs[at : at + how.micro_batch] for at in range(0, len(pairs), how.micro_batch)]
    with loop.timer("old_and_reference"), torch.no_grad():
        old = [_score(model, loop, rollout, batch, how).log_prob for batch in batches] if how.inner_epochs > 1 else None
        reference = None
        if how.objective.beta:
            with loop.reference():
                scored = [_score(model, loop, rollout, batch, how) for batch in batches]
                reference = [one.step.mean if how.kl.startswith("gaussian") else one.log_prob for one in scored]
    normaliser = distributed.total(len(pairs))
    kl = clipped = deviation = 0.0
    for epoch in range(how.inner_epochs):
        with loop.timer("update"):
            for number, batch in enumerate(batches):
                now = _score(model, loop, rollout, batch, how)
                rows, at = (list(column) for column in zip(*batch, strict=True))
                credit = advantage_BK[rows, at].to(now.log_prob.device)
                divergence = reference_log_prob = None
                if reference is not None and how.kl.startswith("gaussian"):
                    spread = now.step.std if how.kl == "gaussian" else now.step.rate
                    divergence = sde.divergence(now.step.mean, reference[number], spread)[:, None]
                elif reference is not None:
                    reference_log_prob = reference[number][:, None]
                new = now.log_prob[:, None]
                loss = grpo.surrogate(
                    new,
                    new.detach() if old is None else old[number][:, None],
                    credit[:, None],
                    torch.ones_like(new, dtype=torch.bool),
                    how.objective,
                    reference_log_prob,
                    normaliser=normaliser,
                    divergence=divergence,
                )
                loop.backward(loss.total, {"log_prob": new, "advantage": credit}, [rollout.rows[row] for row in rows])
                kl, clipped = kl + float(loss.kl), clipped + float(loss.clipped)
                if epoch == 0:
                    recorded = rollout.drawn.log_prob[rows, at].to(new.device)
                    deviation = max(deviation, float(((now.log_prob.detach() - recorded).exp() - 1).abs().max()))
            loop.update()
    total = normaliser * how.inner_epochs
    first = distributed.largest(deviation)
    _check_ratio(loop, first, rollout.drawn.policy, how.log_prob)
    loop.log(ratio_deviation=first, kl=distributed.total(kl) / total, clipped=distributed.total(clipped) / total)


def _score(model: Any, loop: Loop, rollout: Rollout, batch: Pairs, how: Update) -> Any:
    rows, steps = zip(*batch, strict=True)
    with loop.autocast():
        return model.score(rollout.encoded, rollout.drawn, list(rows), list(steps), how.log_prob)


def _check_ratio(loop: Loop, deviation: float, policy: Policy, which: Which) -> None:
    is_same_policy = which != "cond" or policy.guidance == 1
    if is_same_policy and loop.config.autocast == "none" and deviation > 1e-2:
        raise UsageError(
            f"Step {loop.step}: before any update the ratio of new to old policy is off by {deviation:.2g} (expected 0). Sampling and "
            "scoring disagree: leave out the last step (timestep_fraction below 1), whose noise is tiny, or train in float32."
        )


def log_rewards(loop: Loop, scored: StateRewards, samples: int) -> None:
    """Means over all processes, the share of samples without a reward, the groups that teach nothing, and the gain of every step."""
    final = scored.final
    usable = distributed.total(float(final.ok.sum()))

    def mean(values_B: np.ndarray) -> float:
        return distributed.total(float(values_B[final.ok].sum())) / max(1.0, usable)

    loop.log(reward=mean(final.total), **{f"reward/{name}": mean(values) for name, values in final.parts.items()})
    loop.log(failed=1 - usable / distributed.total(len(final.ok)))
    groups = torch.from_numpy(final.total).reshape(-1, samples)
    found = grpo.advantages({"total": groups}, {"total": 1.0}, ~groups.isnan())
    loop.log(flat_groups=distributed.total(found.flat_groups), spread=distributed.total(found.spread) / distributed.world())
    for k, gain_B in enumerate(np.diff(scored.total, axis=1).T):
        known = gain_B[~np.isnan(gain_B)]
        count = max(1.0, distributed.total(len(known)))
        loop.log(**{f"gain/step_{k}": distributed.total(float(known.sum())) / count})
        loop.log(**{f"positive/step_{k}": distributed.total(float((known > 0).sum())) / count})
        loop.log(**{f"negative/step_{k}": distributed.total(float((known < 0).sum())) / count})
