"""The masked methods beside public code: golden values always, the code itself where $MMALIGN_ORACLES holds a checkout.

Checkouts are `MaskGRPO` (martian422/MaskGRPO b74ba3c) and `dLLM-RL` (Gen-Verse/dLLM-RL 10b4fd1, TraceRL). The official functions run on
stand-ins for their trainers and on a network of eight channels with MMaDA's real vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from helpers.suites import official, oracle
from mmalign.trainers import _masked as masked
from mmalign.trainers import _masked_choices as choices
from torch import Tensor

from mmalign import grpo
from mmalign.models._masked import MaskedImages
from mmalign.models.layers.masked import Streams, cosine, emerge
from mmalign.trajectory import Policy, Prompts, Trajectory

MASK, OFFSET, CODES, VOCABULARY = 126336, 126349, 8192, 134656
TEXT, TOKENS, ROWS, UPDATES = 5, 12, 3, 6  # slots of the prompt, image tokens
LENGTH = TEXT + TOKENS + 2
MASKGRPO = "grpo/mask_grpo_trainer.py"
TRACERL = "train/rl_mmada.py"


def wave(*shape: int, phase: float, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Numbers that look random and are the same everywhere, float64."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + phase).sin().reshape(shape) * scale + shift


class Toy(MaskedImages):
    """A row's hidden states are its embeddings and their mean: every token sees every other one."""

    family, name, grid, offset, mask_id, pad_id = "toy", "toy", (3, 4), OFFSET, MASK, 0
    vq = SimpleNamespace(codes=CODES)

    def __init__(self) -> None:
        stream = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCABULARY, 8, generator=stream)
        self.head = torch.nn.Linear(8, VOCABULARY, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(VOCABULARY, 8, generator=stream))

    def _hidden(self, ids_RL: Tensor, mask_RL: Tensor) -> Tensor:
        embedded = self.table[ids_RL]
        return embedded + embedded.mean(1, keepdim=True)

    def __call__(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self._hidden(ids, torch.ones_like(ids, dtype=torch.bool))))


