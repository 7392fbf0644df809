"""HT-GRPO: masked models learn first where things stand, then how they look: updates by stages, credit by the order of unmasking.

Paper: HT-GRPO (arXiv 2605.16842; no public code), built on MaskGRPO (martian422/MaskGRPO b74ba3c). A group is drawn, and each token's
rank in the order of unmasking is kept. The floor(alpha N) first tokens are the structure. K updates on the same group follow in stages:
all tokens, the structure, the rest; each takes a random part of its tokens, fewer from update to update (eq. 8). Ratios are taken with the
whole image hidden (eq. 9), so one forward of a prompt serves all its samples, and the advantage counts 1.5 on the structure and 0.5 on
the rest (eq. 10). The other methods are other choices of the same three things:

    method      decisions                             context of the ratio      credit   ratio of
    ht_grpo     a random part of a stage              everything hidden         1.5/0.5  each token
    mask_grpo   tokens masked anew, ever more         the others visible        1        each token
    uni_grpo    the same, shares evenly spaced        the others visible        1        the sample's mean log-probability
    trace_grpo  all tokens                            the states it was drawn   1        each token
                                                      from, `shrink` steps each

Not public, chosen here: weights of the reward (1 of each on MaskGRPO's scale, which divides HPSv3 by 5), clip 0.2 (MaskGRPO's other
script has 0.001), subsets by a coin for each token, the family's own sampler and steps (MaskGRPO's: `order=random`, 12 steps), K = 8 of
the baselines without a published one. Changed: LoRA has no dropout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

import torch
from mmalign.trainers import _autoregressive as ar
from mmalign.trainers import _masked as masked
from mmalign.trainers import _masked_choices as choices
from torch import Tensor

from mmalign import grpo
from mmalign.loop import Loop, LoopConfig
from mmalign.reward import Reward
from mmalign.trajectory import Policy, Which
from mmalign.types import Prompt, UsageError

REWARD = "hpsv3=0.2,clipscore=1,unifiedreward=1"

Method = Literal["ht_grpo", "mask_grpo", "uni_grpo", "trace_grpo"]
Decisions = Literal["stages", "remasked", "all"]
Context = Literal["blank", "structure", "visible", "trajectory"]
Masking = Literal["progressive", "spaced"]
Level = Literal["token", "sequence"]
Order = Literal["surest", "random"]

OWN: Mapping[Method, Mapping[str, Any]] = {
    "ht_grpo": {"decisions": "stages", "context": "blank", "credit": (1.5, 0.5), "reduction": "sample_mean"},
    "mask_grpo": {"decisions": "remasked", "context": "visible", "updates": 6, "order": "random", "denoising_steps": 12},
    "uni_grpo": {"decisions": "remasked", "context": "visible", "masking": "spaced", "level": "sequence", "reduction": "sample_mean"},
    "trace_grpo": {"decisions": "all", "context": "trajectory", "reduction": "sample_mean"},
}
REST: Mapping[str, Any] = {
    **{"updates": 8, "masking": "progressive", "level": "token", "credit": (1.0, 1.0)},
    **{"reduction": "token_mean", "order": "surest", "denoising_steps": 0},
}


@dataclass(frozen=True)
class Config(LoopConfig):
    """The paper's values, its Table 6; what it inherits is MaskGRPO's (configs/rl.yaml and the scripts beside it). A step is one rollout
    with its K updates. Options that are None are the method's own."""

    steps: int = 1000  # 8000 updates
    learning_rate: float = 3e-6
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    grad_norm: float = 0.2
    lora_rank: int = 128
    lora_alpha: int = 64
    prompts_per_step: int = 8  # P, over all processes
    samples: int = 9  # G
    guidance: float = 4.5  # u + w (c - u); the papers write (1 + 3.5) c - 3.5 u
    temperature: float = 1.0
    size: tuple[int, int] | None = None  # height and width in pixels, for families that draw several; None: the model's own
    method: Method = "ht_grpo"
    decisions: Decisions | None = None
    context: Context | None = None  # structure: ratios of the rest see the structure (the ablation of the paper's Figure 4c)
    credit: tuple[float, float] | None = None  # of structure and rest
    unit_mean: bool = False  # credit divided by its mean over an image, which is 0.8 in the paper
    alpha: float = 0.3  # share of the structure
    ranks: Literal["recorded", "permuted"] = "recorded"  # permuted: the control, structure at random places
    budget: tuple[int, int, int] = (2, 4, 2)  # updates of the stages global, structure, refinement
    stage_order: tuple[choices.Stage, choices.Stage, choices.Stage] = ("global", "structure", "refinement")
    rate_mode: tuple[choices.Mode, ...] = ("down",)  # as the next two: of global, structure, refinement, or one for all
    rate_max: tuple[float, ...] = (1.0,)
    rate_min: tuple[float, ...] = (0.5,)
    subset: choices.Subset = "bernoulli"
    updates: int | None = None  # K of decisions that have no stages
    masking: Masking | None = None  # the share that update k masks anew
    masking_min: float = 0.6  # where `progressive` starts
    shrink: int = 1  # steps of the trajectory that share a state
    order: Order | None = None  # of unmasking: the surest tokens first, or chance
    denoising_steps: int | None = None  # 0: the model's own
    log_prob: Which = "cond"
    level: Level | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.01
    kl: grpo.KLForm = "k3"
    reduction: Literal["token_mean", "sample_mean"] | None = None
    ddof: int = 1
    epsilon: float = 1e-5
    scope: grpo.Scope = "group"
    combine: grpo.Combine = "sum_then_normalize"
    compat: Literal["fixed", "upstream"] = "fixed"  # upstream: the quirks of MaskGRPO's and TraceRL's code, docs/ht_grpo.md

    def __post_init__(self) -> None:
        given = {name: value for name in {**REST, **OWN[self.method]} if (value := getattr(self, name)) is not None}
        for name, value in {**REST, **OWN[self.method], **given}.items():
            object.__setattr__(self, name, value)  # so that what is printed and kept is what is in force
        if self.decisions == "stages":
            if given.get("updates", sum(self.budget)) != sum(self.budget):
                raise ValueError(f"stages have {sum(self.budget)} updates by their budget, got updates={self.updates}")
            object.__setattr__(self, "updates", sum(self.budget))
        if self.samples < 2:
            raise ValueError(f"a group needs at least two pictures to compare, got samples={self.samples}")
        if sorted(self.stage_order) != sorted(choices.STAGES):
            raise ValueError(f"stage_order names each of {', '.join(choices.STAGES)} once, got {', '.join(self.stage_order)}")
        if any(len(values) not in (1, 3) for values in (self.rate_mode, self.rate_max, self.rate_min)):
            raise ValueError("rate_mode, rate_max and rate_min have one value, or one each for global, structure and refinement")
        if not all(0 <= share <= 1 for share in (*self.rate_max, *self.rate_min, self.alpha, self.masking_min)):
            raise ValueError("alpha, masking_min, rate_max and rate_min are shares between 0 and 1")
        if min(self.budget) < 0 or not self.updates or self.updates < 1 or self.shrink < 1:
            raise ValueError("budget, updates and shrink count from 0, 1 and 1, and one update is the least")
        is_one_state = self.context in ("blank", "visible") and self.credit is not None and self.credit[0] == self.credit[1]
        if self.level == "sequence" and not is_one_state:
            raise ValueError("one ratio for a sample (level=sequence) needs one context (blank or visible) and equal credit")
        if self.compat == "upstream" and self.method not in ("mask_grpo", "trace_grpo"):
            raise ValueError(f"{self.method} has no public code whose quirks compat=upstream could mean")


