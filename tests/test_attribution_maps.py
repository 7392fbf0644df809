"""Maps: normalisation, resizing, localisation figures and token weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmalign.attribution.maps import entropy, normalise, overlay, resize_area, resize_bilinear, token_weights, top_mass
from mmalign.types import UsageError


def random_map(seed: int = 0, side: int = 24, number: int = 2) -> torch.Tensor:
    return torch.randn(number, side, side, generator=torch.Generator().manual_seed(seed)).double()


@given(scale=st.floats(0.01, 100), shift=st.floats(-50, 50))
def test_signed_normalisation_ignores_scale_and_shift(scale: float, shift: float) -> None:
    credit = random_map()
    found = normalise(credit * scale + shift)
    assert torch.allclose(found, normalise(credit), atol=1e-9)
    assert found.amin((1, 2)).tolist() == [0, 0] and found.amax((1, 2)).tolist() == [1, 1]


def test_rules_differ_in_what_a_negative_cell_becomes() -> None:
    credit = torch.tensor([[[-2.0, 0.0], [1.0, 0.5]]])
    assert normalise(credit, "signed").flatten().tolist() == pytest.approx([0, 2 / 3, 1, 2.5 / 3])
    assert normalise(credit, "positive").flatten().tolist() == pytest.approx([0, 0, 1, 0.5])


@pytest.mark.parametrize("level", [-3.0, 0.0, 7.0])
def test_a_constant_map_becomes_one_half(level: float) -> None:
    for rule in ("signed", "positive"):
        assert normalise(torch.full((1, 3, 3), level), rule).unique().tolist() == [0.5]


@given(source=st.integers(1, 30), target=st.integers(1, 30))
def test_area_resizing_keeps_the_mean_and_constants(source: int, target: int) -> None:
    found = resize_area(random_map(side=source), target, target)
    assert torch.allclose(found.mean((1, 2)), random_map(side=source).mean((1, 2)), atol=1e-12)
    assert torch.allclose(resize_area(torch.ones(1, source, source), target, target), torch.ones(1, target, target))


def test_area_resizing_to_a_divisor_is_the_patch_mean() -> None:
    credit = random_map()
    assert torch.allclose(resize_area(credit, 8, 8), credit.unflatten(2, (8, 3)).mean(3).unflatten(1, (8, 3)).mean(2))


def test_area_resizing_between_grids_that_share_no_border() -> None:
    assert resize_area(torch.tensor([[[1.0, 2.0, 4.0]]]), 1, 2)[0, 0].tolist() == pytest.approx([(1 + 0.5 * 2) / 1.5, (0.5 * 2 + 4) / 1.5])


def test_bilinear_resizing_reads_between_cell_centres() -> None:
    assert resize_bilinear(torch.tensor([[[0.0, 1.0]]]), 1, 4)[0, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1])


def test_mass_and_entropy_of_equal_weights_are_the_papers() -> None:
    flat = torch.full((1, 24, 24), 0.5)
    assert float(top_mass(flat)[0]) == pytest.approx(57 / 576)
    assert float(entropy(flat)[0]) == pytest.approx(math.log(576), abs=1e-6)


def test_mass_and_entropy_of_one_hot_weights() -> None:
    single = torch.zeros(1, 24, 24)
    single[0, 3, 4] = 1
    assert float(top_mass(single)[0]) == 1 and float(entropy(single)[0]) == 0


def test_token_weights_are_one_plus_lambda_m_in_raster_order() -> None:
    weights = torch.tensor([[[0.0, 0.5], [1.0, 0.25]]])
    assert token_weights(weights, 0.1)[0].tolist() == pytest.approx([1, 1.05, 1.1, 1.025])
    assert token_weights(weights, -0.1)[0].tolist() == pytest.approx([1, 0.95, 0.9, 0.975])
    assert token_weights(weights, 0.4, grid=1).tolist() == [[pytest.approx(1 + 0.4 * 1.75 / 4)]]
    assert token_weights(weights, 0.4, grid=(1, 2))[0].tolist() == pytest.approx([1 + 0.4 * 0.5, 1 + 0.4 * 0.375])


def test_normalised_token_weights_keep_the_total_advantage() -> None:
    weights = token_weights(torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(1)), 1.0, grid=8, normalise=True)
    assert weights.shape == (3, 64) and torch.allclose(weights.mean(1), torch.ones(3))


def test_token_weights_refuse_credit_and_lambdas_that_turn_signs() -> None:
    with pytest.raises(UsageError, match=r"maps in \[0, 1\].*Maps\.weights"):
        token_weights(torch.tensor([[[-1.0, 2.0]]]), 0.1)
    with pytest.raises(UsageError, match="lambda is -1.5"):
        token_weights(torch.zeros(1, 2, 2), -1.5)


def test_the_overlay_is_grey_at_zero_and_reddest_at_one() -> None:
    image = torch.full((8, 8, 3), 100, dtype=torch.uint8).numpy()
    image[..., 2] = 160
    weights = torch.zeros(2, 2)
    weights[0, 0] = 1
    shown = overlay(image, weights)
    assert shown.shape == (8, 8, 3) and shown[7, 7].tolist() == [120, 120, 120]
    assert shown[0, 0].tolist() == [120 + round(0.6 * 135), 120 - round(0.6 * 90), 120 - round(0.6 * 120)]
