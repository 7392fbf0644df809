"""Dense rewards for autoregressive image GRPO: each image token is credited by how much its patch earned the score.

Paper: dense-reward (T2I-R1-Dense), eq. 10-14. Advantages come from scalar rewards
alone, A = (R - mean) / std over the group; a map m in [0, 1] of one scorer's score (SHAP, its fast form, LIME, Grad-CAM, RAHF) then
weighs the image tokens, w = 1 + lambda m, and reasoning tokens keep weight 1. lambda > 0 for what helps a preference score, < 0 for maps of
faults (RAHF).
Controls that the paper lacks: `control=permuted` (right weights, wrong places), `control=mean` (the same mean weight everywhere, so
that only the step grows), tool `oracle` (an exact heat map), `unit_mean` (weights divided by their mean, which the text of the paper
implies and its formula does not).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from mmalign.trainers import _autoregressive as ar
from torch import Tensor

from mmalign.attribution import AmortisedHead, Attribution, FeatureScorer, PixelScorer, Tool, attribute, entropy, token_weights, top_mass
from mmalign.loop import Loop
from mmalign.reward import Reward
from mmalign.types import Prompt, Scorer, UsageError

REWARD = "hpsv2=1,git=1,groundingdino=1,orm=1"
NO_ADVANTAGE = 1e-9  # what rounding leaves of the advantages of equal rewards is below this


@dataclass(frozen=True)
class Config(ar.AutoregressiveConfig):
    """The paper's values (its Table 8): lambda 0.1, G = K = 8, learning rate 1e-6, KL 0.01, 1600 steps, guidance 5."""

    images: int = 8
    attribution: Tool = "fast_shap"
    explain: str = ""  # the reward's scorer whose score is mapped; empty: the first that shows its pixels' credit
    strength: float = 0.1  # lambda
    unit_mean: bool = False
    control: Literal["none", "permuted", "mean"] = "none"
    tool: Attribution = field(default_factory=Attribution)  # grid, blur and budgets of the tools


def train(config: Config, model: Any, reward: Reward, prompts: Sequence[Prompt], loop: Loop) -> None:
    scorer = explained_scorer(reward, config.explain, config.attribution)
    head = make_head(scorer, model, loop) if config.attribution == "amortised" else None
    for _ in loop.steps():
        with loop.timer("rollout"):
            rollout = ar.make_rollout(model, loop, loop.draw(prompts, config.prompts_per_step), config)
        with loop.timer("reward"):
            scored = reward(rollout.samples)
        advantages = ar.advantages_of(scored, config)
        advantage_B = advantages.value.flatten()
        with loop.timer("attribution"), loop.rollout(), torch.enable_grad():
            weight_BN = credit(config, scorer, model, rollout, advantage_B, loop, head)
        ar.update(model, loop, rollout, advantage_B, config, weight_BN)
        ar.log_rewards(loop, scored, advantages)
        ar.keep_group(model, loop, rollout, scored, config, weight_BN)


def credit(
    config: Config, scorer: Scorer, model: Any, rollout: ar.Rollout, advantage_B: Tensor, loop: Loop, head: AmortisedHead | None = None
) -> Tensor:
    """Weights [B, N] of image tokens: one attribution of all pictures of the step at once, on the model's own token grid.

    A picture without advantage (of a group whose rewards are all equal, or without a reward) teaches nothing whatever its weights:
    it is not explained, and they are 1. Nothing else about the update changes.
    """
    live = (advantage_B.abs() > NO_ADVANTAGE).nonzero().flatten()
    weight_BN = torch.ones(rollout.drawn.actions.shape, device=rollout.drawn.actions.device)
    loop.log(explained=len(live) / len(advantage_B))
    if not len(live):
        return weight_BN
    options = replace(config.tool, tool=config.attribution, seed=config.seed)
    asked = [rollout.samples[row].request.prompt for row in live.tolist()]
    maps = attribute(options, scorer, rollout.pixels[live.to(rollout.pixels.device)], asked, head)
    if maps.sign * config.strength < 0 and config.control == "none":
        loop.log(wrong_sign=1.0)  # a map of faults with a positive lambda rewards the faults
    found_LN = token_weights(maps.weights, config.strength, model.grid, config.unit_mean).float()
    if config.control == "permuted":
        generator = torch.Generator().manual_seed(loop.seeds(rollout.prompts[:1], 1, "permutation")[0])
        order = torch.stack([torch.randperm(found_LN.shape[1], generator=generator) for _ in found_LN]).to(found_LN.device)
        found_LN = found_LN.gather(1, order)
    elif config.control == "mean":
        found_LN = found_LN.mean(1, keepdim=True).expand_as(found_LN)
    loop.log(
        map_top_mass=float(top_mass(maps.weights).mean()),
        map_entropy=float(entropy(maps.weights).mean()),
        map_evaluations=maps.evaluations,
        weight_mean=float(found_LN.mean()),
    )
    weight_BN[live.to(weight_BN.device)] = found_LN.to(weight_BN.device)
    return weight_BN


def explained_scorer(reward: Reward, name: str, tool: str) -> Scorer:
    """The scorer to attribute: the named one, else the first that can be asked about masked pixels, else the first (as a black box)."""
    if name and name not in reward.scorers:
        raise UsageError(f"explain={name}: the reward has no scorer '{name}'; it has {', '.join(reward.scorers)}.")
    if name:
        return reward.scorers[name]
    first = next(iter(reward.scorers.values()))
    if tool in ("oracle", "rahf"):
        return first
    return next((scorer for scorer in reward.scorers.values() if isinstance(scorer, PixelScorer)), first)


def make_head(scorer: Scorer, model: Any, loop: Loop) -> AmortisedHead:
    """The head of the tool `amortised`, which learns beside the model and continues with it."""
    if not isinstance(scorer, FeatureScorer):
        raise UsageError(f"The tool 'amortised' needs a scorer that shows its patch features; '{scorer.name}' does not. Use fast_shap.")
    with torch.no_grad():
        channels = scorer.patch_tokens(torch.zeros(1, 3, *model.size, device=model.device)).shape[1]
    head = AmortisedHead(scorer, channels, device=str(model.device))
    loop.join("head", head.state())
    return head
