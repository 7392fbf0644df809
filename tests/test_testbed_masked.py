"""How the tiny masked models are made: codes that say what a patch shows, rows that share attributes, and builds that load as families."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from mmalign.models import mmada, showo
from mmalign.models.layers.generation import checkpoint_settings, write_settings
from mmalign.models.layers.magvit import read_magvit
from mmalign.models.layers.weights import read_tensors
from mmalign.testbed import build_janus, build_mmada, build_showo, magvit, masked, world
from mmalign.testbed.masked import Stage
from mmalign.trajectory import Policy
from mmalign.types import MmalignError, Request

pytestmark = pytest.mark.usefixtures("one_thread")
BUILDS = {"mmada": (build_mmada, mmada), "showo": (build_showo, showo)}


def scenes(number, seed=7):
    return [scene for _, (_, _, scene) in zip(range(number), world.sample_prompts("train", world.KINDS, seed), strict=False)]


def small(module, **changes):
    """A recipe of seconds."""
    stages = (Stage(2, 1e-3, 4, wrong=0.2, planned=0.5, thing_weight=4.0, by_cell=0.5, answers=2 if module is build_showo else 0),)
    return masked.Recipe(width=32, layers=1, heads=2, picture=magvit.Recipe(stages=((2, 1e-3),), batch=2), stages=stages, **changes)


def test_two_patches_have_one_code_exactly_when_they_look_the_same():
    boards = build_janus.boards(3, 60)
    by_pixels, by_meaning = build_janus.codes_of(boards).flatten().tolist(), magvit.codes_of(boards).flatten().tolist()
    pairs = set(zip(by_pixels, by_meaning, strict=True))
    assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs}) > 200
    assert (0, 0) in pairs


def test_every_quarter_of_every_thing_has_its_own_code():
    kinds = product(world.SHAPES, world.COLORS, world.SIZES, range(4))
    codes = [magvit.code_of(world.Thing(0, 0, shape, color, size), quarter) for shape, color, size, quarter in kinds]
    assert sorted(codes) == list(range(256, 512))


def test_codes_share_exactly_the_attributes_of_their_patches():
    table = masked.code_attributes()
    assert table.shape == (512, 42) and table[0].sum() == 1 and (table[1:256].argmax(1) == 41).all()
    assert (table[256:].sum(1) == 2).all() and table[:, :41].sum(0).min() >= 1

    def common(one, other):
        pair = [magvit.code_of(world.Thing(0, 0, *kind[:3]), kind[3]) for kind in (one, other)]
        return int((table[pair[0]] * table[pair[1]]).sum())

    here = ("circle", "red", "small", 1)
    assert common(here, here) == 2
    assert common(here, ("cross", "red", "large", 3)) == 1 and common(here, ("circle", "blue", "small", 1)) == 1
    assert common(here, ("circle", "blue", "small", 2)) == common(here, ("cross", "blue", "small", 1)) == 0


def test_shared_rows_fold_into_plain_weights(tmp_path):
    model, _ = build_mmada.make_model(small(build_mmada), tmp_path, magvit.make_magvit(0))
    prompts, codes = model.encode_prompts(["a photo of a red circle"]), magvit.codes_of(scenes(1))
    before = model.net.get_input_embeddings().weight.detach().clone()
    masked.share_attributes(model.net, model.offset, seed=1)
    assert {name for name, _ in model.net.named_parameters() if "rows" in name} == {
        f"{layer}.parametrizations.weight.0.rows" for layer in ("model.embed_tokens", "lm_head")
    }
    shown = masked.Trajectory("masked", codes, torch.zeros(codes.shape), Policy(guidance=1.0), (0,))
    hidden = torch.ones_like(codes, dtype=torch.bool)
    with torch.no_grad():
        shared = model.log_prob_given(prompts, shown, hidden, which="cond")
        masked.unshare_attributes(model.net)
        assert torch.allclose(model.log_prob_given(prompts, shown, hidden, which="cond"), shared, atol=1e-5)
    after = model.net.get_input_embeddings().weight
    assert torch.equal(after[: model.offset], before[: model.offset]) and not torch.equal(after[model.offset :], before[model.offset :])


@pytest.mark.parametrize("family", BUILDS)
def test_a_build_is_a_checkpoint_of_its_family(family, tmp_path):
    module, served = BUILDS[family]
    module.build(tmp_path / "out", tmp_path / "work", small(module))
    assert served.recognises(tmp_path / "out")
    model = served.load(tmp_path / "out")
    assert model.size == (32, 32) and model.tokens == 64 and model.codes == 512
    assert model.settings["guidance"] == masked.GUIDANCE and model.settings["steps"] == masked.STEPS
    drawn = model.generate([Request(world.prompts("val", 1)[0], 0, 1, settings={"steps": 2})])[0]
    assert drawn.image.shape == (32, 32, 3)
    assert {value.dtype for value in read_tensors(tmp_path / "out").values()} == {torch.float16}
    model.save(tmp_path / "again")
    assert served.load(tmp_path / "again").settings == model.settings


def test_a_build_that_was_stopped_ends_like_one_that_was_not(tmp_path):
    recipe = small(build_showo)
    longer = replace(recipe, stages=(*recipe.stages, *recipe.stages))
    build_showo.build(tmp_path / "whole", tmp_path / "one", longer)
    build_showo.build(tmp_path / "part", tmp_path / "two", recipe)
    build_showo.build(tmp_path / "part", tmp_path / "two", longer)
    whole, part = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "part")
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert {path.name for path in (tmp_path / "two").glob("*.pt")} == {"magvit-1.pt", "showo-1.pt", "showo-2.pt"}


def test_training_lowers_the_loss_of_what_it_was_shown(tmp_path):
    model, _ = build_mmada.make_model(small(build_mmada), tmp_path, magvit.make_magvit(0))
    stage = Stage(1, 0.0, 8, wrong=0.0, planned=0.0, thing_weight=1.0, by_cell=0.5)
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = masked.drawing_loss(model, 0, stage, step=5, no_text=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(6.2, abs=0.3)  # log of 512 codes
    assert losses[-1] < losses[0] - 1


def test_whole_cells_are_hidden_in_a_share_of_the_pictures():
    unit_N = masked.units()
    for cell in range(9):
        row, column = divmod(cell, 3)
        thing = world.Thing(row, column, "circle", "red", "small")
        assert torch.equal(unit_N == cell, magvit.codes_of([(thing,)])[0] != 0)
    assert sorted(unit_N.unique().tolist()) == list(range(9 + 28))
    uniform = torch.rand(200, 65, generator=torch.Generator().manual_seed(1))
    hidden = masked.hidden_codes(uniform, 120)
    cells = torch.stack([hidden[:, unit_N == cell].float().mean(1) for cell in range(9)], 1)
    is_whole = ((cells == 0) | (cells == 1)).all(1)
    assert is_whole[:120].all() and is_whole[120:].float().mean() < 0.2
    assert hidden.any(1).all() and torch.equal(hidden[120:], masked.random_masks(uniform, 64)[120:])
    assert 0.55 < hidden[:120].float().mean() < 0.72  # 2 / pi


def test_a_tenth_of_the_texts_is_the_guided_branchs(tmp_path):
    model, _ = build_mmada.make_model(small(build_mmada), tmp_path, magvit.make_magvit(0))
    prompts = model.encode_prompts(["a photo of a red circle", "a photo of a cross"])
    mixed = masked.without_text(prompts, torch.tensor([False, True]))
    assert torch.equal(mixed.ids[0], prompts.ids[0]) and torch.equal(mixed.ids[1], prompts.uncond_ids[1])
    assert torch.equal(mixed.mask[1], prompts.uncond_mask[1])


def test_a_magvit_of_the_world_is_written_in_the_official_layout(tmp_path):
    vq = magvit.make_magvit(4)
    magvit.save_magvit(vq, tmp_path)
    read = read_magvit(tmp_path)
    assert (read.bits, read.scale, read.codes) == (9, 4, 512)
    assert torch.allclose(read.decoder.conv_out.weight, vq.decoder.conv_out.weight, atol=1e-3)


def test_a_checkpoint_may_say_how_it_is_sampled(tmp_path):
    default = mmada.Sampling()
    assert checkpoint_settings(tmp_path, default) == default
    write_settings(tmp_path, 1.5, 24)
    assert checkpoint_settings(tmp_path, default) == replace(default, guidance=1.5, steps=24)
    file = Path(tmp_path / "generation_config.json")
    file.write_text(json.dumps({"transformers_version": "4.46.0", "guidance_scale": None}))
    assert checkpoint_settings(tmp_path, default) == default
    for damaged in ("[1]", "{", json.dumps({"generation_timesteps": "many"})):
        file.write_text(damaged)
        with pytest.raises(MmalignError, match="does not say how to sample"):
            checkpoint_settings(tmp_path, default)
