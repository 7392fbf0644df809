"""Batches of constant shape."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.models.layers.lanes import SLOTS, lanes, padded_lengths


@given(st.lists(st.integers(0, 3), max_size=50), st.one_of(st.none(), st.integers(1, 9)))
@settings(deadline=None)
def test_every_row_is_real_once_in_a_lane_of_its_key_and_full_width(keys, width):
    made = list(lanes(keys, width))
    assert sorted(row for lane in made for row in lane.real) == list(range(len(keys)))
    for lane in made:
        assert all(keys[row] == lane.key for row in lane.rows)
        assert 1 <= lane.n_real <= len(lane.rows) and (width is None or len(lane.rows) == width)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=20))
@settings(deadline=None)
def test_a_fixed_length_follows_from_the_row_alone(lengths):
    fixed = padded_lengths(lengths, True)
    assert fixed == [padded_lengths([length], True)[0] for length in lengths]
    assert all(length <= slots < length + SLOTS and slots % SLOTS == 0 for length, slots in zip(lengths, fixed, strict=True))
    assert padded_lengths(lengths, False) == [max(lengths)] * len(lengths)
