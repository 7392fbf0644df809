"""The builder of tiny-sd3: latents that say everything, a build in small that loads, draws and resumes, and what the shipped one can do."""

import json

import numpy as np
import pytest
import torch

from mmalign.hub import CHECKPOINTS
from mmalign.models import diffusion as family
from mmalign.testbed import build_sd3, oracle, world
from mmalign.testbed.build_clip import make_tokenizer
from mmalign.testbed.build_janus import boards, codes_of
from mmalign.testbed.build_sd3 import Recipe
from mmalign.types import Prompt, Request

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Recipe(heads=2, head=8, layers=2, text_width=16, vae_steps=2, vae_batch=2, steps=3, batch=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("sd3")
    build_sd3.build(root / "tiny-sd3", root / "work", SMALL)
    return root


def test_a_latent_names_its_patch_and_nothing_else():
    scenes = boards(3, 60)
    latents = build_sd3.latents_of(scenes).flatten(2).transpose(1, 2).reshape(-1, build_sd3.BITS)
    codes = codes_of(scenes).flatten()
    known = {int(code): tuple(latent.tolist()) for code, latent in zip(codes, latents, strict=True)}
    assert len(known) > 200 and len(set(known.values())) == len(known)
    assert all(known[int(code)] == tuple(latent.tolist()) for code, latent in zip(codes, latents, strict=True))
    assert known[0] == (0.0,) * 8 and all({abs(bit) for bit in bits} in ({0.0}, {1.0}) for bits in known.values())


def test_the_tokenizer_is_the_same_each_time_so_that_a_build_can_continue():
    first, second = make_tokenizer(), make_tokenizer()
    assert first.get_vocab() == second.get_vocab() and first("a red circle, two squares").input_ids[0] == first.bos_token_id
    assert first.decode(first("a zebra!").input_ids, skip_special_tokens=True) == "a zebra !"


def test_the_loss_weighs_places_and_not_things(built):
    pipe = build_sd3.make_pipeline(SMALL)
    layout = build_sd3.StableDiffusion3(pipe)
    assert float(build_sd3.flow_loss(layout, SMALL, 5)) == float(build_sd3.flow_loss(layout, SMALL, 5))
    assert float(build_sd3.flow_loss(layout, SMALL, 5)) != float(build_sd3.flow_loss(layout, SMALL, 6))


def test_a_build_has_the_official_layout_and_draws(built):
    model = family.load(built / "tiny-sd3")
    assert model.size == (32, 32) and model.settings["steps"] == 10 and model.settings["guidance"] == 2.5
    (sample,) = model.generate([Request(Prompt("p", "a red circle"), 0, 7)])
    assert sample.image.shape == (32, 32, 3)
    index = json.loads((built / "tiny-sd3" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline" and index["text_encoder_3"] == [None, None]


def test_a_stopped_build_continues_where_it_was(built, tmp_path):
    again = build_sd3.make_pipeline(SMALL)
    build_sd3.train_vae(again, SMALL, built / "work")  # done: only reads its state
    build_sd3.train_flow(again, SMALL, built / "work")
    other = build_sd3.make_pipeline(SMALL)
    build_sd3.train_vae(other, SMALL, tmp_path)
    build_sd3.train_flow(other, SMALL, tmp_path)
    for name in ("vae", "transformer", "text_encoder"):
        one, two = getattr(again, name).state_dict(), getattr(other, name).state_dict()
        assert not [key for key in one if not torch.equal(one[key], two[key])]


def test_the_shipped_checkpoint_draws_what_it_is_asked_for():
    model = family.load(CHECKPOINTS / "tiny-sd3")
    prompts = world.prompts("val", 4)
    pictures = [sample.image for sample in model.generate([Request(prompt, 0, n) for n, prompt in enumerate(prompts)])]
    right = [
        world.strict(world.clauses_of(prompt), reading.scene, reading.unclear)
        for prompt, reading in zip(prompts, oracle.read(np.stack(pictures)), strict=True)
    ]
    assert np.mean(right) >= 0.3
    assert sum(file.stat().st_size for file in (CHECKPOINTS / "tiny-sd3").rglob("*") if file.is_file()) < 6e6
