"""The objective in closed form: advantages by hand, gradients of a tabular policy, invariants of clipping, KL and credit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign import grpo
from mmalign.attribution import token_weights


def rewards(*rows):
    return {"r": torch.tensor(rows, dtype=torch.float64)}


def test_group_advantages_use_the_stated_spread():
    ok = torch.ones(1, 4, dtype=torch.bool)
    sample = grpo.advantages(rewards([1.0, 2, 3, 4]), {"r": 1.0}, ok, grpo.AdvantageRule(ddof=1, epsilon=0))
    population = grpo.advantages(rewards([1.0, 2, 3, 4]), {"r": 1.0}, ok, grpo.AdvantageRule(ddof=0, epsilon=0))
    assert sample.value[0, 3] == pytest.approx(1.5 / math.sqrt(5 / 3)) and population.value[0, 3] == pytest.approx(1.5 / math.sqrt(1.25))


def test_a_failed_sample_gets_no_advantage_and_moves_no_mean():
    ok = torch.tensor([[True, True, True, False]])
    full = grpo.advantages(rewards([1.0, 2, 3, 99]), {"r": 1.0}, ok)
    three = grpo.advantages(rewards([1.0, 2, 3]), {"r": 1.0}, ok[:, :3])
    assert torch.allclose(full.value[:, :3], three.value) and full.value[0, 3] == 0
    nan = grpo.advantages(rewards([1.0, 2, 3, math.nan]), {"r": 1.0}, ok)
    assert torch.equal(nan.value, full.value)


def test_equal_rewards_teach_nothing_and_are_counted():
    found = grpo.advantages(rewards([1.0, 1, 1], [0, 1, 2]), {"r": 1.0}, torch.ones(2, 3, dtype=torch.bool))
    assert found.flat_groups == 1 and torch.equal(found.value[0], torch.zeros(3, dtype=torch.float64))


def test_batch_scope_keeps_means_per_prompt():
    found = grpo.advantages(rewards([0.0, 1], [10, 11]), {"r": 1.0}, torch.ones(2, 2, dtype=torch.bool), grpo.AdvantageRule(scope="batch"))
    assert torch.allclose(found.value[0], found.value[1])


def test_normalize_then_sum_lets_no_reward_drown_another():
    parts = {"loud": torch.tensor([[0.0, 1000.0, 500.0]]).double(), "quiet": torch.tensor([[1.0, 0.0, 2.0]]).double()}
    ok, weights = torch.ones(1, 3, dtype=torch.bool), {"loud": 1.0, "quiet": 1.0}
    drowned = grpo.advantages(parts, weights, ok, grpo.AdvantageRule(combine="sum_then_normalize"))
    heard = grpo.advantages(parts, weights, ok, grpo.AdvantageRule(combine="normalize_then_sum"))
    assert int(drowned.value.argmax()) == 1 and int(heard.value.argmax()) == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=4, max_size=4), st.floats(-3, 3), st.floats(0.1, 4))
def test_advantages_ignore_shift_and_scale(values, shift, scale):
    ok, rule = torch.ones(1, 4, dtype=torch.bool), grpo.AdvantageRule(epsilon=0)
    if torch.tensor(values).std() < 1e-3:
        return
    first = grpo.advantages(rewards(values), {"r": 1.0}, ok, rule).value
    second = grpo.advantages(rewards([v * scale + shift for v in values]), {"r": 1.0}, ok, rule).value
    assert torch.allclose(first, second, atol=1e-6)


def policy_gradient(logits, actions, advantage, weight=None):
    """d/dlogits of -mean_s A w log pi(a_s), by hand: -(A w)(onehot - softmax) / S."""
    onehot = torch.nn.functional.one_hot(actions, logits.shape[-1]).double()
    credit = advantage[:, None, None] * (1 if weight is None else weight[..., None])
    return -(credit * (onehot - logits.softmax(-1))) / actions.numel()


def setup(seed=0, batch=3, steps=4, actions=5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, steps, actions, generator=generator, dtype=torch.float64, requires_grad=True)
    chosen = torch.randint(actions, (batch, steps), generator=generator)
    advantage = torch.randn(batch, generator=generator, dtype=torch.float64)
    return logits, chosen, advantage, torch.ones(batch, steps, dtype=torch.bool)


def log_prob(logits, chosen):
    return logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]


def test_on_policy_gradient_is_the_policy_gradient():
    logits, chosen, advantage, mask = setup()
    new = log_prob(logits, chosen)
    grpo.surrogate(new, new.detach(), advantage, mask, grpo.Objective(beta=0)).total.backward()
    assert torch.allclose(logits.grad, policy_gradient(logits.detach(), chosen, advantage), atol=1e-12)


def test_credit_multiplies_the_advantage_of_its_token():
    logits, chosen, advantage, mask = setup(1)
    weight = 1 + 0.5 * torch.rand(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    new = log_prob(logits, chosen)
    grpo.surrogate(new, new.detach(), advantage, mask, grpo.Objective(beta=0), weight=weight).total.backward()
    assert torch.allclose(logits.grad, policy_gradient(logits.detach(), chosen, advantage, weight), atol=1e-12)


def test_clipping_stops_the_gradient_only_on_the_side_that_pays():
    old = torch.zeros(4, 1, dtype=torch.float64)
    new = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    loss = grpo.surrogate(new, old, advantage, torch.ones(4, 1, dtype=torch.bool), grpo.Objective(0.2, 0.2, beta=0))
    loss.total.backward()
    expected = torch.tensor([[0.0], [-math.exp(-0.5)], [math.exp(0.5)], [0.0]], dtype=torch.float64) / 4
    assert torch.allclose(new.grad, expected) and int(loss.clipped) == 2


def test_clip_high_widens_one_side():
    new = torch.tensor([[0.25]], dtype=torch.float64, requires_grad=True)
    for high, has_gradient in ((0.2, False), (0.4, True)):
        new.grad = None
        one = torch.ones(1, dtype=torch.float64)
        every, old = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1).double()
        grpo.surrogate(new, old, one, every, grpo.Objective(0.2, high, 0)).total.backward()
        assert bool(new.grad.abs() > 0) is has_gradient


@pytest.mark.parametrize("form, gradient", [("k1", 1.0), ("k2", -0.3), ("k3", 1 - math.exp(0.3))])
def test_kl_forms_have_their_values_and_gradients(form, gradient):
    value = torch.tensor([[-1.3]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-1.0]], dtype=torch.float64)
    kl = grpo.kl(value, reference, form)
    kl.sum().backward()
    expected = {"k1": -0.3, "k2": 0.045, "k3": math.exp(0.3) - 0.3 - 1}[form]
    assert float(kl) == pytest.approx(expected) and float(value.grad) == pytest.approx(gradient)


@settings(max_examples=50, deadline=None)
@given(st.floats(-3, 3))
def test_k3_is_never_negative_and_pulls_towards_the_reference(d):
    value = torch.tensor([[0.0]], dtype=torch.float64, requires_grad=True)
    kl = grpo.kl(value, torch.tensor([[d]], dtype=torch.float64), "k3")
    kl.sum().backward()
    assert float(kl) >= 0
    if abs(d) > 1e-6:
        assert float(value.grad) * d < 0


def test_masked_decisions_neither_count_nor_leak_nan():
    new = torch.tensor([[-1.0, float("-inf")]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    loss = grpo.surrogate(new, torch.tensor([[-1.0, -2.0]]), torch.ones(1), mask, grpo.Objective(beta=0.1), torch.tensor([[-1.0, 0.0]]))
    loss.total.backward()
    assert torch.isfinite(loss.total) and torch.isfinite(new.grad[0, 0]) and int(loss.decisions) == 1


@pytest.mark.parametrize("reduction", ["token_mean", "sample_mean", "constant"])
def test_micro_batches_add_up_to_the_whole(reduction):
    logits, chosen, advantage, mask = setup(3, batch=6)
    mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    objective = grpo.Objective(beta=0.05, reduction=reduction)
    old = log_prob(logits.detach() + 0.1, chosen)
    reference = log_prob(logits.detach() - 0.2, chosen)
    whole = grpo.surrogate(log_prob(logits, chosen), old, advantage, mask, objective, reference).total
    z = grpo.normaliser_of(mask, reduction)
    parts = sum(
        grpo.surrogate(log_prob(logits, chosen)[r], old[r], advantage[r], mask[r], objective, reference[r], normaliser=z).total
        for r in (slice(0, 2), slice(2, 3), slice(3, 6))
    )
    assert torch.allclose(whole, parts, atol=1e-12)


def test_parts_of_samples_add_up_to_the_whole_when_their_lengths_are_known():
    logits, chosen, advantage, mask = setup(3, batch=6)
    mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    objective = grpo.Objective(beta=0.05, reduction="sample_mean")
    new, old = log_prob(logits, chosen), log_prob(logits.detach() + 0.1, chosen)
    reference = log_prob(logits.detach() - 0.2, chosen)
    whole = grpo.surrogate(new, old, advantage, mask, objective, reference).total
    is_first = torch.arange(mask.shape[1]) % 2 == 0
    parts = sum(
        grpo.surrogate(new, old, advantage, mask & part, objective, reference, normaliser=6, lengths=mask.sum(1)).total
        for part in (is_first, ~is_first)
    )
    assert torch.allclose(whole, parts, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.floats(-0.99, 2.0), st.integers(0, 1000))
def test_weights_keep_sign_and_order_of_advantages(strength, seed):
    maps = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(seed))
    weight = token_weights(maps, strength)
    advantage = torch.tensor([-1.0, 2.0])
    credited = advantage[:, None] * weight
    assert (credited[0] < 0).all() and (credited[1] > 0).all()
    assert torch.allclose(token_weights(maps, strength, normalise=True).mean(1), torch.ones(2), atol=1e-5)


def test_sequence_probability_by_hand_and_its_length_bias():
    values = torch.tensor([[0.5, 0.25, 1.0], [0.1, 0.9, 0.9]]).log()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert grpo.sequence_probability(values, mask).tolist() == pytest.approx([math.sqrt(0.125), 0.1])
    assert grpo.sequence_probability(values, mask, "product").tolist() == pytest.approx([0.125, 0.1])
    assert grpo.sequence_probability(values, mask, "arithmetic").tolist() == pytest.approx([0.375, 0.1])
    assert torch.isnan(grpo.sequence_probability(values[:1], torch.zeros(1, 3, dtype=torch.bool)))[0]
