"""What the autoregressive methods share: a group's rollout, its log-probabilities, and the update. The methods choose reward and credit.

A group is one prompt's G reasoning texts times K pictures each (G pictures when there is no reasoning). Decisions of a sample are its
reasoning tokens, then its image tokens. Source of the shape: T2I-R1 (CaraJ7/T2I-R1 2d9d4d1, grpo_trainer.py).

Legend: P prompts, B samples = P*G*K, L reasoning tokens, N image tokens, S = L + N decisions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mmalign import distributed, grpo
from mmalign.attribution import normalise, overlay
from mmalign.loop import Loop, LoopConfig
from mmalign.reward import RewardBatch
from mmalign.trajectory import Policy, Prompts, TextTrajectory, Trajectory, Which
from mmalign.types import Prompt, Request, Sample, UsageError

GROUP_SHOWN = 8  # pictures of a group that are kept to be looked at


@dataclass(frozen=True)
class AutoregressiveConfig(LoopConfig):
    """Options of every autoregressive GRPO; defaults are T2I-R1's (run_grpo.sh) unless a method says otherwise."""

    steps: int = 1600
    learning_rate: float = 1e-6
    prompts_per_step: int = 8  # P, over all processes
    samples: int = 8  # G: reasoning texts of a prompt, or pictures when there is no reasoning
    images: int = 1  # K: pictures of a reasoning text
    instruction: str = (
        'Before an image is drawn for the prompt "{prompt}", describe briefly what it should show: '
        "every object, its attributes, and where it stands. Answer with the description alone."
    )
    reasoning: bool = True
    reasoning_tokens: int = 256
    reasoning_temperature: float = 1.0
    guidance: float = 5.0
    temperature: float = 1.0
    log_prob: Which = "cond"  # T2I-R1 samples with guidance and scores without; `guided` scores what was sampled from
    inner_epochs: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.01
    kl: grpo.KLForm = "k3"
    reduction: grpo.Reduction = "token_mean"
    ddof: int = 1
    epsilon: float = 1e-4
    scope: grpo.Scope = "group"
    combine: grpo.Combine = "sum_then_normalize"

    def __post_init__(self) -> None:
        if self.samples * self.images < 2:
            raise ValueError(f"a group needs at least two pictures to compare, got samples={self.samples} x images={self.images}")
        if self.reasoning and "{prompt}" not in self.instruction:
            raise ValueError("instruction must contain {prompt}")

    @property
    def group(self) -> int:
        return self.samples * (self.images if self.reasoning else 1)

    @property
    def sampling(self) -> Mapping[str, Any]:
        """How the trained model, and its base beside it, is evaluated: it reasons as it was trained to."""
        if not self.reasoning:
            return {}
        return {
            "instruction": self.instruction,
            "reasoning_temperature": self.reasoning_temperature,
            "reasoning_tokens": self.reasoning_tokens,
        }

    @property
    def advantage_rule(self) -> grpo.AdvantageRule:
        return grpo.AdvantageRule(self.ddof, self.epsilon, self.scope, self.combine)

    @property
    def objective(self) -> grpo.Objective:
        return grpo.Objective(self.clip_low, self.clip_high, self.beta, self.kl, self.reduction)


@dataclass(frozen=True)
class Rollout:
    """What one step made, B rows; rows of one prompt are neighbours."""

    prompts: list[Prompt]  # P
    samples: list[Sample]  # B, with images
    encoded: Prompts
    drawn: Trajectory
    pixels: Tensor  # [B, 3, H, W] in [0, 1]
    questions: list[str] | None = None  # of the reasoning, one per row
    thoughts: TextTrajectory | None = None  # B rows: a text is repeated for each of its pictures


