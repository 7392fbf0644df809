"""The objective beside public reference code: its golden values always, the code itself where $MMALIGN_ORACLES holds a checkout.

Checkouts are `T2I-R1` (CaraJ7/T2I-R1 2d9d4d1), `flowgrpo` (yifan123/flow_grpo ac4c86e) and `trl` (huggingface/trl f2cd577). Inputs are
closed forms, so the golden values need no generator; they are what the reference code gave for them.
"""

from __future__ import annotations

import ast
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Union

import numpy as np
import pytest
import torch
from helpers.suites import official, oracle
from torch import Tensor

from mmalign import grpo, sde

SIGMAS = [1.0, 0.960138, 0.913349, 0.857666, 0.790389, 0.707317, 0.602191, 0.464883, 0.277966, 0.008929, 0.0]  # SD3: shift 3, ten steps
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def wave(*shape: int, phase: float, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Numbers that look random and are the same everywhere, float64."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + phase).sin().reshape(shape) * scale + shift


# -- T2I-R1: advantages of summed rewards, reasoning and image tokens in one loss --------------------------------------------------------

PROMPTS, TEXTS, IMAGES = 2, 2, 2  # prompts, reasoning texts of a prompt, pictures of a text
ROWS = PROMPTS * TEXTS * IMAGES
REWARDS = wave(ROWS, 3, phase=0.3)
TEXT, PIXELS = wave(PROMPTS * TEXTS, 3, phase=1, scale=0.6, shift=-1.5), wave(ROWS, 4, phase=2, scale=0.6, shift=-1.5)
TEXT_REFERENCE, PIXELS_REFERENCE = TEXT + wave(*TEXT.shape, phase=3, scale=0.3), PIXELS + wave(*PIXELS.shape, phase=4, scale=0.3)
TEXT_MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
T2I_R1 = {"loss": -0.05941486566004134, "gradient": 0.012564207314504292, "advantage": 0.6432731582079696}


def t2i_r1_ours() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    text, pixels = TEXT.clone().requires_grad_(), PIXELS.clone().requires_grad_()
    ok = torch.ones(PROMPTS, TEXTS * IMAGES, dtype=torch.bool)
    advantage = grpo.advantages({"total": REWARDS.sum(1).view(PROMPTS, -1)}, {"total": 1.0}, ok).value.flatten()
    new = torch.cat([text.repeat_interleave(IMAGES, 0), pixels], 1)
    reference = torch.cat([TEXT_REFERENCE.repeat_interleave(IMAGES, 0), PIXELS_REFERENCE], 1)
    mask = torch.cat([TEXT_MASK.repeat_interleave(IMAGES, 0), torch.ones(ROWS, 4)], 1).bool()
    loss = grpo.surrogate(new, new.detach(), advantage, mask, grpo.Objective(), reference).total
    loss.backward()
    return loss.detach(), text.grad, pixels.grad, advantage


def t2i_r1_official(file: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The statements from the sum of the rewards to the loss, cut out of `compute_loss`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    body = next(node.body for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "compute_loss")
    lines = [ast.unparse(statement) for statement in body]
    first = lines.index("rewards = rewards_per_func.sum(dim=1)")
    last = next(at for at in range(first, len(lines)) if lines[at].startswith("loss = ") and "completion_mask" in lines[at])
    text, pixels = TEXT.clone().requires_grad_(), PIXELS.clone().requires_grad_()
    parts = {
        "semantic-cot": {"per_token_logps": text, "ref_per_token_logps": TEXT_REFERENCE, "completion_mask": TEXT_MASK},
        "token-cot": {"per_token_logps": pixels, "ref_per_token_logps": PIXELS_REFERENCE, "completion_mask": torch.ones(ROWS, 4).long()},
    }
    this = SimpleNamespace(num_generations=TEXTS, new_generations_image=IMAGES, beta=0.01)
    space: dict[str, Any] = {"torch": torch, "self": this, "rewards_per_func": REWARDS, "loss_dict": parts}
    exec(compile(ast.Module(body[first : last + 1], []), str(file), "exec"), space)
    space["loss"].backward()
    return space["loss"].detach(), text.grad, pixels.grad, space["advantages"]


def test_the_loss_has_the_golden_values_of_t2i_r1():
    loss, text, pixels, advantage = t2i_r1_ours()
    found = {"loss": loss, "gradient": (text**2).sum() + (pixels**2).sum(), "advantage": (advantage * torch.arange(ROWS)).sum()}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(T2I_R1, rel=1e-9)


def test_loss_gradient_and_advantages_are_those_of_t2i_r1():
    file = "src/t2i-r1/src/open_r1/trainer/grpo_trainer.py"
    theirs = t2i_r1_official(oracle("T2I-R1", file) / file)
    for one, other in zip(t2i_r1_ours(), theirs, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


# -- flow_grpo: advantages with the population's spread, of the group or of all ----------------------------------------------------------

SCORES = wave(3, 4, phase=0.5, scale=2)
FLOW_GRPO = {"group": 1.0841607624596197, "batch": 1.3030448171540607}


def flow_advantages(scope: grpo.Scope) -> Tensor:
    ok = torch.ones(3, 4, dtype=torch.bool)
    return grpo.advantages({"r": SCORES}, {"r": 1.0}, ok, grpo.AdvantageRule(ddof=0, epsilon=1e-4, scope=scope)).value


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_advantages_have_the_golden_values_of_flow_grpo(scope):
    assert float((flow_advantages(scope).flatten() * torch.arange(12)).sum()) == pytest.approx(FLOW_GRPO[scope], rel=1e-9)


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_advantages_are_those_of_flow_grpo(scope):
    file = "flow_grpo/stat_tracking.py"
    tracker = official(oracle("flowgrpo", file) / file, "PerPromptStatTracker", np=np, torch=torch)(global_std=scope == "batch")
    theirs = tracker.update([name for name in "abc" for _ in range(4)], SCORES.flatten().tolist())
    torch.testing.assert_close(flow_advantages(scope).flatten(), torch.from_numpy(theirs), **EXACT)


# -- flow_grpo: the step of the flow's SDE and its log-probability -----------------------------------------------------------------------

STATE, VELOCITY, REACHED = (wave(2, 4, 4, 4, phase=phase).float() for phase in (1, 2, 3))
SDE_LOG_PROB = [-1.689969, -1.581866, -2.406866, -3.302986, -4.19906, -5.139652, -6.26532, -8.039371, -12.823632, -17965.154297]


def our_step(k: int) -> tuple[Tensor, Tensor, Tensor]:
    found = sde.step(STATE, VELOCITY, SIGMAS[k], SIGMAS[k + 1], 0.7, "flow")
    return found.mean, found.rate, sde.log_prob(REACHED, found)


@pytest.mark.parametrize("k", range(10))
def test_a_step_has_the_golden_log_probability_of_flow_grpo(k):
    assert float(our_step(k)[2].mean()) == pytest.approx(SDE_LOG_PROB[k], rel=1e-4)


@pytest.mark.parametrize("k", range(10))
def test_a_step_is_that_of_flow_grpo(k):
    file = "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py"
    names = {"FlowMatchEulerDiscreteScheduler": object, "Union": Union, "Optional": Optional, "randn_tensor": None}
    function = official(oracle("flowgrpo", file) / file, "sde_step_with_logprob", torch=torch, math=math, **names)
    scheduler = SimpleNamespace(sigmas=torch.tensor(SIGMAS), index_for_timestep=int)
    _, log_prob, mean, rate = function(scheduler, VELOCITY, [k, k], STATE, 0.7, REACHED)
    our_mean, our_rate, our_log_prob = our_step(k)
    torch.testing.assert_close(our_mean, mean, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(our_rate, rate.flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_log_prob, log_prob, rtol=1e-4, atol=1e-5)


# -- TRL: clipped ratios, KL and the normalisers -----------------------------------------------------------------------------------------

NEW, OLD, REFERENCE = (wave(4, 6, phase=phase, scale=0.6, shift=-2) for phase in (1, 1.4, 2.2))
MASK = torch.arange(6) < torch.tensor([[6], [4], [1], [5]])
PER_SAMPLE, PER_DECISION = torch.tensor([1.2, -0.7, 0.4, -1.1]).double(), wave(4, 6, phase=5)
LOSSES: dict[str, grpo.Reduction] = {"grpo": "sample_mean", "bnpo": "token_mean", "dr_grpo": "constant"}
TRL = {
    "grpo": (0.01516728304749776, -0.21649820440387763),
    "bnpo": (0.021025967906385695, -0.08446135536246471),
    "dr_grpo": (0.014017311937590463, -0.056307570241643144),
}


def our_loss(kind: str, advantage: Tensor) -> tuple[Tensor, Tensor]:
    new = NEW.clone().requires_grad_()
    rule = grpo.Objective(clip_low=0.1, clip_high=0.3, beta=0.04, kl="k3", reduction=LOSSES[kind])
    loss = grpo.surrogate(new, OLD, advantage, MASK, rule, REFERENCE).total
    loss.backward()
    return loss.detach(), new.grad


def trl_loss(file: Path, kind: str, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """`GRPOTrainer._compute_loss` on a stand-in for the trainer that has nothing else switched on."""
    new = NEW.clone().requires_grad_()
    this = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros(4, 6), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=0.04,
        loss_type=kind, epsilon_low=0.1, epsilon_high=0.3, use_vllm=False, max_completion_length=6, current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True), args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
    )  # fmt: skip
    ids = torch.zeros(4, 6, dtype=torch.long)
    given = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": MASK.double()}
    given |= {"advantages": advantage, "old_per_token_logps": OLD, "ref_per_token_logps": REFERENCE}
    loss = official(file, "_compute_loss", torch=torch, nanmax=torch.max, nanmin=torch.min)(this, None, given)
    loss.backward()
    return loss.detach(), new.grad


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_have_the_golden_values_of_trl(kind):
    found = tuple(float(our_loss(kind, advantage)[0]) for advantage in (PER_SAMPLE, PER_DECISION))
    assert found == pytest.approx(TRL[kind], rel=1e-9)


@pytest.mark.parametrize("advantage", [PER_SAMPLE, PER_DECISION], ids=["per sample", "per decision"])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_gradients_are_those_of_trl(kind, advantage):
    file = "trl/trainer/grpo_trainer.py"
    theirs = trl_loss(oracle("trl", file) / file, kind, advantage)
    for one, other in zip(our_loss(kind, advantage), theirs, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
