"""The games that attribution plays: blur masking, dropped patches, gradients, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from helpers.games import PROMPTS, Additive, BrightScorer, Curved, additive, pictures, tiny_clip

from mmalign.attribution.game import BlurGame, DropGame, box_blur, ends, values
from mmalign.attribution.protocol import BlackBox
from mmalign.types import MmalignError, Prompt, UsageError


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("width", [1, 3, 4, 17, 65])
@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_the_blur_is_that_of_opencv(width: int, shape: tuple[int, int]) -> None:
    cv2 = pytest.importorskip("cv2", reason="the extra 'attribution' carries the reference for the blur: mmalign[attribution]")
    pixels = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    expected = cv2.blur(pixels[0].permute(1, 2, 0).numpy(), (width, width))
    assert torch.allclose(box_blur(pixels, width)[0].permute(1, 2, 0), torch.from_numpy(expected), atol=2e-6)


def test_whole_and_empty_pictures_score_as_picture_and_blur() -> None:
    scorer, pixels = additive(), pictures()
    game = BlurGame(scorer, pixels, PROMPTS, (6, 6), blur=0.5)
    full, empty = ends(game)
    assert torch.allclose(full.float(), scorer.score_pixels(pixels, PROMPTS))
    assert torch.allclose(empty.float(), scorer.score_pixels(box_blur(pixels, 12), PROMPTS))
    assert game.evaluations == 2


def test_every_picture_keeps_its_own_prompt_and_chunks_change_nothing() -> None:
    class Counted(Additive):
        def score_pixels(self, pixels_BCHW, prompts):
            return super().score_pixels(pixels_BCHW, prompts) + torch.tensor([100.0 * len(prompt) for prompt in prompts])

    scorer, pixels = Counted(additive().weights_CHW), pictures()
    masks = torch.rand(7, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = values(BlurGame(scorer, pixels, PROMPTS, (6, 6)), masks)
    parts = values(BlurGame(scorer, pixels, PROMPTS, (6, 6), chunk=4), masks)
    alone = [values(BlurGame(scorer, pixels[i : i + 1], PROMPTS[i : i + 1], (6, 6)), masks) for i in range(3)]
    assert torch.allclose(whole, parts, atol=1e-4) and torch.allclose(whole, torch.cat(alone), atol=1e-4)


def test_slopes_are_the_derivative_of_presence() -> None:
    game = BlurGame(Curved(additive()), pictures().double(), PROMPTS, (4, 4))
    slopes = game.slopes(torch.full((4, 4), 0.5))
    step = 1e-4
    for cell in ((0, 0), (2, 3)):
        nudge = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
        nudge[0, 0, cell[0], cell[1]] = step
        around = []
        for sign in (1, -1):
            presence = (0.5 + sign * nudge).repeat_interleave(6, 2).repeat_interleave(6, 3)
            around.append(game.scorer.score_pixels(game.absent + presence * (game.pixels - game.absent), PROMPTS))
        assert torch.allclose(slopes[:, cell[0], cell[1]], (around[0] - around[1]) / (2 * step), rtol=1e-4)
    assert game.evaluations == 3


def test_a_scorer_without_gradients_has_no_slopes() -> None:
    assert BlurGame(BlackBox(BrightScorer()), pictures(), PROMPTS, (4, 4)).slopes(torch.full((4, 4), 0.5)) is None


def test_dropping_nothing_is_the_scorers_own_score(clip) -> None:
    pixels = pictures(size=32)
    game = DropGame(clip, pixels, PROMPTS)
    full, _ = ends(game)
    assert torch.allclose(full, clip.score_pixels(pixels, PROMPTS).double(), atol=1e-6)


def test_dropped_rows_do_not_depend_on_their_neighbours(clip) -> None:
    game = DropGame(clip, pictures(size=32), PROMPTS)
    masks = torch.rand(9, *game.grid, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 9)[:, None, None]
    together = values(game, masks)
    alone = torch.cat([values(game, mask[None]) for mask in masks], dim=1)
    assert torch.allclose(together, alone, atol=1e-6)
    assert together.std(1).min() > 1e-6, "the masks must matter"


def test_gates_join_dropping_at_zero_and_one(clip) -> None:
    pixels, index = pictures(size=32), torch.tensor([0, 1, 2, 2])
    keep = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    dropped = clip.score_patches(pixels, PROMPTS, keep, index)
    gated = clip.score_patches(pixels, PROMPTS, keep.float().clamp(min=1e-30), index)
    assert torch.allclose(dropped, gated, atol=1e-6)


def test_the_slope_of_a_gate_is_its_derivative(clip) -> None:
    pixels = pictures(1, size=32)
    slopes = DropGame(clip, pixels, PROMPTS[:1]).slopes(torch.full((4, 4), 0.5)).flatten()
    gates = torch.full((1, 16), 0.5)
    up, down = gates.clone(), gates.clone()
    up[0, 5], down[0, 5] = 0.6, 0.4
    rise = clip.score_patches(pixels, PROMPTS[:1], torch.cat([up, down]), torch.tensor([0, 0]))
    assert float(slopes[5]) == pytest.approx(float(rise[0] - rise[1]) / 0.2, rel=0.05)


def test_games_refuse_what_they_cannot_play() -> None:
    with pytest.raises(UsageError, match="24x24 pixels has no 5x5 grid"):
        BlurGame(additive(), pictures(), PROMPTS, (5, 5))
    with pytest.raises(UsageError, match="3 pictures and 2 prompts"):
        BlurGame(additive(), pictures(), PROMPTS[:2], (6, 6))
    broken = Additive(torch.full((3, 24, 24), float("nan")))
    with pytest.raises(MmalignError, match="values that are not finite"):
        ends(BlurGame(broken, pictures(), PROMPTS, (6, 6)))


def test_a_black_box_hands_its_prompts_meta_on_and_raises_on_a_failure() -> None:
    class Meta(BrightScorer):
        def score(self, samples):
            assert [sample.request.prompt.meta for sample in samples] == [{"k": 1}] * len(samples)
            return super().score(samples)

    pixels = pictures(1)
    box = BlackBox(Meta(), (Prompt("p", PROMPTS[0], meta={"k": 1}),))
    assert float(box.score_pixels(pixels, PROMPTS[:1])[0]) == pytest.approx(float(pixels.mean()), abs=1 / 255)
    with pytest.raises(MmalignError, match="'bright' failed on a masked picture of 'a red circle': timeout"):
        BlackBox(BrightScorer(fails=True)).score_pixels(pixels, PROMPTS[:1])