def make_rollout(model: Any, loop: Loop, prompts: Sequence[Prompt], config: AutoregressiveConfig) -> Rollout:
    """Reasoning texts, then pictures, each from its own seed."""
    rows = [prompt for prompt in prompts for _ in range(config.group)]
    questions, thoughts = None, None
    with loop.rollout(), loop.autocast():
        if config.reasoning:
            asked = [config.instruction.format(prompt=prompt.text) for prompt in prompts for _ in range(config.samples)]
            seeds = loop.seeds(prompts, config.samples, "reasoning")
            written = model.generate_text(asked, None, seeds, config.reasoning_temperature, config.reasoning_tokens)
            order = [row for row in range(len(asked)) for _ in range(config.images)]
            questions, thoughts = [asked[row] for row in order], _rows_of(written, order)
        texts = [prompt.text for prompt in rows]
        encoded = model.encode_prompts(texts, reasoning=None if thoughts is None else list(thoughts.texts))
        drawn = model.sample(encoded, Policy(config.guidance, config.temperature), loop.seeds(prompts, config.group, "image"))
        every = torch.arange(len(rows)).split(config.micro_batch)
        pixels = torch.cat([model.render(encoded.select(part.tolist()), drawn.select(part.tolist())) for part in every])
    # Cut off, not rounded, exactly as `Model.generate` makes its pictures, so that a reward equals a benchmark's value.
    images = rearrange((pixels * 255).to(torch.uint8), "b c h w -> b h w c").cpu().numpy()
    samples = [
        Sample(
            Request(prompt, index, seed),
            image=np.ascontiguousarray(image),
            extra={} if thoughts is None else {"reasoning": thoughts.texts[index]},
        )
        for index, (prompt, image, seed) in enumerate(zip(rows, images, drawn.seeds, strict=True))
    ]
    return Rollout(list(prompts), samples, encoded, drawn, pixels, questions, thoughts)


def _rows_of(thoughts: TextTrajectory, rows: list[int]) -> TextTrajectory:
    return replace(
        thoughts,
        texts=tuple(thoughts.texts[row] for row in rows),
        ids=thoughts.ids[rows],
        mask=thoughts.mask[rows],
        log_prob=thoughts.log_prob[rows],
        seeds=tuple(thoughts.seeds[row] for row in rows),
    )


def decisions(model: Any, rollout: Rollout, rows: list[int], config: AutoregressiveConfig) -> tuple[Tensor, Tensor]:
    """Log-probabilities [b, S] float32 of the rows' reasoning tokens and image tokens, and which of them are real."""
    image = model.log_prob(rollout.encoded.select(rows), rollout.drawn.select(rows), config.log_prob)
    every = torch.ones_like(image, dtype=torch.bool)
    if rollout.thoughts is None or rollout.questions is None:
        return image, every
    thoughts = _rows_of(rollout.thoughts, rows)
    questions = [rollout.questions[row] for row in rows]
    text = model.text_tokens_log_prob(questions, None, thoughts.ids, thoughts.mask, thoughts.temperature)
    return torch.cat([text, image], 1), torch.cat([thoughts.mask, every], 1)


def grouped(values_B: np.ndarray, config: AutoregressiveConfig) -> Tensor:
    """[B] figures of samples as [P, G*K]."""
    return rearrange(torch.from_numpy(np.asarray(values_B)), "(p g) -> p g", g=config.group)


def advantages_of(scored: RewardBatch, config: AutoregressiveConfig) -> grpo.Advantages:
    """Group advantages of a reward, by the configured rule; rewards are clipped as `Reward.clip` says before anything else."""
    if config.combine == "sum_then_normalize":
        parts, weights = {"total": scored.total}, {"total": 1.0}
    else:
        parts, weights = dict(scored.clipped), dict(scored.weights)
    ok_PG = grouped(scored.ok, config)
    return grpo.advantages({name: grouped(value, config) for name, value in parts.items()}, weights, ok_PG, config.advantage_rule)