def train(config: Config, model: Any, reward: Reward, prompts: Sequence[Prompt], loop: Loop) -> None:
    masked.check_family(model)
    policy = policy_of(config, model)
    rule = grpo.AdvantageRule(config.ddof, config.epsilon, config.scope, config.combine)
    for _ in loop.steps():
        with loop.timer("rollout"):
            chosen = loop.draw(prompts, config.prompts_per_step)
            rollout = masked.make_rollout(model, loop, chosen, config.samples, policy, config.size, config.micro_batch)
        with loop.timer("reward"):
            scored = reward(rollout.samples)
        advantages = masked.advantages_of(scored, config.samples, rule)
        rank_BN = ranks(config, rollout, loop)
        is_structure_BN = choices.structure(rank_BN, config.alpha)
        credit_BN = choices.credit(is_structure_BN, *(config.credit or (1.0, 1.0)), config.unit_mean)
        seen = with_padding(model, rollout) if is_upstream(config, "mask_grpo") else rollout
        plan = in_context(config, seen, is_structure_BN, decisions(config, seen, is_structure_BN, loop))
        masked.update(model, loop, seen, advantages.value.flatten(), plan, how(config), credit_BN)
        ar.log_rewards(loop, scored, advantages)
        masked.log_surprise(loop, rollout, is_structure_BN)
        masked.keep_group(model, loop, rollout, scored, rank_BN, config.size)


def policy_of(config: Config, model: Any) -> Policy:
    """How the group is drawn."""
    hidden = model.schedule(config.denoising_steps) if config.denoising_steps else ()
    return Policy(config.guidance, config.temperature, hidden=hidden, order=config.order or "surest")


def ranks(config: Config, rollout: masked.Rollout, loop: Loop) -> Tensor:
    """int [B, N] from 1: when each token was decided, or the control's permutation of it."""
    assert rollout.drawn.step_of is not None
    rank_BN = choices.ranks(rollout.drawn.step_of)
    return choices.permuted(rank_BN, _numbers(rollout, loop, "ranks")) if config.ranks == "permuted" else rank_BN


