"""GvU: a unified model rewards its own pictures by how well it understands them as their prompts. No outside model, no outside picture.

Paper: GvU (arXiv 2603.06043, eq. 1-8). For each prompt the model draws G pictures, looks at each with its understanding branch, and the
reward is the geometric mean of the probabilities it gives to the prompt's own tokens,
    R_i = exp( (1/L) sum_j ln p(T_j | instruction, I_i, T_<j) )                                                       (eq. 5-6)
which is teacher forcing: nothing is sampled. Group advantages of R_i drive the image tokens (eq. 7-8).
Not stated in the paper, chosen here: per-token ratios (as TRL-based code takes them), LoRA of rank 16, G = 8, the `live` teacher (the
weights that are being trained also judge). `teacher=frozen` judges with the weights that training began with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from mmalign.trainers import _autoregressive as ar

from mmalign import grpo
from mmalign.loop import Loop
from mmalign.reward import Reward, RewardBatch
from mmalign.types import Prompt, UsageError

REWARD = None  # the model's own understanding; a reward that is given is measured and logged, never optimised


@dataclass(frozen=True)
class Config(ar.AutoregressiveConfig):
    steps: int = 12_000
    reasoning: bool = False
    lora_rank: int = 16
    lora_alpha: int = 32
    teacher: Literal["live", "frozen"] = "live"
    question: str = "Describe the image."
    mean: Literal["geometric", "product", "arithmetic"] = "geometric"


def train(config: Config, model: Any, reward: Reward | None, prompts: Sequence[Prompt], loop: Loop) -> None:
    if "answer" not in model.capabilities:
        raise UsageError(f"GvU needs a model that understands pictures; {model.name} ({model.family}) has no understanding branch.")
    for _ in loop.steps():
        with loop.timer("rollout"):
            rollout = ar.make_rollout(model, loop, loop.draw(prompts, config.prompts_per_step), config)
        with loop.timer("reward"):
            scored = understanding(model, loop, rollout, config)
            watched = None if reward is None else reward(rollout.samples)
        advantages = ar.advantages_of(scored, config)
        ar.update(model, loop, rollout, advantages.value.flatten(), config)
        ar.log_rewards(loop, scored, advantages)
        if watched is not None:
            loop.log(**{f"watched/{name}": float(np.nanmean(values)) for name, values in watched.parts.items()})
        ar.keep_group(model, loop, rollout, scored, config)


def understanding(model: Any, loop: Loop, rollout: ar.Rollout, config: Config) -> RewardBatch:
    """The reward of each picture of the rollout, judged from its decoded pixels."""
    values = []
    with loop.rollout(), loop.reference() if config.teacher == "frozen" else nullcontext():
        for rows in torch.arange(len(rollout.samples)).split(config.micro_batch):
            samples = [rollout.samples[row] for row in rows.tolist()]
            texts = [sample.request.prompt.text for sample in samples]
            with loop.autocast():
                log_prob, mask = model.text_log_prob([config.question] * len(texts), [s.image for s in samples], texts)
            values.append(grpo.sequence_probability(log_prob.float(), mask, config.mean))
    total = torch.cat(values).double().cpu().numpy()
    name = "self_understanding"
    return RewardBatch(total, {name: total}, {name: total}, ~np.isnan(total), {name: 1.0}, {})
