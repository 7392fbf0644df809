"""Fast SHAP: its algebra against brute force, games with known credit, and its fidelity against the long reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.games import PROMPTS, BrightScorer, Curved, additive, pictures

from mmalign.attribution.fast_shap import VARIANTS, FastShap, fast_shap, left_out, mask_bank, prior_factor, regress
from mmalign.attribution.game import BlurGame, DropGame, ends
from mmalign.attribution.maps import resize_area
from mmalign.attribution.protocol import BlackBox
from mmalign.attribution.reference import kernel_shap
from mmalign.attribution.shap import Shap, shap
from mmalign.hub import fingerprint_weights
from mmalign.scorers import clipscore
from mmalign.testbed.build import CHECKPOINTS
from mmalign.types import UsageError

PROBES = FastShap(pairs=0, probes=4)
REFERENCE = Path(__file__).parent / "data" / "attribution_reference.npz"


def curved(number: int = 3) -> BlurGame:
    return BlurGame(Curved(additive()), pictures(number), PROMPTS[:number], (6, 6))


@pytest.mark.parametrize("config", [*VARIANTS.values(), FastShap(steps=0), FastShap(), FastShap(pairs=8), FastShap(pairs=0, probes=2)])
def test_the_sum_is_exactly_the_difference_between_whole_and_empty(config: FastShap) -> None:
    game = curved()
    full, empty = ends(game)
    assert torch.allclose(fast_shap(game, config).sum((1, 2)), full - empty, atol=1e-9, rtol=0)


@pytest.mark.parametrize("config", [FastShap(pairs=64, steps=0), VARIANTS["A"], VARIANTS["B"], FastShap(pairs=0, probes=1)])
def test_an_additive_game_with_fewer_cells_than_pairs_is_solved(config: FastShap) -> None:
    scorer = additive()
    game = BlurGame(scorer, pictures(), PROMPTS, (6, 6))
    truth = scorer.credit(game.pixels, game.absent, 6)
    assert (fast_shap(game, config) - truth).abs().max() < 1e-3 * truth.abs().max()


def test_slopes_that_are_the_credit_are_believed_and_wrong_ones_are_not() -> None:
    """In an additive game the slopes are the credit; a path of noise must not get its way."""
    scorer = additive()
    game = BlurGame(scorer, pictures(), PROMPTS, (12, 12))
    truth = scorer.credit(game.pixels, game.absent, 12)
    assert np.corrcoef(fast_shap(game).flatten(), truth.flatten())[0, 1] > 0.999
    bank = mask_bank((12, 12), 64, 0).flatten(1).double() * 2 - 1
    rows = torch.cat([bank, torch.ones(1, 144).double()])
    noise = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(5)).double()
    misled = regress(rows, truth.flatten(1) @ rows.T, prior_factor((12, 12), noise, FastShap()))
    flat = regress(rows, truth.flatten(1) @ rows.T, prior_factor((12, 12), None, FastShap()))
    closeness = [np.corrcoef(found.flatten(), truth.flatten())[0, 1] for found in (misled, flat)]
    assert closeness[0] > 0.5 * closeness[1] > 0.2


def test_left_out_residuals_are_those_of_refits() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 12, generator=generator).double()
    covariance = rows @ rows.T + 0.3 * torch.eye(7)
    answers = torch.randn(1, 7, generator=generator).double()
    inverse = torch.linalg.inv(covariance)[None]
    closed = left_out(inverse, (inverse @ answers[:, :, None])[:, :, 0])[0]
    for i in range(7):
        others = [j for j in range(7) if j != i]
        predicted = covariance[i, others] @ torch.linalg.solve(covariance[others][:, others], answers[0, others])
        assert float(closed[i]) == pytest.approx(float(answers[0, i] - predicted), rel=1e-9)


def test_regression_chooses_more_noise_for_noisier_answers() -> None:
    """With answers of pure noise the fit must shrink towards the even spread of the total; with clean ones it must follow them."""
    generator = torch.Generator().manual_seed(0)
    bank = mask_bank((12, 12), 64, 0).flatten(1).double() * 2 - 1
    rows = torch.cat([bank, torch.ones(1, 144).double()])
    factor = prior_factor((12, 12), None, FastShap())
    credit = (factor[0] @ torch.randn(144, generator=generator).double())[None]
    clean = credit @ rows.T
    noisy = torch.randn(1, 65, generator=generator).double() * clean.std()
    noisy[:, -1] = clean[:, -1]
    follow = regress(rows, clean, factor) @ rows.T
    shrunk = regress(rows, noisy, factor) @ rows.T
    assert (follow - clean)[:, :-1].norm() / clean[:, :-1].norm() < 0.02
    assert (shrunk - noisy)[:, :-1].norm() / noisy[:, :-1].norm() > 0.2


def test_the_prior_follows_the_slopes_and_keeps_a_floor() -> None:
    path = torch.zeros(1, 6, 6, dtype=torch.float64)
    path[0, 1, 1] = 1.0
    factor = prior_factor((6, 6), path, FastShap())
    spread = (factor @ factor.mT).diagonal(dim1=1, dim2=2).reshape(6, 6)
    assert spread[0:3, 0:3].min() > 100 * spread[4, 4] > 0
    assert spread[1, 1] > 2 * spread[0, 0], "the slope itself is allowed beside its surroundings"


def test_the_bank_is_seeded_complementary_in_use_and_of_all_sizes() -> None:
    bank = mask_bank((24, 24), 64, 0)
    assert torch.equal(bank, mask_bank((24, 24), 64, 0)) and not torch.equal(bank, mask_bank((24, 24), 64, 1))
    sizes = bank.flatten(1).sum(1).double() / 576
    assert 0.4 < float(sizes.mean()) < 0.6 and 0.25 <= float(sizes.min()) < 0.3 and 0.7 < float(sizes.max()) <= 0.75


@pytest.mark.parametrize(
    ("config", "evaluations"), [(VARIANTS["A"], 133), (VARIANTS["B"], 154), (FastShap(), 90), (FastShap(steps=0), 66), (PROBES, 26)]
)
def test_evaluations_of_a_picture_are_counted(config: FastShap, evaluations: int) -> None:
    game = curved()
    fast_shap(game, config)
    assert game.evaluations == pytest.approx(evaluations)


def test_a_picture_does_not_depend_on_its_group() -> None:
    together = fast_shap(curved())
    scorer, pixels = Curved(additive()), pictures()
    alone = [fast_shap(BlurGame(scorer, pixels[i : i + 1], PROMPTS[i : i + 1], (6, 6))) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert torch.equal(together, fast_shap(curved())), "equal inputs give equal bits"


def test_a_black_box_is_explained_without_gradients() -> None:
    game = BlurGame(BlackBox(BrightScorer()), pictures(1), PROMPTS[:1], (4, 4))
    found = fast_shap(game)
    truth = (game.pixels - game.absent).mean(1).unflatten(2, (4, 6)).sum(3).unflatten(1, (4, 6)).sum(2).double() / 576
    assert np.corrcoef(found.flatten(), truth.flatten())[0, 1] > 0.99
    assert game.evaluations == 66


def test_credit_from_slopes_alone_needs_gradients() -> None:
    game = BlurGame(BlackBox(BrightScorer()), pictures(1), PROMPTS[:1], (4, 4))
    with pytest.raises(UsageError, match="set fast_shap.pairs to 32"):
        fast_shap(game, PROBES)
    with pytest.raises(ValueError, match="1 where there are no pairs"):
        FastShap(pairs=0)


def test_the_long_reference_finds_shapley_values() -> None:
    game = BlurGame(Curved(additive(6)), pictures(1, size=6), PROMPTS[:1], (1, 3))
    subsets = torch.tensor([[bool(n & 1), bool(n & 2), bool(n & 4)] for n in range(8)])
    value = game.rows(torch.zeros(8, dtype=torch.long), subsets[:, None, None])
    exact = [
        sum(w * float(value[s | (1 << i)] - value[s]) for s, w in zip(_others(i), (1 / 3, 1 / 6, 1 / 6, 1 / 3), strict=True))
        for i in range(3)
    ]
    found, halves = kernel_shap(game, 4000)
    assert found[0, 0].tolist() == pytest.approx(exact, abs=0.02 * max(map(abs, exact)))
    assert float(found.sum()) == pytest.approx(sum(exact)) and halves.shape == (2, 1, 1, 3)


def _others(i: int) -> list[int]:
    a, b = (1 << j for j in range(3) if j != i)
    return [0, a, b, a | b]


@pytest.fixture(scope="module")
def reference():
    if not REFERENCE.exists():
        pytest.fail(f"{REFERENCE} is missing; make it with `python tests/bench_attribution.py reference`.")
    return np.load(REFERENCE)


def fidelity(found: torch.Tensor, truth: np.ndarray, grid: int) -> float:
    """Mean over pictures of the correlation with the reference after averaging on a grid."""
    pair = [resize_area(torch.as_tensor(m).double(), grid, grid).flatten(1).numpy() for m in (found, truth)]
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*pair, strict=True)]))


def test_the_reference_is_of_the_shipped_checkpoint(reference) -> None:
    remake = "python tests/bench_attribution.py reference"
    assert str(reference["weights"]) == fingerprint_weights(CHECKPOINTS / "tiny-clip"), f"tiny-clip has changed: run `{remake}`"
    assert json.loads(str(reference["prompts"])) and reference["blur"].shape[1:] == (24, 24)


def test_fast_shap_is_as_faithful_as_500_evaluations_of_the_tree(reference) -> None:
    scorer = clipscore.load(clipscore.Config(model=str(CHECKPOINTS / "tiny-clip")))
    pixels = torch.from_numpy(reference["pixels"]).permute(0, 3, 1, 2).float() / 255
    texts = [prompt["text"] for prompt in json.loads(str(reference["prompts"]))]
    large = torch.nn.functional.interpolate(pixels, (96, 96), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    tree, fast = (BlurGame(scorer, large, texts, (24, 24)) for _ in range(2))
    slow_maps, fast_maps = shap(tree, Shap(evaluations=500)), fast_shap(fast)
    assert fast.evaluations == 90 and tree.evaluations == 500
    for grid in (24, 8):
        assert fidelity(fast_maps, reference["blur"], grid) >= fidelity(slow_maps, reference["blur"], grid)


def test_fast_shap_is_as_faithful_in_the_game_of_dropped_patches(reference) -> None:
    scorer = clipscore.load(clipscore.Config(model=str(CHECKPOINTS / "tiny-clip")))
    pixels = torch.from_numpy(reference["pixels"]).permute(0, 3, 1, 2).float() / 255
    texts = [prompt["text"] for prompt in json.loads(str(reference["prompts"]))]
    tree, fast = (DropGame(scorer, pixels, texts) for _ in range(2))
    slow_maps, fast_maps = shap(tree, Shap(evaluations=500)), fast_shap(fast, FastShap(pairs=48, steps=1))
    assert fast.evaluations == 101 and tree.evaluations == 500
    for grid in (8, 4):
        assert fidelity(fast_maps, reference["drop"], grid) >= fidelity(slow_maps, reference["drop"], grid)


def test_probes_in_mixed_precision_say_more_than_pairs_that_cost_more(reference) -> None:
    """What the dense recipe asks: 26 evaluations in bfloat16 against 37 in float32."""
    scorer = clipscore.load(clipscore.Config(model=str(CHECKPOINTS / "tiny-clip")))
    pixels = torch.from_numpy(reference["pixels"]).permute(0, 3, 1, 2).float() / 255
    texts = [prompt["text"] for prompt in json.loads(str(reference["prompts"]))]
    pairs = fast_shap(DropGame(scorer, pixels, texts), FastShap(pairs=16, steps=1))
    with torch.autocast("cpu", torch.bfloat16):
        probes = fast_shap(DropGame(scorer, pixels, texts), PROBES)
    for grid in (8, 4):
        assert fidelity(probes, reference["drop"], grid) > fidelity(pairs, reference["drop"], grid)
