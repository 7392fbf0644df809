"""Measurements of HT-GRPO's claims on masked models whose answers are known: uniform ones, forced ones, ones that draw in one step."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
from helpers.tiny_masked import make_mmada
from mmalign.leaderboards.measures import htgrpo_model, htgrpo_update
from mmalign.trainers import _masked as masked
from mmalign.trainers import _masked_choices as choices
from mmalign.trainers import ht_grpo

from mmalign.testbed.world import Clause, Thing
from mmalign.types import Prompt

pytestmark = pytest.mark.usefixtures("one_thread")

CLAUSES = (Clause("circle", color="red", region="left"),)
PROMPTS = [Prompt(name, text, meta={"include": [asdict(CLAUSES[0])]}) for name, text in (("a", "a red circle"), ("b", "two blue squares"))]


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return str(make_mmada(tmp_path_factory.mktemp("models") / "mmada", seed=1))


def drawn(name: str, steps: int) -> htgrpo_model.Group:
    """Two prompts with four pictures of sixteen codes each, and advantages that are no rewards'."""
    config = htgrpo_model.config_of(0, denoising_steps=steps)
    with htgrpo_model.training(config, name) as loop:
        rollout = masked.make_rollout(loop.model, loop, PROMPTS, 4, ht_grpo.policy_of(config, loop.model), None, 8)
    advantage = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return htgrpo_model.Group(rollout, torch.arange(8).double(), advantage, choices.ranks(rollout.drawn.step_of))


@pytest.fixture(scope="module")
def in_steps(name):
    return drawn(name, 4)


@pytest.fixture
def use(monkeypatch):
    """Puts a group in the place of the one that a seed draws."""

    def put(group):
        for module in (htgrpo_model, htgrpo_update):
            monkeypatch.setattr(module, "group", lambda seed, name: group)

    return put


def test_a_model_that_knows_nothing_is_as_uncertain_as_can_be(name, in_steps):
    with htgrpo_model.training(htgrpo_model.config_of(0), name) as loop:
        loop.model.head.weight.data.zero_()
        nats = htgrpo_model.entropies(loop.model, in_steps.rollout, in_steps.everything_BN)
    assert nats.shape == (8, 16) and torch.allclose(nats, torch.full_like(nats, math.log(32)), atol=1e-6)


def test_what_is_seen_is_seen(name, in_steps, use, monkeypatch):
    """Entropies that count the seen codes: their means are the sets' sizes, and none falls."""
    use(in_steps)
    monkeypatch.setattr(
        htgrpo_model, "entropies", lambda model, rollout, hidden: (~hidden).sum(1, keepdim=True).double().expand(hidden.shape)
    )
    found = htgrpo_model.context(3, name=name)
    assert [found[f"{share}% seen"] for share in (0, 25, 50, 75)] == [0, 4, 8, 12] and found["rises"] == 1


def test_surprise_is_that_of_the_recorded_parts(name, in_steps, use):
    said = torch.where(in_steps.rank_BN <= 4, -1.0, -2.0)  # floor(0.3 x 16) codes
    use(replace(in_steps, rollout=replace(in_steps.rollout, drawn=replace(in_steps.rollout.drawn, log_prob=said))))
    found = htgrpo_model.surprise(0, name=name)
    assert found["structure"] == 1 and found["refinement"] == 2 and 0 < found["structure blank"] <= math.log(32)


def test_hidden_codes_are_drawn_and_the_others_kept(name, in_steps):
    """A model that is sure of the code 10 + n at place n, and looks at what it may see."""
    hidden = in_steps.rank_BN > 10
    asked = []

    def logits_at(codes, slots):
        asked.append((codes == -1).sum(1))
        assert (codes[~hidden] == in_steps.rollout.drawn.actions[~hidden]).all()
        return torch.nn.functional.one_hot(10 + slots, 32).float() * 100

    with htgrpo_model.training(htgrpo_model.config_of(0), name) as loop:
        loop.model._logits_at = lambda *_: logits_at
        made = htgrpo_model.redrawn(loop.model, in_steps.rollout, hidden, list(range(8)))
    expected = torch.where(hidden, 10 + torch.arange(16), in_steps.rollout.drawn.actions)
    assert torch.equal(made, expected)
    assert [int(one[0]) for one in asked] == [6, 5, 4, 3, 2, 1], "one code at a time"


def test_changes_between_scenes():
    prompt = replace(PROMPTS[0])
    here, there = Thing(0, 0, "circle", "red", "large"), Thing(0, 2, "circle", "red", "large")
    assert htgrpo_model.changed([prompt], [(here,)], [(here,)]) == {"cells": 0, "layout": 0, "facts": 0}
    moved = htgrpo_model.changed([prompt], [(here,)], [(there,)])
    assert moved == pytest.approx({"cells": 2 / 9, "layout": 2 / 9, "facts": 1 / 3})  # count and colour still hold
    painted = htgrpo_model.changed([prompt], [(here,)], [(replace(here, color="blue"),)])
    assert painted == pytest.approx({"cells": 1 / 9, "layout": 0, "facts": 1 / 3})


def test_codes_that_come_back_the_same_change_nothing(name, in_steps, use, monkeypatch):
    asked = {}

    def same(model, rollout, hidden, seeds):
        asked[len(asked)] = hidden
        return rollout.drawn.actions

    monkeypatch.setattr(htgrpo_model, "redrawn", same)
    judge = htgrpo_model.load_reward({"shapes": 1.0}, overrides={"shapes": {"form": "exact"}})
    use(replace(in_steps, reward_B=torch.from_numpy(judge(in_steps.rollout.samples).total)))
    found = htgrpo_model.layout(0, name=name)
    assert all(
        found[f"{what} {part}"] == 0 for what in ("cells", "layout", "facts") for part in ("first", "rest", "last", "random", "others")
    )
    assert found["reward variance rest"] == 0
    first, rest, last, random, others = (asked[at] for at in range(5))
    assert torch.equal(first, ~rest) and torch.equal(random, ~others) and {int(one.sum()) for one in (first, last, random)} == {32}
    assert in_steps.rank_BN[last].min() > in_steps.rank_BN[~last].max() and not torch.equal(first, random)