def decisions(config: Config, rollout: masked.Rollout, is_structure_BN: Tensor, loop: Loop) -> Iterator[tuple[str, Tensor]]:
    """Of each update its stage and its tokens, bool [B, N]. Random ones follow from (seed, step, update, prompt, sample)."""
    everything_BN = torch.ones_like(is_structure_BN)
    updates = config.updates or 0
    match config.decisions:
        case "stages":
            among = dict(zip(choices.STAGES, (everything_BN, is_structure_BN, ~is_structure_BN), strict=True))
            for stage in config.stage_order:
                at = choices.STAGES.index(stage)
                mode, greatest, least = (values[at % len(values)] for values in (config.rate_mode, config.rate_max, config.rate_min))
                for number in range(config.budget[at]):
                    share = choices.rate(mode, number, config.budget[at], greatest, least)
                    yield stage, choices.subset(_numbers(rollout, loop, f"{stage}/{number}"), among[stage], share, config.subset)
        case "remasked":
            start = Random(f"{config.seed}/masking/{loop.step}").random()
            for number in range(updates):
                is_spaced = config.masking == "spaced"
                share = choices.spaced(number, updates, start) if is_spaced else choices.progressive(number, updates, config.masking_min)
                if is_upstream(config, "mask_grpo"):
                    seeds = [seed % choices.SEEDS for seed in loop.seeds(rollout.prompts, 1, f"masking/{number}")]
                    shape = rollout.group, rollout.encoded.ids.shape[1], everything_BN.shape[1]
                    masks = [choices.upstream_masks(seed, *shape, share) for seed in seeds]
                    yield "remasked", torch.cat(masks).to(everything_BN.device)
                else:
                    yield "remasked", choices.subset(_numbers(rollout, loop, f"masking/{number}"), everything_BN, share, "bernoulli")
        case "all":
            yield from [("all", everything_BN)] * updates


def in_context(config: Config, rollout: masked.Rollout, is_structure_BN: Tensor, chosen: Iterator[tuple[str, Tensor]]) -> choices.Plan:
    """The plan that scores the chosen tokens in the configured context."""
    contexts: dict[str, Tensor | None] = {}
    updates = []
    group_BN = choices.trace_groups(rollout.drawn.step_of, config.shrink) if config.context == "trajectory" else is_structure_BN
    states = -(-len(rollout.drawn.policy.hidden) // config.shrink)  # as many on every process, whatever was drawn
    for number, (stage, tokens_BN) in enumerate(chosen):
        match config.context:
            case "blank":
                state: dict[str, tuple[Tensor | None, Tensor]] = {"blank": (None, tokens_BN)}
            case "visible":
                state = {f"update {number}": (tokens_BN, tokens_BN)}
            case "structure":
                state = {"blank": (None, tokens_BN & is_structure_BN), "structure": (~is_structure_BN, tokens_BN & ~is_structure_BN)}
            case _:
                state = {f"state {at}": (group_BN >= at, tokens_BN & (group_BN == at)) for at in range(states)}
        contexts |= {name: hidden_BN for name, (hidden_BN, _) in state.items()}
        updates.append(choices.Update(stage, {name: scored_BN for name, (_, scored_BN) in state.items()}))
    return choices.Plan(contexts, updates)


def how(config: Config) -> masked.How:
    """The objective. Upstream, TraceRL takes the mean of each state's tokens, and its KL is to the old policy, summed over them."""
    is_trace = is_upstream(config, "trace_grpo")
    is_token_mean = config.reduction == "token_mean" and not is_trace
    objective = grpo.Objective(config.clip_low, config.clip_high, config.beta, config.kl, "token_mean" if is_token_mean else "sample_mean")
    reduction: masked.Reduction = "state_mean" if is_trace else config.reduction or "token_mean"
    return masked.How(objective, reduction, config.level or "token", config.log_prob, config.micro_batch, kl_to_old=is_trace)


def is_upstream(config: Config, method: Method) -> bool:
    return config.compat == "upstream" and config.method == method


def with_padding(model: Any, rollout: masked.Rollout) -> masked.Rollout:
    """Prompts as MaskGRPO scores them: padded to the family's full length, and the padding attended to."""
    if not hasattr(model, "text_slots"):
        raise UsageError(f"compat=upstream is about MMaDA's rows of one length; {model.family} has none. Leave it out.")
    wide = model.to_width(rollout.encoded, model.text_slots + rollout.drawn.actions.shape[1] + 2)
    every = torch.ones_like(wide.mask)
    return replace(rollout, encoded=replace(wide, mask=every, uncond_mask=every))


def _numbers(rollout: masked.Rollout, loop: Loop, purpose: str) -> Tensor:
    """[B, N] uniform numbers of the step, a stream for each sample."""
    codes = rollout.drawn.actions
    return choices.uniforms(loop.seeds(rollout.prompts, rollout.group, purpose), codes.shape[1]).to(codes.device)