@pytest.fixture(scope="module")
def toy() -> tuple[Toy, Prompts, Trajectory, Tensor]:
    """The network, prompts with hidden images, what was drawn, and the official rows of it."""
    model = Toy()
    codes = torch.randint(0, CODES, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    text = torch.randint(0, 1000, (ROWS, TEXT), generator=torch.Generator().manual_seed(2))
    soi, eoi = (torch.full((ROWS, 1), id) for id in (126084, 126085))
    hidden = torch.cat([text, soi, torch.full((ROWS, TOKENS), MASK), eoi], 1)
    every = torch.ones_like(hidden, dtype=torch.bool)
    prompts = Prompts(("",) * ROWS, hidden, every, hidden.clone(), every.clone())
    drawn = Trajectory("masked", codes, torch.zeros(ROWS, TOKENS), Policy(1.0), tuple(range(ROWS)))
    return model, prompts, drawn, torch.cat([text, soi, codes + OFFSET, eoi], 1)


def official_trainer(file: Path, **more: Any) -> SimpleNamespace:
    """A stand-in for MaskGRPO's trainer with its methods bound."""
    names = ("remask_t2i", "get_logits", "_get_per_token_logps", "_get_per_token_logps_uni", "compute_loss")
    given = {"torch": torch, "F": F, "set_seed": torch.manual_seed, "profiling_decorator": lambda function: function}
    methods = dict(zip(names, official(file, *names, **given), strict=True))
    arguments = SimpleNamespace(min_mask_rate=0.6, num_iterations=UPDATES, mask_id=MASK, cfg_scale=3.5)
    this = SimpleNamespace(task="t2i", version="uni", args=arguments, **more)
    for name, method in methods.items():
        setattr(this, name, method.__get__(this))
    this.remask = this.remask_t2i
    return this


# -- MaskGRPO: which tokens are masked anew, their log-probabilities, the loss -----------------------------------------------------------

GOLDEN_MASK = [[0, 1, 2, 5, 6, 7, 8, 9, 11], [0, 2, 4, 7, 8, 11], [1, 2, 3, 5, 6, 9, 10, 11]]


def test_the_masks_have_the_golden_places_of_maskgrpo():
    found = choices.upstream_masks(7, ROWS, LENGTH, TOKENS, choices.progressive(0, UPDATES, 0.6))
    assert [row.nonzero().flatten().tolist() for row in found] == GOLDEN_MASK


def test_masks_and_log_probabilities_are_those_of_maskgrpo(toy):
    model, prompts, drawn, rows = toy
    with torch.random.fork_rng(devices=[]):
        this = official_trainer(oracle("MaskGRPO", MASKGRPO) / MASKGRPO)
        seeds = [torch.tensor(seed) for seed in (7, 100, 4095, 0, 1, 2)]
        said, hidden = this._get_per_token_logps(model, rows.expand(UPDATES, -1, -1), TOKENS, seeds)
    for number, seed in enumerate(seeds):
        ours = choices.upstream_masks(int(seed), ROWS, LENGTH, TOKENS, choices.progressive(number, UPDATES, 0.6))
        assert torch.equal(ours, hidden[number])
        found = model.log_prob_given(prompts, drawn, ours, which="cond")
        torch.testing.assert_close(found[ours], said[number][ours], rtol=1e-5, atol=1e-5)


OLD, REFERENCE = (wave(ROWS, TOKENS, phase=phase, scale=0.3, shift=-9).float() for phase in (1.4, 2.2))
ADVANTAGE = torch.tensor([1.2, -0.7, -0.5])


def our_loss(toy: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    model, prompts, drawn, _ = toy
    how = masked.How(grpo.Objective(0.2, 0.2, 0.01, "k3", "token_mean"), "token_mean", "token", "cond", 8)
    new = model.log_prob_given(prompts, drawn, hidden, which="cond")
    one = choices.Update("remasked", {"update 3": hidden})
    total = masked._loss(new, OLD, REFERENCE, ADVANTAGE, hidden, None, hidden.sum(1), masked._normaliser(one, how), how).total
    return total.detach(), torch.autograd.grad(total, model.head.weight)[0]


def test_the_loss_and_its_gradient_are_those_of_maskgrpo(toy):
    model, _, _, rows = toy
    metrics: Any = defaultdict(lambda: defaultdict(list))
    machine = SimpleNamespace(gather_for_metrics=lambda value: value)
    options = {"num_iterations": UPDATES, "beta": 0.01, "epsilon": 0.2, "mean_method": "grpo", "_step": 4, "_metrics": metrics}
    file = oracle("MaskGRPO", MASKGRPO) / MASKGRPO
    this = official_trainer(file, **options, accelerator=machine, control=SimpleNamespace(should_evaluate=False))
    hidden = choices.upstream_masks(11, ROWS, LENGTH, TOKENS, choices.progressive(3, UPDATES, 0.6))
    other = [torch.zeros(ROWS, TOKENS)] * 3
    inputs = {
        "prompt_ids": rows[:, :TEXT], "completion_ids": rows[:, TEXT + 1 : -1], "completion_mask": hidden.int(), "advantages": ADVANTAGE,
        "mask_seeds": [torch.tensor(11)] * UPDATES, "old_per_token_logps": [*other, OLD], "ref_per_token_logps": [*other, REFERENCE],
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        # There the masks of all updates stand in `completion_mask` and are broadcast over this one's tokens; here it is its own alone.
        theirs = this.compute_loss(model, inputs)
    gradient = torch.autograd.grad(theirs, model.head.weight)[0]
    found, ours = our_loss(toy, hidden)
    torch.testing.assert_close(found, theirs.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5)


def test_the_order_of_chance_is_maskgrpos():
    """Numbers of tokens decided by each step, over many rows, of a network whose logits do not depend on what is visible."""
    file = oracle("MaskGRPO", MASKGRPO) / MASKGRPO
    names = ("cosine_schedule", "sample_categorical", "t2i_generate_emerge")
    _, _, generate = official(file, *names, torch=torch, math=math, Optional=Optional)
    samples, tokens, steps, text = 600, 16, 6, 4
    seen: list[Tensor] = []

    def network(ids: Tensor, attention_bias: Any = None) -> SimpleNamespace:
        seen.append((ids[:, -(tokens + 1) : -1] == 20).sum(1))
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 12))

    rows = torch.cat([torch.zeros(samples, text + 1), torch.full((samples, tokens), 20), torch.zeros(samples, 1)], 1).long()
    this = SimpleNamespace(uni_prompting=SimpleNamespace(text_tokenizer=range(4)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mask = torch.ones_like(rows)
        generate(this, network, rows, None, mask, None, timesteps=steps, seq_len=tokens, mask_token_id=20, resolution=text, codebook_size=8)
    theirs = torch.stack(seen, 1).double()
    logits = torch.zeros(samples, tokens, 8)
    drawn = emerge(
        lambda codes, slots: logits.gather(1, slots[..., None].expand(-1, -1, 8)),
        cosine(steps), Streams(range(samples), steps, tokens, torch.device("cpu")), 1.0, is_fixed=False,
    )  # fmt: skip
    ours = torch.stack([(drawn.step_of >= step).sum(1) for step in range(steps)], 1).double()
    assert (ours[:, 0] == tokens).all() and (theirs[:, 0] == tokens).all()
    scale = theirs.std(0).clamp(min=1e-9)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * scale / samples**0.5 * 2**0.5 + 1e-9).all()
    assert torch.allclose(ours.std(0), theirs.std(0), rtol=0.15)


# -- TraceRL: states that several steps share, means of states, the KL to the old policy ------------------------------------------------

STEPS = torch.tensor([[0, 0, 1, 2, 3, 3, 4, 7], [5, 2, 2, 9, 9, 1, 0, 0]])
COLLAPSED = [[1, 1, 1, 3, 3, 3, 7, 7], [5, 5, 5, 9, 9, 1, 1, 1]]


def collapsed_as(group: list[int], steps: list[int]) -> list[int]:
    """Groups by the last step in them, as the reference names them."""
    return [max(step for other, step in zip(group, steps, strict=True) if other == own) for own in group]


def test_states_have_the_golden_steps_of_tracerl():
    groups = choices.trace_groups(STEPS, 2).tolist()
    assert [collapsed_as(group, steps) for group, steps in zip(groups, STEPS.tolist(), strict=True)] == COLLAPSED


@pytest.mark.parametrize("shrink", [1, 2, 3, 10])
def test_states_are_those_of_tracerl(shrink):
    collapse = official(oracle("dLLM-RL", TRACERL) / TRACERL, "collapse_k_unique")
    for group, steps in zip(choices.trace_groups(STEPS, shrink).tolist(), STEPS.tolist(), strict=True):
        assert collapsed_as(group, steps) == collapse(steps, shrink)


LOGITS = wave(2, 8, 5, phase=0.4)
DRAWN = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [4, 3, 2, 1, 0, 4, 3, 2]])
BEFORE = wave(2, 8, phase=2.0, scale=0.4, shift=-1.6)
TRACE_LOSS = {"k1": 0.11719616312288574, "k3": 0.12450974198374604}


