"""BAGEL in small: ratios, batches, guidance in its interval, questions about pictures, completions, strict reading, training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_bagel import make_bagel

from mmalign import cli, hub
from mmalign.history import read_metrics
from mmalign.models import bagel as family
from mmalign.models._bagel import Guidance, GuidedPolicy
from mmalign.models._bagel_text import Fitting
from mmalign.trajectory import Policy
from mmalign.types import Failure, MmalignError, Prompt, Request, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a red circle", "two small blue squares above a star", "x"]
QUESTIONS = ["what colour is the circle?", "how many", "describe the image in detail: what is above the star?"]
SIZE = (32, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bagel"
    folder.mkdir()
    return make_bagel(folder, seed=3)


@pytest.fixture(scope="module")
def model(folder):
    model = family.load(folder)
    model.tokens = 32
    return model


def picture(seed, height=40, width=62):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def request(text, seed=0, images=None, size=SIZE, **settings):
    known = {"steps": 3, "tokens": 32, **settings}
    return Request(Prompt(f"p{seed}", text, meta={} if images is None else {"images": images}), 0, seed, size, known)


PICTURES = [picture(1), None, picture(2, 64, 40)]


def drawn(model, texts=TEXTS, **policy):
    prompts = model.encode_prompts(texts)
    made = Policy(**{"guidance": 3.0, "levels": (0.7,) * 4, **policy})
    return prompts, model.sample(prompts, made, list(range(1, len(texts) + 1)), SIZE)


# The policy


@pytest.mark.parametrize("noise", ["flow", "constant", "coefficient"])
def test_the_ratio_of_a_fresh_trajectory_is_one(model, noise):
    prompts, trajectory = drawn(model, noise=noise)
    scored = model.log_prob(prompts, trajectory)
    assert (scored - trajectory.log_prob).abs().max() <= 1e-5 * trajectory.log_prob.abs().max().clamp(min=1)
    assert scored.requires_grad and trajectory.states.dtype == torch.float32 and (trajectory.log_prob != 0).any()


def test_guidance_acts_in_its_interval_and_keeps_the_length(model):
    prompts = model.encode_prompts(TEXTS[:1])
    x = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        time = torch.tensor([0.9])
        plain = model._predict(x, time, prompts, 1.0, "guided")
        guided = model._predict(x, time, prompts, 4.0, "guided")
        assert not torch.allclose(plain, guided, atol=1e-3) and guided.norm() <= plain.norm() * (1 + 1e-5)
        early = torch.tensor([0.4])  # the interval is open at its start
        assert torch.equal(model._predict(x, early, prompts, 4.0, "guided"), model._predict(x, early, prompts, 1.0, "cond"))
        both = model._predict(torch.cat([x, x]), torch.cat([time, early]), prompts.select([0, 0]), 4.0, "guided")
        assert torch.allclose(both[0], guided[0], atol=1e-5)
        assert torch.allclose(both[1], model._predict(x, early, prompts, 1.0, "cond")[0], atol=1e-5)
        with model._ruled(GuidedPolicy(rule=Guidance(renorm_min=1.0))):
            free = model._predict(x, time, prompts, 4.0, "guided")
        branches = [{name: value for name, value in prompts.embeds.items() if name.startswith("uncond_") == flag} for flag in (False, True)]
        cond = model.layout.predict(x, time, branches[0], 1.0)
        uncond = model.layout.predict(x, time, {name[7:]: value for name, value in branches[1].items()}, 1.0)
    assert torch.allclose(free, uncond + 4.0 * (cond - uncond), atol=1e-5)
    assert torch.allclose(guided, free * (cond.norm() / free.norm()).clamp(max=1), atol=1e-5)


def test_a_policy_brings_its_rule_to_the_sampler_and_to_the_log_prob(model):
    prompts = model.encode_prompts(TEXTS)
    trajectories = [
        model.sample(prompts, GuidedPolicy(3.0, levels=(0.7,) * 6, rule=rule), [1, 2, 3], SIZE) for rule in (Guidance(), Guidance(0.0))
    ]
    assert not torch.allclose(trajectories[0].actions[:, -1], trajectories[1].actions[:, -1], atol=1e-4)
    for trajectory in trajectories:
        scored = model.log_prob(prompts, trajectory)
        assert (scored - trajectory.log_prob).abs().max() <= 1e-5 * trajectory.log_prob.abs().max().clamp(min=1)


def test_detaching_the_unconditional_branch_changes_the_gradient_alone(model):
    prompts, trajectory = drawn(model)
    whole, detached = (model.log_prob(prompts, trajectory, which) for which in ("guided", "guided_detach_uncond"))
    assert torch.allclose(whole, detached, atol=1e-4)
    weight = model.trunk.layers[0].self_attn.q_proj_moe_gen.weight
    first, second = (torch.autograd.grad(value[:, 0].mean(), weight)[0] for value in (whole, detached))
    assert (first - second).abs().max() > 0.01 * first.abs().max() > 0
    assert (model.log_prob(prompts, trajectory, "cond") - trajectory.log_prob).abs().max() > 0.001


def test_completions_of_every_state(model):
    prompts, trajectory = drawn(model)
    whole = model.complete(prompts, trajectory)
    assert whole.shape[:2] == (3, 5) and torch.equal(whole[:, -1], trajectory.actions[:, -1])
    _, still = drawn(model, levels=(0.0,) * 4)
    ends = model.complete(prompts, still)
    assert torch.allclose(ends, ends[:, -1:].expand_as(ends), atol=1e-4)


# Batches


def test_pictures_are_bitwise_equal_at_any_batch_size(model):
    requests = [request(TEXTS[number % 3], number) for number in range(5)]
    whole = model.generate(requests)
    assert whole[0].image.shape == (32, 48, 3) and not np.array_equal(whole[0].image, whole[3].image)
    for size in (1, 3):
        parts = [sample for start in range(0, 5, size) for sample in model.generate(requests[start : start + size])]
        assert all(np.array_equal(one.image, other.image) for one, other in zip(parts, whole, strict=True)), size


def test_a_prompts_padding_and_companions_change_nothing(model):
    prompts, trajectory = drawn(model)
    for row, text in enumerate(TEXTS):
        for tokens in (32, 40):
            alone = model.log_prob(model.encode_prompts([text], tokens=tokens), trajectory.select([row]))
            assert torch.allclose(alone[0], trajectory.log_prob[row], atol=1e-4), tokens


def test_texts_are_alone_what_they_are_in_company(model):
    together = model.generate_text(QUESTIONS, PICTURES, [1, 2, 3], temperature=1.0, max_tokens=40)
    for row, question in enumerate(QUESTIONS):
        alone = model.generate_text([question], [PICTURES[row]], [row + 1], temperature=1.0, max_tokens=40)
        assert alone.ids[0][alone.mask[0]].tolist() == together.ids[row][together.mask[row]].tolist()
        assert torch.equal(alone.log_prob[0][alone.mask[0]], together.log_prob[row][together.mask[row]])


# Text and pictures


def test_written_text_is_scored_as_it_was_drawn(model):
    written = model.generate_text(QUESTIONS, PICTURES, [1, 2, 3], temperature=0.8, max_tokens=20)
    scored = model.text_tokens_log_prob(QUESTIONS, PICTURES, written.ids, written.mask, temperature=0.8)
    assert torch.allclose(scored, written.log_prob, atol=2e-5) and written.mask.any(1).all() and scored.requires_grad


def test_a_picture_is_one_block_that_takes_one_position(model):
    """Patches see one another both ways: what the first patch becomes depends on the last."""
    pixels = torch.rand(1, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    changed = pixels.clone()
    changed[..., -1] = 0
    rows, pictures = model.questions(["how many"], pixels)
    assert rows[0][0] == model.chat.start and rows[0].count(model.chat.patch) == 6 and rows[0][-1] == model.chat.bos
    first, second = (model.embed(["how many"], images) for images in (pixels, changed))
    assert first.is_image.sum() == 6 and first.is_text.any() and not (first.is_text & first.is_image).any()
    at = first.is_image[0].nonzero()[0, 0]
    assert (first.hidden[0, at] - second.hidden[0, at]).abs().max() > 1e-4
    assert model.chat.question("a<|vision_start|>b<|im_end|>", 0) == model.chat.question("ab", 0)


def test_gradients_reach_the_pixels(model):
    pixels = torch.rand(1, 3, 28, 42, requires_grad=True)
    model.text_log_prob([QUESTIONS[0]], pixels, ["red"])[0].sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0
    with pytest.raises(MmalignError, match="multiples of 14 pixels, at most 56"):
        model.image_features(torch.rand(1, 3, 28, 70))


@pytest.mark.parametrize(
    ("size", "fitted"), [((100, 150), (224, 336)), ((500, 2000), (252, 980)), ((700, 700), (700, 700)), ((10, 400), (28, 980))]
)
def test_pictures_are_fitted_as_the_original_does(size, fitted):
    assert Fitting().size(size) == fitted


def test_latents_of_pictures_survive_the_autoencoders_shapes_and_the_loss_sees_them(model):
    prompts, pixels = model.encode_prompts(TEXTS), torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert model.decode(model.encode_image(pixels)).shape == pixels.shape
    loss = model.supervised_loss(prompts, pixels, [1, 2, 3])
    assert loss.shape == (3,) and loss.requires_grad
    assert torch.allclose(loss[1:2], model.supervised_loss(prompts.select([1]), pixels[1:2], [2]), atol=1e-5)
    blank = model.supervised_loss(prompts, pixels, [1, 2, 3], torch.tensor([True, False, False]))
    assert blank[0] != loss[0] and torch.allclose(blank[1:], loss[1:], atol=1e-5)


# Requests, reading, saving, training


def test_images_answers_and_choices_in_one_call(model):
    asked = request(QUESTIONS[0], 2, [picture(1)], task="answer", max_tokens=5)
    options = Prompt("c", QUESTIONS[0], meta={"images": [picture(1)], "options": {"A": "red", "B": "blue"}})
    choice = Request(options, 0, 1, settings={"task": "choose"})
    image, answer, chosen, large = model.generate([request(TEXTS[0], 1), asked, choice, request("a cat", 4, size=(80, 80))])
    assert image.image.dtype == np.uint8 and answer.answer is not None and chosen.answer in ("A", "B")
    assert isinstance(large, Failure) and "at most 64 pixels" in large.message
    (cut,) = model.generate([request("a photo of a red circle and two small blue squares " * 4, 5)])
    assert cut.extra == {"is_cut": True} and "is_cut" not in image.extra


def test_a_saved_model_draws_and_answers_the_same(model, tmp_path):
    model.save(tmp_path / "saved")
    spec = hub.resolve_model(str(tmp_path / "saved"))
    assert spec.family == "bagel"
    again = family.load(tmp_path / "saved")
    asked = [request(TEXTS[0], 1), request(QUESTIONS[0], 2, [picture(1)], task="answer", max_tokens=5)]
    (image, answer), (image_again, answer_again) = model.generate(asked), again.generate(asked)
    assert np.array_equal(image.image, image_again.image) and answer.answer == answer_again.answer


def test_what_is_missing_is_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "ema.safetensors")
    save_file({name: value for name, value in tensors.items() if name != "llm2vae.bias"}, copy / "ema.safetensors")
    with pytest.raises(MmalignError, match="1 parameters are missing .llm2vae.bias"):
        family.load(copy)
    save_file({**tensors, "alien": torch.zeros(1)}, copy / "ema.safetensors")
    with pytest.raises(MmalignError, match="1 are unexpected .alien"):
        family.load(copy)
    save_file(tensors, copy / "ema.safetensors")
    config = json.loads((copy / "llm_config.json").read_text())
    (copy / "llm_config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "rms_norm_eps"}))
    with pytest.raises(MmalignError, match="rms_norm_eps"):
        family.load(copy)
    (copy / "ae.safetensors").unlink()
    (copy / "llm_config.json").write_text(json.dumps(config))
    with pytest.raises(MmalignError, match="no ae.safetensors"):
        family.load(copy)
    with pytest.raises(UsageError, match="no extra part"):
        family.load(folder, extra={"vae": tmp_path})


def test_half_precision_stays_near(folder):
    """Velocities in bfloat16 against float32: a bound for small random members."""
    low, high = family.load(folder, dtype="bfloat16"), family.load(folder)
    x, time = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
    with torch.no_grad():
        one, other = (model._predict(x, time, model.encode_prompts(TEXTS[:1], tokens=32), 1.0, "cond") for model in (low, high))
    assert one.dtype == torch.float32 and (one - other).abs().max() < 0.3 * other.abs().max()


def test_lora_that_is_off_is_the_base_and_gradients_reach_adapters_alone(folder, tmp_path):
    from mmalign.loop import Loop, LoopConfig

    model = family.load(folder)
    model.tokens = 32
    prompts, trajectory = drawn(model, TEXTS[:2])
    base = model.log_prob(prompts, trajectory).detach()
    config = LoopConfig(steps=1, lora_rank=4, learning_rate=1e-2, parts=("attention",), image_every=0, gradient_checkpointing=True)
    loop = Loop(config, model, tmp_path / "run")
    assert torch.allclose(model.log_prob(prompts, trajectory), base, atol=1e-6)
    for _ in loop.steps():
        loop.backward(-model.log_prob(prompts, trajectory)[:, :-1].mean(), {}, [])
        found = {name for name, weight in model.net.named_parameters() if weight.grad is not None}
        assert found and all("lora_" in name and "_moe_gen" in name for name in found)
        loop.update()
    assert not torch.allclose(model.log_prob(prompts, trajectory), base, atol=1e-4)
    with loop.reference():
        assert torch.allclose(model.log_prob(prompts, trajectory), base, atol=1e-6)
    loop.export(tmp_path / "model")
    moved = family.load(tmp_path / "model").net.state_dict()
    before = family.load(folder).net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], moved[name])}
    assert changed and all("_proj_moe_gen" in name for name in changed)


def test_flow_grpo_trains_it_from_the_command_line(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo red squares\n")
    words = ["train", "flow_grpo", "--model", str(folder), "--prompts", str(prompts), "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    reward = ["--plug", str(Path(__file__).parent / "helpers" / "redness.py"), "--reward", "redness=1", "--image-every", "0"]
    options = ["--steps", "1", "--prompts-per-step", "1", "--samples", "4", "--denoising-steps", "4", "--lora-rank", "2"]
    assert cli.main([*words, *reward, *options]) == 0
    (line,) = [line for line in read_metrics(tmp_path / "run") if line["step"]]
    assert line["ratio_deviation"] < 1e-4 and line["grad_norm"] > 0
    assert family.load(tmp_path / "run" / "model").fingerprint != family.load(folder).fingerprint
