"""The shipped checkpoints can do what the testbed promises: draw, describe, plan, retrieve."""

import numpy as np
import pytest
import torch

from mmalign.hub import CHECKPOINTS
from mmalign.models import mmada, showo
from mmalign.testbed import measure, oracle, world
from mmalign.testbed.world import Clause
from mmalign.types import Request


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


@pytest.mark.parametrize("family", [mmada, showo])
def test_a_masked_member_draws_what_it_is_asked_for(family):
    """On prompts without a novel pair, whose codes it has seen."""
    folder = CHECKPOINTS / f"tiny-{family.__name__.rpartition('.')[2]}"
    prompts = world.prompts("val", 1)
    pictures = [sample.image for sample in family.load(folder).generate([Request(prompt, 0, n) for n, prompt in enumerate(prompts)])]
    readings = oracle.read(np.stack(pictures))
    right = [world.strict(world.clauses_of(p), one.scene, one.unclear) for p, one in zip(prompts, readings, strict=True)]
    assert np.mean(right) >= 0.25
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 6e6


def test_tiny_showo_ranks_the_true_caption_first():
    assert measure.caption_ranking(showo.load(CHECKPOINTS / "tiny-showo"), 100, seed=1) >= 0.8


def test_changed_captions_are_false_of_their_pictures():
    pictures, true, false = measure.caption_pairs(50)
    assert len(pictures) == 50 and all(one != other for one, other in zip(true, false, strict=True))


def test_plans_parse_back_into_their_scenes():
    for _, (_, _, scene) in zip(range(200), world.sample_prompts("test", world.KINDS, 5), strict=False):
        assert tuple(sorted(measure.parse_plan(world.plan_of(scene)))) == scene
    assert measure.parse_plan("a lovely dog") is None
    assert world.facts((Clause("circle"),), measure.parse_plan("small red circle top left")) == {"circle count": True}
