"""SHAP on boxes: equal to the `shap` package, exact where truth is known, and additive to the score's difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.games import PROMPTS, Curved, additive, pictures
from helpers.shap_package import explain_grid, image_explainer

from mmalign.attribution.game import BlurGame, DropGame, ends
from mmalign.attribution.shap import Shap, expanded, halves, shap
from mmalign.scorers import clipscore
from mmalign.testbed.build import CHECKPOINTS
from mmalign.testbed.render import render
from mmalign.testbed.world import Thing

SCENES = ((Thing(0, 0, "circle", "red", "large"), Thing(2, 1, "square", "blue", "large")), (Thing(1, 2, "cross", "black", "large"),))
TEXTS = ["a photo of a red circle and a blue square", "a photo of a black cross"]


@pytest.fixture(scope="module")
def clip():
    return clipscore.load(clipscore.Config(model=str(CHECKPOINTS / "tiny-clip")))


def boards(size: int) -> torch.Tensor:
    pixels = torch.from_numpy(render(SCENES)).permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.interpolate(pixels, (size, size), mode="nearest")


@pytest.mark.parametrize("batch", [10, 50])
def test_equal_to_the_package_on_the_24x24_grid(clip, batch: int) -> None:
    pytest.importorskip("shap", reason="the extra 'attribution' carries the reference: mmalign[attribution]")
    game = BlurGame(clip, boards(96)[:1], TEXTS[:1], (24, 24))
    own = shap(game, Shap(evaluations=500, batch=batch))[0].numpy()
    spent = game.evaluations
    theirs, counted = explain_grid(game, 500, batch)
    assert counted == spent == 500, "the same number of evaluations"
    assert np.abs(own - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_equal_to_the_package_on_dropped_patches(clip) -> None:
    pytest.importorskip("shap", reason="the extra 'attribution' carries the reference: mmalign[attribution]")
    game = DropGame(clip, boards(32)[:1], TEXTS[:1])
    own = shap(game, Shap(evaluations=200))[0].numpy()
    theirs, _ = explain_grid(game, 200, 10)
    assert np.abs(own - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_equal_to_the_packages_image_masker_on_pixels_and_channels() -> None:
    pytest.importorskip("shap", reason="the extra 'attribution' carries the reference: mmalign[attribution]")
    pytest.importorskip("cv2", reason="the package's blur needs opencv")
    scorer, pixels = Curved(additive(6)), pictures(1, size=6)
    own = shap(BlurGame(scorer, pixels, PROMPTS[:1], (6, 6), blur=0.5), Shap(evaluations=3000, unit="pixel"), channels=3)[0].numpy()
    explain = image_explainer(lambda x: scorer.score_pixels(x, []), 6, 6, kernel=3)
    theirs = explain(pixels[0].permute(1, 2, 0).numpy(), 3000, 10)
    assert np.abs(own - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("evaluations", [2, 3, 17, 100])
def test_the_sum_is_the_difference_between_whole_and_empty(evaluations: int) -> None:
    game = BlurGame(Curved(additive()), pictures(), PROMPTS, (6, 6))
    full, empty = ends(game)
    assert torch.allclose(shap(game, Shap(evaluations=evaluations)).sum((1, 2)), full - empty, atol=1e-5)


def test_an_additive_game_is_solved_exactly_when_the_tree_is_finished() -> None:
    scorer = additive()
    game = BlurGame(scorer, pictures(), PROMPTS, (3, 3))
    found = shap(game, Shap(evaluations=10_000))
    assert torch.allclose(found, scorer.credit(game.pixels, game.absent, 3), atol=1e-3)
    assert game.evaluations < 200, "a finished tree stops asking"


def test_two_cells_get_their_shapley_values() -> None:
    game = BlurGame(Curved(additive(4)), pictures(1, size=4), PROMPTS[:1], (1, 2))
    masks = torch.tensor([[[False, False]], [[True, False]], [[False, True]], [[True, True]]])
    empty, left, right, both = game.rows(torch.zeros(4, dtype=torch.long), masks[:, None]).tolist()
    expected = [(left - empty + both - right) / 2, (right - empty + both - left) / 2]
    assert shap(game, Shap(evaluations=100))[0, 0].tolist() == pytest.approx(expected, rel=1e-6)


def test_the_longer_side_is_halved_rows_first_channels_last() -> None:
    assert halves((0, 5, 0, 5, 0, 3)) == ((0, 3, 0, 5, 0, 3), (3, 5, 0, 5, 0, 3))
    assert halves((0, 2, 0, 5, 0, 3)) == ((0, 2, 0, 3, 0, 3), (0, 2, 3, 5, 0, 3))
    assert halves((3, 4, 7, 8, 0, 3)) == ((3, 4, 7, 8, 0, 2), (3, 4, 7, 8, 2, 3))
    assert halves((3, 4, 7, 8, 2, 3)) is None


def test_a_picture_does_not_depend_on_its_batch() -> None:
    scorer, pixels = Curved(additive()), pictures()
    together = shap(BlurGame(scorer, pixels, PROMPTS, (6, 6)), Shap(evaluations=60))
    alone = [shap(BlurGame(scorer, pixels[i : i + 1], PROMPTS[i : i + 1], (6, 6)), Shap(evaluations=60)) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)


def test_credit_of_pixels_is_summed_over_cells() -> None:
    credit = torch.arange(16.0).reshape(1, 4, 4)
    assert expanded(credit, (2, 2))[0].tolist() == [[0 + 1 + 4 + 5, 2 + 3 + 6 + 7], [8 + 9 + 12 + 13, 10 + 11 + 14 + 15]]


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="evaluations is 1"):
        Shap(evaluations=1)
