"""The shipped checkpoints can do what the testbed promises: draw, describe, plan, retrieve."""

import pytest
import torch

from mmalign.hub import CHECKPOINTS
from mmalign.testbed import measure, world
from mmalign.testbed.world import Clause


@pytest.fixture(scope="module")
def janus():
    from mmalign.models import janus as family

    return family.load(CHECKPOINTS / "tiny-janus")


def test_tiny_janus_ranks_the_true_caption_first(janus):
    assert measure.caption_ranking(janus, 150, seed=1) >= 0.86


def test_tiny_janus_writes_plans_of_the_world(janus):
    assert measure.plan_accuracy(janus, 40, seed=1) >= 0.5


def test_tiny_clip_finds_the_right_description_among_32():
    from transformers import CLIPModel, CLIPTokenizer

    clip = CLIPModel.from_pretrained(CHECKPOINTS / "tiny-clip", dtype=torch.float32).eval()
    assert measure.retrieval(clip, CLIPTokenizer.from_pretrained(CHECKPOINTS / "tiny-clip"), rounds=6, seed=50) >= 0.8


def test_changed_captions_are_false_of_their_pictures():
    pictures, true, false = measure.caption_pairs(50)
    assert len(pictures) == 50 and all(one != other for one, other in zip(true, false, strict=True))


def test_plans_parse_back_into_their_scenes():
    for _, (_, _, scene) in zip(range(200), world.sample_prompts("test", world.KINDS, 5), strict=False):
        assert tuple(sorted(measure.parse_plan(world.plan_of(scene)))) == scene
    assert measure.parse_plan("a lovely dog") is None
    assert world.facts((Clause("circle"),), measure.parse_plan("small red circle top left")) == {"circle count": True}