def test_a_gradient_is_the_objectives(name, in_steps):
    """Its parts add up to the whole, and every context's is that of the log-probabilities in that context."""
    rollout, everything, first = in_steps.rollout, in_steps.everything_BN, in_steps.is_structure_BN
    repeated = rollout.encoded.select([0] * 4 + [1] * 4)
    with htgrpo_model.training(htgrpo_model.config_of(0), name) as loop:

        def of(said, tokens):
            loop.optimizer.zero_grad()
            ((said * tokens).sum(1) / tokens.sum(1) * in_steps.advantage_B.float()).mean().backward()
            return torch.cat([value.grad.flatten() for value in loop.parameters.values()]).double()

        whole = htgrpo_update.gradient(loop, in_steps, everything)
        parts = [htgrpo_update.gradient(loop, in_steps, tokens) for tokens in (first, ~first)]
        one_prompt = [
            htgrpo_update.gradient(loop, in_steps, everything, torch.tensor(kept))
            for kept in ([1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4)
        ]
        along = htgrpo_update.gradient(loop, in_steps, everything, method="trace_grpo")
        seen = htgrpo_update.gradient(loop, in_steps, ~first, context="structure")
        blank = of(loop.model.log_prob_given(repeated, rollout.drawn, everything, which="cond"), everything)
        assert whole.norm() > 1e-2
        assert torch.allclose(whole, blank, atol=2e-6)
        assert torch.allclose(whole, (4 * parts[0] + 12 * parts[1]) / 16, atol=2e-6) and torch.allclose(whole, sum(one_prompt), atol=2e-6)
        assert torch.allclose(along, of(loop.model.log_prob(repeated, rollout.drawn, "cond"), everything), atol=2e-6)
        assert torch.allclose(seen, of(loop.model.log_prob_given(repeated, rollout.drawn, ~first, which="cond"), ~first), atol=2e-6)
        assert not torch.allclose(seen, parts[1], atol=1e-3)


def test_drawn_in_one_step_a_trajectory_is_the_hidden_picture(name, use):
    use(drawn(name, 1))
    assert htgrpo_update.trajectory_ratio(0, name=name) == pytest.approx({"pictures": 1, "pictures of a prompt": 1, "codes": 1}, abs=1e-3)
    found = htgrpo_update.cost(0, name=name)
    assert found["cosine"] == pytest.approx(1, abs=1e-6) and found["ht_grpo rows"] == 2 and found["trace_grpo rows"] == 8
    assert found["ht_grpo forwards"] == found["trace_grpo forwards"] == 1


def test_a_trajectory_takes_a_forward_for_each_step(name, in_steps, use):
    use(in_steps)
    found = htgrpo_update.cost(0, name=name)
    assert (found["ht_grpo forwards"], found["trace_grpo forwards"], found["trace_grpo rows"]) == (1, 4, 32)
    assert found["cosine"] < 0.999 and htgrpo_update.trajectory_ratio(0, name=name)["codes"] < 0.999


def test_ratios_move_with_the_update_and_only_then(name, in_steps, use, monkeypatch):
    use(in_steps)
    moved = htgrpo_update.revealed(0, name=name)
    assert min(moved[arm] for arm in ("blank", "revealed", "blank, updated revealed", "revealed, updated blank")) > 0
    assert moved["blank"] != moved["blank, updated revealed"] and moved["gradient blank"] != moved["gradient revealed"]
    recipe = htgrpo_model.config_of
    for module in (htgrpo_model, htgrpo_update):
        monkeypatch.setattr(module, "config_of", lambda seed, **options: recipe(seed, **{**options, "learning_rate": 0.0}))
    still = htgrpo_update.revealed(0, name=name)
    assert still["gradient blank"] == pytest.approx(moved["gradient blank"]) and still["blank"] < 1e-10 > still["revealed"]


def test_an_update_raises_what_had_an_advantage(name, in_steps):
    with htgrpo_model.training(htgrpo_model.config_of(0), name) as loop, torch.no_grad():
        before = htgrpo_update.scored(loop.model, in_steps.rollout, None, in_steps.everything_BN)
        with torch.enable_grad():
            htgrpo_update.step(loop, in_steps, in_steps.everything_BN)
        ratio = htgrpo_update.scored(loop.model, in_steps.rollout, None, in_steps.everything_BN) - before
    credit = torch.where(in_steps.is_structure_BN, 1.5, 0.5)
    assert float((ratio * credit * in_steps.advantage_B[:, None]).mean()) > 1e-5


def test_parts_and_sets(name, in_steps, use):
    use(in_steps)
    found = htgrpo_update.subsets(0, draws=2, name=name)
    assert found["sets at rate 1"] == 3 < found["sets"] <= 8 and found["parts"] > 0 and found["whole"] > 0
    assert found == htgrpo_update.subsets(0, draws=2, name=name), "nothing is left behind"
    apart = htgrpo_update.interference(0, name=name)
    assert -1 <= apart["cosine"] <= 1 and apart["cosine"] != apart["random"] and apart["norm ratio"] > 0


def test_cosines():
    one = torch.tensor([1.0, 0.0])
    assert htgrpo_update.cosine(one, -2 * one) == -1 and htgrpo_update.cosine(one, torch.tensor([0.0, 3.0])) == 0
