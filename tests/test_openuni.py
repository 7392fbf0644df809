"""The loaded OpenUni: drawing by the official solver and with a record, learning with hints, reading, writing, its four folders."""

import shutil

import numpy as np
import pytest
import torch
from helpers.masked_contract import QUESTIONS, TEXTS, picture, request
from helpers.tiny_openuni import SIDE, make_openuni

from mmalign import hub
from mmalign.models import openuni as family
from mmalign.models._openuni import SYSTEM
from mmalign.trajectory import Policy, Supervision
from mmalign.types import Failure, MmalignError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
PICTURES = [picture(1), None, picture(2, 40, 16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_openuni(tmp_path_factory.mktemp("openuni"), seed=3)


@pytest.fixture(scope="module")
def model(folder):
    return family.load(folder, extra={})


@pytest.fixture(scope="module", autouse=True)
def narrow_heads():
    """The tiny connector is one head of 32."""
    from mmalign.models import _openuni_layout

    before, _openuni_layout.HEAD_WIDTH = _openuni_layout.HEAD_WIDTH, 32
    yield
    _openuni_layout.HEAD_WIDTH = before


def policy(level=0.7, steps=4, guidance=3.0):
    return Policy(guidance, levels=(level,) * steps)


def test_a_fresh_trajectory_has_ratio_one_and_gradients_reach_the_queries(model):
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, policy(), [1, 2, 3, 4])
    scored = model.log_prob(prompts, drawn)
    assert drawn.kind == "flow" and (scored - drawn.log_prob).abs().max() < 1e-5
    scored[:, :-1].mean().backward()
    for part in model.trainable.values():
        assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in part.parameters())
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.net.lmm.parameters())
    model.net.zero_grad()
    assert (model.log_prob(prompts, drawn, "cond") - drawn.log_prob).abs().max() > 1e-3


def test_old_log_probs_follow_the_queries_of_now(model):
    prompts = model.encode_prompts(TEXTS[:1])
    drawn = model.sample(prompts, policy(), [1])
    with torch.no_grad():
        kept = model.net.queries.weight.clone()
        model.net.queries.weight.add_(1.0)
        moved = model.log_prob(prompts, drawn)
        model.net.queries.weight.copy_(kept)
    assert (moved - drawn.log_prob).abs().max() > 1e-4


def test_pictures_are_bitwise_equal_at_any_batch_size_and_their_seeds_own(model):
    asked = [request(TEXTS[number % 4], number, steps=2) for number in range(5)]
    whole = model.generate(asked)
    parts = [sample for start in range(0, 5, 2) for sample in model.generate(asked[start : start + 2])]
    assert all(np.array_equal(one.image, other.image) for one, other in zip(parts, whole, strict=True))
    assert whole[0].image.shape == (SIDE, SIDE, 3) and not np.array_equal(whole[0].image, whole[4].image)


def test_sizes_answers_and_refusals_in_one_call(model):
    wide, odd, answer = model.generate(
        [
            request("a star", 1, size=(SIDE, 2 * SIDE), steps=2),
            request("a star", 2, size=(SIDE + 1, SIDE)),
            request("what colour?", 3, images=[picture(1)], task="answer", max_tokens=3),
        ]
    )
    assert wide.image.shape == (SIDE, 2 * SIDE, 3) and answer.answer is not None
    assert isinstance(odd, Failure) and "multiples of 2" in odd.message


def test_the_loss_is_each_samples_own_and_hints_count(model):
    prompts, seeds = model.encode_prompts(TEXTS[:3]), [1, 2, 3]
    pixels = model.fit([picture(seed) for seed in seeds])
    found = model.token_losses(prompts, pixels, seeds)
    assert found.loss.shape == (3, 64) and found.scored.all() and model.grid == (8, 8)
    loss = model.supervised_loss(prompts, pixels, seeds)
    assert torch.equal(loss, found.mean) and model.hidden_number(seeds) is None
    alone = model.supervised_loss(prompts.select([1]), pixels[1:2], [2])
    assert torch.allclose(alone[0], loss[1], rtol=1e-5)
    blank = model.supervised_loss(prompts, pixels, seeds, torch.tensor([True, False, False]))
    assert torch.allclose(blank[1:], loss[1:], rtol=1e-5) and blank[0] != loss[0]
    hints = model.image_features(pixels)
    given = Supervision(hints=hints[:, :2], hinted=torch.tensor([True, False, True]))
    hinted = model.supervised_loss(prompts, pixels, seeds, given=given)
    assert torch.allclose(hinted[1], loss[1], rtol=1e-5) and (hinted[[0, 2]] - loss[[0, 2]]).abs().min() > 1e-6
    with pytest.raises(UsageError, match="hides no tokens"):
        model.token_losses(prompts, pixels, seeds, given=Supervision(hidden=torch.ones(3, 64, dtype=torch.bool)))


