"""Which tokens enter an update of a masked model, in what context, with what credit: sets, sizes, rates, and the numbers of the papers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmalign.trainers import _masked_choices as choices


def steps_of(samples, tokens, steps, seed):
    return torch.randint(0, steps, (samples, tokens), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31), st.floats(0, 1))
def test_ranks_are_a_permutation_and_the_structure_comes_first(tokens, steps, seed, share):
    step_of = steps_of(3, tokens, steps, seed)
    rank = choices.ranks(step_of)
    assert all(sorted(row) == list(range(1, tokens + 1)) for row in rank.tolist())
    by_rank = step_of.gather(1, rank.argsort(1))
    assert (by_rank.diff(dim=1) >= 0).all(), "an earlier step has the lower rank"
    is_structure = choices.structure(rank, share)
    assert (is_structure.sum(1) == math.floor(share * tokens)).all()
    worst = step_of.masked_fill(~is_structure, -1).amax(1)
    assert (step_of.masked_fill(is_structure, steps).amin(1) >= worst).all()
    shuffled = choices.permuted(rank, choices.uniforms(range(3), tokens))
    assert torch.equal(shuffled.sort(1).values, rank.sort(1).values)


def test_tokens_of_one_step_are_ranked_in_raster_order():
    assert choices.ranks(torch.tensor([[1, 0, 1, 0, 2, 0]])).tolist() == [[4, 1, 5, 2, 6, 3]]


def test_the_rates_are_the_papers():
    """Table 6: stages 2:4:2 from 1 to 0.5; ascending, static and cosine shapes."""
    assert [choices.rate("down", k, 2, 1.0, 0.5) for k in range(2)] == [1.0, 0.5]
    assert [round(choices.rate("down", k, 4, 1.0, 0.5), 3) for k in range(4)] == [1.0, 0.833, 0.667, 0.5]
    assert choices.rate("down", 0, 1, 1.0, 0.5) == 1.0 and choices.rate("up", 0, 1, 1.0, 0.5) == 0.5
    assert [choices.rate("up", k, 3, 1.0, 0.5) for k in range(3)] == [0.5, 0.75, 1.0]
    assert [choices.rate("constant", k, 3, 0.75, 0.5) for k in range(3)] == [0.75] * 3
    assert [choices.rate("cosine", k, 3, 1.0, 0.5) for k in range(3)] == pytest.approx([1.0, 0.75, 0.5])
    assert [round(choices.progressive(k, 6, 0.6), 3) for k in range(6)] == [0.667, 0.733, 0.8, 0.867, 0.933, 0.999]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["down", "up", "constant", "cosine"]), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
def test_rates_stay_between_their_ends(schedule, updates, one, other):
    least, greatest = sorted((one, other))
    found = [choices.rate(schedule, number, updates, greatest, least) for number in range(updates)]
    assert all(least - 1e-12 <= value <= greatest + 1e-12 for value in found)
    assert found == sorted(found, reverse=schedule != "up")


@given(st.integers(1, 12), st.floats(0, 1, exclude_max=True))
def test_spaced_shares_have_one_in_each_interval(updates, start):
    found = [choices.spaced(number, updates, start) for number in range(updates)]
    assert all(number / updates <= value <= (number + 1) / updates for number, value in enumerate(found))


def test_subsets_have_their_rates_and_stay_in_their_stage():
    numbers = choices.uniforms(range(4000), 20)
    among = choices.structure(choices.ranks(steps_of(4000, 20, 5, 1)), 0.3)
    for share in (0.2, 0.75):
        coins, fixed = (choices.subset(numbers, among, share, form) for form in ("bernoulli", "fixed"))
        assert not (coins & ~among).any() and not (fixed & ~among).any()
        assert float(coins.sum() / among.sum()) == pytest.approx(share, abs=4 * (share * (1 - share) / int(among.sum())) ** 0.5)
        assert coins.sum(1).unique().numel() > 1 and (fixed.sum(1) == round(share * 6)).all()
        assert float(fixed[among].double().mean()) == pytest.approx(round(share * 6) / 6) and fixed.any(0).all()
    assert torch.equal(choices.subset(numbers, among, 1.0, "bernoulli"), among) and torch.equal(
        choices.subset(numbers, among, 1.0, "fixed"), among
    )


def test_numbers_belong_to_the_sample():
    numbers = choices.uniforms([5, 6, 5], 50)
    assert torch.equal(numbers[0], numbers[2]) and not torch.equal(numbers[0], numbers[1])
    assert torch.equal(choices.uniforms([6], 50)[0], numbers[1]) and (numbers >= 0).all() and (numbers < 1).all()


def test_credit_is_the_papers_and_can_have_mean_one():
    is_structure = choices.structure(choices.ranks(steps_of(2, 10, 4, 0)), 0.3)
    weight = choices.credit(is_structure, 1.5, 0.5, False)
    assert (
        weight.mean(1).tolist() == pytest.approx([0.8, 0.8])
        and (weight[is_structure] == 1.5).all()
        and (weight[~is_structure] == 0.5).all()
    )
    even = choices.credit(is_structure, 1.5, 0.5, True)
    assert even.mean(1).tolist() == pytest.approx([1.0, 1.0]) and torch.allclose(even, weight / 0.8)


def test_neighbouring_steps_share_a_state():
    """The example of the reference: steps 0 0 1 2 3 3 4, two to a state."""
    step_of = torch.tensor([[0, 0, 1, 2, 3, 3, 4], [6, 6, 1, 2, 3, 9, 9]])
    assert choices.trace_groups(step_of, 2).tolist() == [[0, 0, 0, 1, 1, 1, 2], [1, 1, 0, 0, 1, 2, 2]]
    assert choices.trace_groups(step_of, 1)[1].tolist() == [3, 3, 0, 1, 2, 4, 4]


def test_an_update_knows_its_tokens():
    first, second = torch.tensor([[True, False, False]]), torch.tensor([[False, False, True]])
    assert choices.Update("all", {"a": first, "b": second}).tokens.tolist() == [[True, False, True]]
