"""Token weights of a dense step: pictures without advantage are not explained, and nothing else changes for it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.games import PROMPTS, additive, pictures
from mmalign.trainers import _autoregressive as ar
from mmalign.trainers import dense_grpo

from mmalign.attribution import Attribution, FastShap, Tool
from mmalign.reward import RewardBatch
from mmalign.types import Prompt, Request, Sample

GRID = (6, 6)


class Counted:
    """An additive scorer that keeps the pictures it was asked about, and in what precision."""

    name = "counted"

    def __init__(self) -> None:
        self.inner, self.rows, self.precisions = additive(), 0, set()

    def score_pixels(self, pixels_BCHW, prompts):
        self.rows += len(pixels_BCHW)
        self.precisions.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return self.inner.score_pixels(pixels_BCHW, prompts)


def weights_of(advantages: list[float], number: int = 3, **options):
    prompts = [Prompt(str(row), PROMPTS[row]) for row in range(number)]
    rollout = ar.Rollout(
        prompts,
        [Sample(Request(prompt, 0, 0)) for prompt in prompts],
        encoded=None,
        drawn=SimpleNamespace(actions=torch.zeros(number, 36)),
        pixels=pictures(number),
    )
    scorer, logged = Counted(), {}
    loop = SimpleNamespace(log=logged.update, seeds=lambda *_: [7])
    tool = options.pop("tool", Attribution(grid=6, fast_shap=FastShap(pairs=4)))
    config = dense_grpo.Config(tool=tool, **options)
    found = dense_grpo.credit(config, scorer, SimpleNamespace(grid=GRID), rollout, torch.tensor(advantages), loop)
    return found, scorer, logged


@pytest.mark.parametrize("tool", ["fast_shap", "lime", "random"])
def test_only_pictures_with_advantage_are_explained(tool: Tool) -> None:
    whole, every, _ = weights_of([1.0, -1.0, 0.5], attribution=tool)
    part, some, logged = weights_of([1.0, 0.0, 0.5], attribution=tool)
    assert torch.equal(part[1], torch.ones(36)) and logged["explained"] == pytest.approx(2 / 3)
    assert torch.allclose(part[[0, 2]], whole[[0, 2]], atol=1e-6) and not torch.equal(whole[1], torch.ones(36))
    assert some.rows == every.rows * 2 / 3


def test_a_step_that_teaches_nothing_asks_nothing() -> None:
    weights, scorer, logged = weights_of([0.0, 0.0, 0.0])
    assert torch.equal(weights, torch.ones(3, 36)) and scorer.rows == 0 and logged == {"explained": 0.0}


def test_equal_rewards_leave_no_advantage_to_explain() -> None:
    """0.1 + 0.2 + ... is not exact, and what rounding leaves must not count as an advantage."""
    config = dense_grpo.Config(samples=3, images=1)
    total = np.array([0.1 + 0.2, 0.3, 0.1 * 3, 0.3, 0.9, 0.3])
    scored = RewardBatch(total, {}, {}, np.ones(6, bool), {}, {})
    found = ar.advantages_of(scored, config).value
    assert float(found[0].abs().max()) < dense_grpo.NO_ADVANTAGE < float(found[1].abs().min())


@pytest.mark.parametrize("control", ["permuted", "mean"])
def test_controls_touch_only_what_was_explained(control: str) -> None:
    plain, _, _ = weights_of([1.0, 0.0, 0.5])
    found, _, _ = weights_of([1.0, 0.0, 0.5], control=control)
    assert torch.equal(found[1], torch.ones(36)) and not torch.equal(found[0], plain[0])
    assert torch.allclose(found.mean(1), plain.mean(1), atol=1e-6)


def test_mixed_precision_is_the_scorers_alone() -> None:
    for autocast, expected in (("none", torch.float32), ("bfloat16", torch.bfloat16)):
        weights, scorer, _ = weights_of([1.0, 1.0, 1.0], tool=Attribution(grid=6, fast_shap=FastShap(pairs=4), autocast=autocast))
        assert scorer.precisions == {expected} and weights.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
