"""Streams of random numbers per sample, and draws from a distribution."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.models.layers.noise import draw, uniforms

SEEDS = st.integers(0, 2**63 - 1)

# numpy.random.Philox(key=42).random_raw(3), shifted right by 11 and divided by 2^53.
GOLDEN = [0.8201981478608876, 0.18924562408645496, 0.8676608148821462]


@given(st.lists(SEEDS, min_size=1, max_size=5), st.integers(1, 40))
@settings(deadline=None)
def test_a_row_is_its_seeds_alone(seeds, count):
    together = uniforms(seeds, count)
    assert together.shape == (len(seeds), count) and together.min() >= 0 and together.max() < 1
    for row, seed in enumerate(seeds):
        assert torch.equal(together[row], uniforms([seed], count + 3)[0, :count])


def test_every_bit_of_a_seed_counts():
    rows = uniforms([0, *(1 << bit for bit in range(63))], 4)
    assert len({tuple(row.tolist()) for row in rows}) == 64


def test_the_numbers_of_a_seed_never_change():
    assert uniforms([42], 3)[0].tolist() == GOLDEN


def test_draws_follow_the_distribution():
    probability = torch.tensor([0.5, 0.0, 0.2, 0.3 - 1e-4, 1e-4])
    number = 200_000
    found = draw(probability.log().expand(number, 5), uniforms([7], number)[0])
    share = torch.bincount(found, minlength=5) / number
    assert share[1] == 0
    assert (share - probability).abs().max() < 4 * (0.25 / number) ** 0.5


def test_the_ends_of_the_interval_fall_on_possible_categories():
    log_prob = torch.tensor([[0.0, 0.3, 0.7, 0.0]]).log()
    last = 1 - 2.0**-53
    assert draw(log_prob, torch.tensor([0.0], dtype=torch.float64)).item() == 1
    assert draw(log_prob, torch.tensor([last], dtype=torch.float64)).item() == 2


@given(st.lists(st.floats(-30, 5), min_size=2, max_size=20), st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_a_draw_is_a_category_that_has_probability(logits, number):
    log_prob = torch.tensor([[*logits, float("-inf")]]).log_softmax(-1)
    chosen = draw(log_prob, torch.tensor([number], dtype=torch.float64)).item()
    assert 0 <= chosen < len(logits)