def test_text_log_probs_are_those_of_the_writer(model):
    written = model.generate_text(QUESTIONS, PICTURES, [1, 2, 3], temperature=1.0, max_tokens=6)
    scored = model.text_tokens_log_prob(QUESTIONS, PICTURES, written.ids, written.mask)
    assert (scored - written.log_prob).abs().max() < 1e-4 and written.mask.any()
    log_prob, mask = model.text_log_prob(["how many"] * 2, [picture(1), picture(2)], ["two", "two"])
    assert mask.all() and not torch.allclose(log_prob[0], log_prob[1], atol=1e-3)


def test_prompts_and_questions_are_the_official_turns(model):
    decode = model.chat.tokenizer.decode
    assert decode(model.chat.drawing("a star")) == "<|im_start|>user\nGenerate an image: a star<|im_end|>\n<|im_start|>assistant\n<img>"
    row = model.chat.question("how <img>many", True)
    asked = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<img>{'<IMG_CONTEXT>' * model.chat.slots}</img>\nhow many<|im_end|>\n"
    )
    assert decode(row) == asked + "<|im_start|>assistant\n" and model.chat.slots == 4
    found = model.embed(QUESTIONS[:2], [picture(1), None])
    assert found.is_image.sum(1).tolist() == [4, 0] and (found.is_text.sum(1) > 3).all()


# The checkpoint


def test_a_saved_model_is_whole_and_draws_the_same(model, tmp_path):
    model.save(tmp_path / "saved")
    spec = hub.resolve_model(str(tmp_path / "saved"))
    assert spec.family == "openuni"
    one, other = (made.generate([request("a star", 1, steps=2)])[0].image for made in (model, family.load(spec.path)))
    assert np.array_equal(one, other)


def test_what_is_missing_is_named(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for name in ("internvl3", "sana", "dc-ae"):
        (bare / name).rename(tmp_path / name)
    given = {}
    for name in ("internvl3", "sana", "dc-ae"):
        with pytest.raises(UsageError, match=rf"'{name}'.*--model-extra {name}=FOLDER"):
            family.load(bare, extra=given)
        given[name] = tmp_path / name
    family.load(bare, extra=given)
    (bare / "openuni_b_tiny.pth").rename(bare / "openuni_b_tiny.bak")
    with pytest.raises(UsageError, match="has none; one is expected"):
        family.load(bare, extra=given)
    tensors = torch.load(bare / "openuni_b_tiny.bak", weights_only=True)
    dropped = {name: value for name, value in tensors.items() if name != "transformer.proj_out.bias"}
    torch.save({**dropped, "projector_in.weight": tensors["projector.weight"]}, bare / "other.pth")
    with pytest.raises(MmalignError, match=r"unexpected \(projector_in.weight\)"):
        family.load(bare, extra=given)
    torch.save({name: value for name, value in tensors.items() if name != "meta_queries"}, bare / "other.pth")
    with pytest.raises(MmalignError, match="lacks queries"):
        family.load(bare, extra=given)


def test_an_overlay_without_sana_takes_that_of_the_repository(folder, model, tmp_path):
    other = make_openuni(tmp_path / "other", seed=3, overlay_has_transformer=False)
    assert not torch.equal(family.load(other).net.transformer.proj_out.weight, model.net.transformer.proj_out.weight)


def test_half_precision_stays_near(folder):
    """Velocities in bfloat16 against float32: a bound for small random members."""
    low, high = family.load(folder, dtype="bfloat16"), family.load(folder)
    x, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
    with torch.no_grad():
        one, other = (made._predict(x, time, made.encode_prompts(TEXTS[:1]), 1.0, "cond") for made in (low, high))
    assert one.dtype == torch.float32 and (one - other).abs().max() < 0.3 * other.abs().max()


def test_lora_that_is_off_is_the_base_and_gradients_reach_adapters_alone(folder, tmp_path):
    from mmalign.loop import Loop, LoopConfig

    made = family.load(folder)
    prompts = made.encode_prompts(TEXTS[:2])
    trajectory = made.sample(prompts, policy(), [1, 2])
    base = made.log_prob(prompts, trajectory).detach()
    config = LoopConfig(steps=1, lora_rank=4, learning_rate=1e-2, parts=tuple(made.trainable), image_every=0)
    loop = Loop(config, made, tmp_path / "run")
    assert torch.allclose(made.log_prob(prompts, trajectory), base, atol=1e-6)
    for _ in loop.steps():
        loop.backward(-made.log_prob(prompts, trajectory)[:, :-1].mean(), {}, [])
        found = {name for name, weight in made.net.named_parameters() if weight.grad is not None}
        assert found and all("lora_" in name for name in found)
        loop.update()
    assert not torch.allclose(made.log_prob(prompts, trajectory), base, atol=1e-4)
    with loop.reference():
        assert torch.allclose(made.log_prob(prompts, trajectory), base, atol=1e-6)