def update(
    model: Any, loop: Loop, rollout: Rollout, advantage_B: Tensor, config: AutoregressiveConfig, image_weight_BN: Tensor | None = None
) -> None:
    """`inner_epochs` optimiser steps on the rollout. `image_weight_BN` multiplies the advantage of image tokens; text tokens weigh 1.

    Old and reference log-probabilities come from the same forward as the new ones, never from the sampler's cache. With one inner epoch
    the old ones are the new ones detached, as in T2I-R1: the ratio is 1 and its gradient is the policy gradient.
    """
    rows = list(range(len(rollout.samples)))
    batches = [rows[at : at + config.micro_batch] for at in range(0, len(rows), config.micro_batch)]
    with loop.timer("old_and_reference"), torch.no_grad():
        old = dict(_score(model, loop, rollout, batches, config)) if config.inner_epochs > 1 else {}
        reference = {}
        if config.beta:
            with loop.reference():
                reference = dict(_score(model, loop, rollout, batches, config))
    normaliser = _normaliser(rollout, config)
    kl = clipped = count = deviation = 0.0
    for epoch in range(config.inner_epochs):
        with loop.timer("update"):
            for number, batch in enumerate(batches):
                with loop.autocast():
                    new, mask = decisions(model, rollout, batch, config)
                weight = None
                if image_weight_BN is not None:
                    weight = torch.ones_like(new)
                    weight[:, -image_weight_BN.shape[1] :] = image_weight_BN[batch].to(new)
                loss = grpo.surrogate(
                    new, old.get(number, new.detach()), advantage_B[batch].to(new.device), mask, config.objective,
                    reference.get(number), weight, normaliser,
                )  # fmt: skip
                loop.backward(
                    loss.total, {"log_prob": new, "advantage": advantage_B[batch]}, [rollout.samples[row].request.prompt for row in batch]
                )
                kl, clipped, count = kl + float(loss.kl), clipped + float(loss.clipped), count + float(loss.decisions)
                if epoch == 0:
                    deviation = max(deviation, float(loss.ratio_deviation))
            loop.update()
    total = distributed.total(count)
    first = distributed.largest(deviation)
    if first > 1e-2:
        raise UsageError(
            f"Step {loop.step}: before any update the ratio of new to old policy is off by {first:.2g} (expected 0). "
            "Sampling and scoring disagree; train in float32 or set log_prob to match the sampler."
        )
    loop.log(ratio_deviation=first, kl=distributed.total(kl) / total, clipped=distributed.total(clipped) / total)


def _score(
    model: Any, loop: Loop, rollout: Rollout, batches: list[list[int]], config: AutoregressiveConfig
) -> Iterator[tuple[int, Tensor]]:
    for number, batch in enumerate(batches):
        with loop.autocast():
            yield number, decisions(model, rollout, batch, config)[0]


def _normaliser(rollout: Rollout, config: AutoregressiveConfig) -> float:
    """Z of the whole step, over micro-batches and processes."""
    n_image = rollout.drawn.actions.numel()
    n_text = 0 if rollout.thoughts is None else int(rollout.thoughts.mask.sum())
    match config.reduction:
        case "token_mean":
            return distributed.total(n_image + n_text)
        case "sample_mean":
            return distributed.total(len(rollout.samples))
        case "constant":
            longest = rollout.drawn.actions.shape[1] + (config.reasoning_tokens if config.reasoning else 0)
            return distributed.total(len(rollout.samples) * longest)


def log_rewards(loop: Loop, scored: RewardBatch, advantages: grpo.Advantages) -> None:
    """Means over all processes, the share of samples without a reward, and the groups that teach nothing."""
    usable = distributed.total(float(scored.ok.sum()))

    def mean(values_B: np.ndarray) -> float:
        return distributed.total(float(values_B[scored.ok].sum())) / max(1.0, usable)

    loop.log(reward=mean(scored.total), **{f"reward/{name}": mean(values) for name, values in scored.parts.items()})
    loop.log(failed=1 - usable / distributed.total(len(scored.ok)))
    loop.log(flat_groups=distributed.total(advantages.flat_groups), spread=distributed.total(advantages.spread) / distributed.world())


def keep_group(
    model: Any, loop: Loop, rollout: Rollout, scored: RewardBatch, config: AutoregressiveConfig, image_weight_BN: Tensor | None = None
) -> None:
    """The first prompt's pictures with their rewards; beside each its token weights, from the least (grey) to the greatest (red)."""
    if not loop.shows:
        return
    pictures = [sample.image for sample in rollout.samples[: min(config.group, GROUP_SHOWN)]]
    if image_weight_BN is not None:
        maps_BDD = normalise(image_weight_BN[: len(pictures)].detach().cpu().unflatten(1, model.grid))
        pictures = [np.concatenate([image, overlay(image, shown)], axis=1) for image, shown in zip(pictures, maps_BDD, strict=True)]
    rewards = [f"reward {total:.3f}" if ok else "no reward" for total, ok in zip(scored.total, scored.ok, strict=True)]
    loop.keep("rollouts", list(zip(pictures, rewards, strict=False)), rollout.prompts[0].text)
