"""Batches of constant shape."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.models.layers.lanes import ROWS, SLOTS, WIDE, Lanes, lanes, padded_lengths


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


def work(is_exact):
    """Squares of row numbers; an inexact machine's last bits depend on the width of the lane."""
    widths = []

    def compute(lane):
        widths.append(len(lane.rows))
        return (torch.tensor([float(row**2) + (0 if is_exact else len(lane.rows)) for row in lane.rows]),)

    return compute, widths


@given(st.lists(st.integers(0, 1), max_size=200), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=30)
def test_results_never_depend_on_the_width_of_a_lane(keys, is_exact, is_fixed):
    compute, _ = work(is_exact)
    remembered = Lanes()
    for _ in range(2):
        found = {}
        for lane, (values,) in remembered.run(keys, ROWS if is_fixed else None, WIDE, compute):
            found.update(zip(lane.real, values[: lane.n_real].tolist(), strict=True))
        assert sorted(found) == list(range(len(keys)))
        if is_exact or is_fixed:
            assert found == {row: row**2 + (0 if is_exact else ROWS) for row in found}


def test_wide_lanes_are_tried_once_and_used_where_they_are_exact():
    for is_exact, first, later in ((True, [WIDE, ROWS], [WIDE]), (False, [WIDE, ROWS] + [ROWS] * 4, [ROWS] * 4)):
        compute, widths = work(is_exact)
        remembered = Lanes()
        for expected in (first, later):
            widths.clear()
            list(remembered.run([0] * WIDE, ROWS, WIDE, compute))
            assert widths == expected
        widths.clear()
        list(remembered.run([0] * (WIDE // 2), ROWS, WIDE, compute))
        assert widths == [ROWS] * 2
        widths.clear()
        list(remembered.run([0] * WIDE, ROWS, None, compute))
        assert widths == [ROWS] * (WIDE // ROWS)
