"""LIME, Grad-CAM, the controls, heat maps, the amortised head, and the one function that runs them all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.games import PROMPTS, BrightScorer, Convolved, Curved, Tokens, additive, pictures, tiny_clip

from mmalign.attribution import Amortised, AmortisedHead, Attribution, BlurGame, FastShap, Lime, Shap, attribute
from mmalign.attribution.controls import picture_generator
from mmalign.attribution.lime import lime, proximity, superpixels, switch_bank, weighted_ridge
from mmalign.scorers import shapes
from mmalign.testbed.render import render
from mmalign.testbed.world import Clause, Thing
from mmalign.types import MmalignError, Prompt, UsageError


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("intercept", [True, False])
def test_lime_is_the_direct_least_squares_solution(intercept: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    switches = switch_bank(20, 100, 0).double()
    answers = torch.randn(100, generator=generator).double() + 3
    weights, alpha = proximity(switches, 0.5), 0.7
    found = weighted_ridge(switches, answers, weights, alpha, intercept)
    design = torch.cat([switches, torch.ones(100, 1)], 1) if intercept else switches
    penalty = (alpha**0.5) * torch.eye(20, design.shape[1]).double()
    rows = torch.cat([design * weights.sqrt()[:, None], penalty])
    direct = np.linalg.lstsq(rows.numpy(), torch.cat([answers * weights.sqrt(), torch.zeros(20)]).numpy(), rcond=None)[0]
    assert np.allclose(found, direct[:20], atol=1e-10)


def test_proximity_is_the_kernel_of_the_cosine_distance() -> None:
    switches = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert proximity(switches, 0.5).tolist() == pytest.approx([1, np.exp(-0.5 / 0.25), np.exp(-1 / 0.25)])


def test_lime_finds_the_superpixels_that_matter_and_its_targets_agree_on_order() -> None:
    scorer = additive()
    scorer.weights_CHW[:, :, :12] = 0
    pixels = pictures(1)
    score, probability = (
        lime(BlurGame(scorer, pixels, PROMPTS[:1], (24, 24)), Lime(superpixels=36, target=target)) for target in ("score", "probability")
    )
    assert score[0, :, 14:].abs().mean() > 3 * score[0, :, :10].abs().mean()
    assert np.corrcoef(score.flatten(), probability.flatten())[0, 1] > 0.95
    assert probability.abs().max() < 0.25 * score.abs().max(), "a logistic of temperature 10 has a slope of at most 1/40"


def test_superpixels_cover_the_picture_without_gaps_in_their_numbers() -> None:
    for labels in superpixels(pictures(2), Lime(superpixels=30)):
        assert labels.shape == (24, 24) and labels.unique().tolist() == list(range(int(labels.max()) + 1))


def test_grad_cam_is_the_hand_derived_gradient_of_a_linear_model() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolution = torch.nn.Conv2d(3, 5, 4, stride=4)
    head = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(1))
    pixels = pictures()
    found = attribute(Attribution(tool="gradcam", grid=6), Convolved(convolution, head), pixels, PROMPTS)
    expected = (head.mean((1, 2))[None, :, None, None] * convolution(pixels).detach()).sum(1).clamp(min=0)
    shown = F.interpolate(expected[:, None], (24, 24), mode="bilinear", align_corners=False)[:, 0].unflatten(2, (6, 4)).mean(3)
    assert torch.allclose(found.credit, shown.unflatten(1, (6, 4)).mean(2).double(), atol=1e-6)
    assert found.evaluations == 3 and found.credit.min() >= 0 and found.credit.max() > 0


@pytest.mark.parametrize("tool", ["fast_shap", "shap", "lime", "gradcam", "random", "constant", "permuted"])
def test_every_tool_gives_maps_that_depend_on_their_picture_alone(clip, tool: str) -> None:
    config = Attribution(tool=tool, grid=8, shap=Shap(evaluations=60), fast_shap=FastShap(pairs=8), lime=Lime(superpixels=16, samples=40))
    pixels = pictures(size=32)
    together = attribute(config, clip, pixels, PROMPTS)
    assert together.weights.shape == together.credit.shape == (3, 8, 8)
    assert together.weights.min() >= 0 and together.weights.max() <= 1 and together.sign == 1
    for i in (2, 0):
        alone = attribute(config, clip, pixels[i : i + 1], PROMPTS[i : i + 1])
        assert torch.allclose(alone.weights[0], together.weights[i], atol=1e-3)
        assert torch.allclose(alone.credit[0], together.credit[i], atol=1e-5)
        assert alone.evaluations == pytest.approx(together.evaluations)


@pytest.mark.parametrize("tool", ["fast_shap", "shap"])
def test_dropping_names_its_game_and_keeps_the_sum_on_another_grid(clip, tool: str) -> None:
    pixels = pictures(size=32)
    found = attribute(Attribution(tool=tool, masking="drop", grid=24), clip, pixels, PROMPTS)
    whole = clip.score_pixels(pixels, PROMPTS).double()
    empty = clip.score_patches(pixels, PROMPTS, torch.zeros(3, 16, dtype=torch.bool), torch.arange(3)).double()
    assert found.tool == f"{tool}/drop" and found.credit.shape == (3, 24, 24)
    assert torch.allclose(found.credit.sum((1, 2)), whole - empty, atol=1e-5)


def test_shap_of_pixels_sums_to_the_same_difference_as_of_tokens() -> None:
    scorer, pixels = Curved(additive()), pictures()
    tokens = attribute(Attribution(tool="shap", grid=6), scorer, pixels, PROMPTS)
    by_pixel = attribute(Attribution(tool="shap", grid=6, shap=Shap(unit="pixel")), scorer, pixels, PROMPTS)
    assert torch.allclose(tokens.credit.sum((1, 2)), by_pixel.credit.sum((1, 2)), atol=1e-5)
    assert not torch.allclose(tokens.credit, by_pixel.credit, atol=1e-3)


def test_pictures_are_resampled_to_a_multiple_of_the_grid_without_loss() -> None:
    class Sized:
        def score_pixels(self, pixels_BCHW, prompts):
            sizes.add(tuple(pixels_BCHW.shape[-2:]))
            return pixels_BCHW.mean((1, 2, 3))

    for size, expected in ((None, (48, 48)), (96, (96, 96))):
        sizes: set[tuple[int, int]] = set()
        attribute(Attribution(tool="fast_shap", size=size, fast_shap=FastShap(pairs=2)), Sized(), pictures(size=32), PROMPTS)
        assert sizes == {expected}


def test_controls_are_what_their_names_say() -> None:
    scorer, pixels = Curved(additive()), pictures()
    constant, random, real, permuted = (
        attribute(Attribution(tool=tool, grid=6), scorer, pixels, PROMPTS) for tool in ("constant", "random", "fast_shap", "permuted")
    )
    assert constant.weights.unique().tolist() == [0.5] and constant.evaluations == 0
    assert not torch.equal(random.weights[0], random.weights[1])
    assert torch.equal(real.weights.flatten(1).sort().values, permuted.weights.flatten(1).sort().values)
    assert not torch.equal(real.weights, permuted.weights) and permuted.tool == "permuted fast_shap"
    other = attribute(Attribution(tool="random", grid=6, seed=1), scorer, pixels, PROMPTS)
    assert not torch.equal(random.weights, other.weights)


def test_a_pictures_random_stream_follows_its_content() -> None:
    first, second = pictures(2)
    draws = [
        torch.rand(1, generator=picture_generator(*key)) for key in ((first, "a", 0), (first, "a", 0), (second, "a", 0), (first, "b", 0))
    ]
    assert draws[0] == draws[1] and len({float(draw) for draw in draws}) == 3


def test_the_oracle_marks_the_things_the_prompt_names() -> None:
    scene = (Thing(0, 0, "circle", "red", "large"), Thing(2, 2, "cross", "blue", "large"))
    pixels = torch.from_numpy(render([scene])).permute(0, 3, 1, 2).float() / 255
    prompt = Prompt("p", "a photo of a red circle", meta={"include": [vars(Clause("circle", color="red"))]})
    found = attribute(Attribution(tool="oracle", grid=8), shapes.load(), pixels, [prompt])
    assert found.weights[0, 1, 1] == 1 and found.weights[0, 4:, 4:].max() == 0 and found.sign == 1


def test_rahf_resizes_the_scorers_heat_map_and_marks_faults() -> None:
    pixels = pictures(2, size=32)
    found = attribute(Attribution(tool="rahf", grid=24), BrightScorer(), pixels, PROMPTS[:2])
    green = (pixels[:, 1] * 255).round() / 255
    expected = F.interpolate(green[:, None], (24, 24), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(found.weights.float(), expected, atol=1e-6) and found.sign == -1


def test_what_a_scorer_lacks_is_said_in_a_sentence(clip) -> None:
    pixels = pictures(size=32)
    with pytest.raises(UsageError, match="'bright' cannot serve gradcam: it offers no patch_embedding"):
        attribute(Attribution(tool="gradcam", grid=8), BrightScorer(), pixels, PROMPTS)
    with pytest.raises(UsageError, match='cannot serve masking "drop": it offers no patch_grid and score_patches'):
        attribute(Attribution(grid=8, masking="drop"), BrightScorer(), pixels, PROMPTS)
    with pytest.raises(UsageError, match="'bright' returned no heat map"):
        attribute(Attribution(tool="oracle", grid=8), BrightScorer(has_map=False), pixels, PROMPTS)
    with pytest.raises(UsageError, match="needs a head"):
        attribute(Attribution(tool="amortised", grid=8), clip, pixels, PROMPTS)
    with pytest.raises(UsageError, match=r"floats in \[0, 1\] and got \(3, 3, 32, 32\) torch.uint8"):
        attribute(Attribution(grid=8), clip, (pixels * 255).to(torch.uint8), PROMPTS)
    for wrong in ({"grid": 1}, {"size": 25}, {"blur": 0.0}, {"of": "permuted"}):
        with pytest.raises(ValueError):
            Attribution(**wrong)


def test_the_amortised_head_learns_credit_from_pairs_and_then_costs_three_evaluations() -> None:
    scorer = Tokens(6)
    head = AmortisedHead(scorer, 3, Amortised(share=1.0, width=32, learning_rate=3e-3))
    with pytest.raises(MmalignError, match="fidelity on spare pairs is nan, below its floor"):
        head.explain(BlurGame(scorer, pictures(), PROMPTS, (6, 6)))
    for step in range(200):
        figures = head.step(BlurGame(scorer, pictures(8, seed=step), [PROMPTS[i % 3] for i in range(8)], (6, 6)))
    assert figures["fidelity"] > 0.7
    game = BlurGame(scorer, pictures(seed=999), PROMPTS, (6, 6))
    found = head.explain(game)
    whole, empty = game.pixels, game.absent
    truth = (scorer.patch_tokens(whole) - scorer.patch_tokens(empty)) * scorer.text_features(PROMPTS)[:, :, None, None]
    assert game.evaluations == 3
    assert torch.allclose(found.sum((1, 2)), truth.sum((1, 2, 3)).double(), atol=1e-5)
    assert np.corrcoef(found.flatten(), truth.sum(1).flatten())[0, 1] > 0.7


def test_attribution_uses_fast_shap_until_the_head_is_good_enough() -> None:
    scorer = Tokens(6)
    head = AmortisedHead(scorer, 3, Amortised(share=1.0))
    first = attribute(Attribution(tool="amortised", grid=6), scorer, pictures(), PROMPTS, head)
    assert first.tool == "fast_shap" and first.evaluations == pytest.approx(90 + 1 + 2 * 10)
    head.memory[2] = 1.0
    later = attribute(Attribution(tool="amortised", grid=6), scorer, pictures(), PROMPTS, head)
    assert later.tool == "amortised" and later.evaluations == pytest.approx(3 + 1 + 2 * 10)
