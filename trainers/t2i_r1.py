"""T2I-R1: reason about the scene in words, draw it token by token, and reinforce both with one group-relative objective.

Paper: T2I-R1 (arXiv 2505.00703); code CaraJ7/T2I-R1 2d9d4d1. For each prompt the model writes G reasoning texts and draws K pictures
from each ("{prompt}. {reasoning}"); the group's rewards, summed without weights there (HPSv2 + GIT + GroundingDINO + ORM), become
advantages; reasoning tokens and image tokens enter one token-mean loss with a k3 KL to the starting model.
Changed: prompts in a batch never attend to padding; the ratio can be taken under the guided policy (`log_prob`), the official
default `cond` samples with guidance 5 and scores without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.trainers import _autoregressive as ar

from mmalign.loop import Loop
from mmalign.reward import Reward
from mmalign.types import Prompt

REWARD = "hpsv2=1,git=1,groundingdino=1,orm=1"


@dataclass(frozen=True)
class Config(ar.AutoregressiveConfig):
    """The official script's values; G x K is 8 x 1 there."""


def train(config: Config, model: Any, reward: Reward, prompts: Sequence[Prompt], loop: Loop) -> None:
    for _ in loop.steps():
        with loop.timer("rollout"):
            rollout = ar.make_rollout(model, loop, loop.draw(prompts, config.prompts_per_step), config)
        with loop.timer("reward"):
            scored = reward(rollout.samples)
        advantages = ar.advantages_of(scored, config)
        ar.update(model, loop, rollout, advantages.value.flatten(), config)
        ar.log_rewards(loop, scored, advantages)
        ar.keep_group(model, loop, rollout, scored, config)