def our_trace_loss(form: grpo.KLForm) -> tuple[Tensor, Tensor]:
    logits = LOGITS.clone().requires_grad_()
    new = logits.log_softmax(-1).gather(-1, DRAWN[..., None])[..., 0]
    groups = choices.trace_groups(STEPS, 1)
    one = choices.Update("all", {f"state {at}": groups == at for at in range(int(groups.max()) + 1)})
    how = masked.How(grpo.Objective(0.2, 0.2, 0.01, form, "sample_mean"), "state_mean", "token", "cond", 8, kl_to_old=True)
    lengths, whole = one.tokens.sum(1), masked._normaliser(one, how)
    advantage = torch.tensor([0.8, -1.1], dtype=torch.float64)
    total = sum(masked._loss(new, BEFORE, BEFORE, advantage, scored, None, lengths, whole, how).total for scored in one.scored.values())
    total.backward()
    return total.detach(), logits.grad


@pytest.mark.parametrize("form", ["k1", "k3"])
def test_the_loss_has_the_golden_value_of_tracerl(form):
    assert float(our_trace_loss(form)[0]) == pytest.approx(TRACE_LOSS[form], rel=1e-6)


@pytest.mark.parametrize("form", ["k1", "k3"])
def test_the_loss_and_its_gradient_are_those_of_tracerl(form):
    """One row for each state there, a micro-batch for each state here."""
    groups = choices.trace_groups(STEPS, 1)
    pairs = [(row, at) for row in range(2) for at in range(int(groups[row].max()) + 1)]
    logits = LOGITS.clone().requires_grad_()
    rows = [row for row, _ in pairs]
    settings = SimpleNamespace(eps=0.2, beta=0.01, use_kl_estimator_k3=form == "k3")
    network = lambda ids: SimpleNamespace(logits=logits[rows])  # noqa: E731  the reference calls it
    file = oracle("dLLM-RL", TRACERL) / TRACERL
    forward = official(file, "forward_process", torch=torch, F=F, model=network, config=SimpleNamespace(training=settings))
    scored = torch.stack([groups[row] == at for row, at in pairs]).double()
    theirs = forward(DRAWN[rows], DRAWN[rows], scored, [(0.8, -1.1)[row] for row in rows], BEFORE[rows])
    theirs.backward()
    found, gradient = our_trace_loss(form)
    torch.testing.assert_close(found, theirs.detach().double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-5, atol=1e-6)
