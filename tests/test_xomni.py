"""X-Omni in small: ratios, batches, cuts, questions about pictures, pixels through FLUX, strict reading, training."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.tiny_xomni import SPECIALS, TEMPLATE, make_xomni

from mmalign import cli, hub
from mmalign.history import read_metrics
from mmalign.models import xomni as family
from mmalign.models._xomni import CutPolicy
from mmalign.models._xomni_text import Fitting
from mmalign.trajectory import Policy, Trajectory
from mmalign.types import Failure, MmalignError, Prompt, Request, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a red circle", "two small blue squares to the left of a large green triangle, and a yellow star above them", "x"]
QUESTIONS = ["what colour is the circle?", "how many", "describe the image in detail: what is above the star?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_xomni(tmp_path_factory.mktemp("models") / "xomni", seed=3)


@pytest.fixture(scope="module")
def model(folder):
    return family.load(folder)


def picture(seed, height=40, width=62):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def request(text, seed=0, images=None, size=None, **settings):
    return Request(Prompt(f"p{seed}", text, meta={} if images is None else {"images": images}), 0, seed, size, settings)


PICTURES = [picture(1), None, picture(2, 64, 40)]

# The policy


@pytest.mark.parametrize("policy", [Policy(1.0), Policy(3.0, 0.7), CutPolicy(2.0, min_p=0.1), CutPolicy(1.0, 1.3, min_p=0.05, top_k=6)])
def test_the_ratio_of_a_fresh_trajectory_is_one(model, policy):
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, policy, [1, 2, 3])
    scored = model.log_prob(prompts, drawn)
    assert (scored.exp() - drawn.log_prob.exp()).abs().max() < 1e-5
    assert ((scored - drawn.log_prob).abs() <= 1e-5 * drawn.log_prob.abs().clamp(min=1)).all()
    assert scored.requires_grad and not drawn.log_prob.requires_grad


def test_cuts_are_those_of_transformers_and_part_of_the_log_probability(model):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper

    logits = torch.randn(5, model.codes, generator=torch.Generator().manual_seed(0)) * 2
    expected = TemperatureLogitsWarper(0.8)(None, logits)
    for warper in (TopKLogitsWarper(6), MinPLogitsWarper(0.1)):
        expected = warper(None, expected)
    found = model.log_probs(logits, CutPolicy(1.0, 0.8, min_p=0.1, top_k=6))
    assert torch.allclose(found, expected.log_softmax(-1), atol=1e-6) and found.isinf().sum(-1).min() >= model.codes - 6
    worst = logits.argmin(-1)
    kept = model.log_probs(logits, CutPolicy(1.0, 0.8, min_p=0.1, top_k=6), worst)
    assert kept.gather(-1, worst[:, None]).isfinite().all()
    with pytest.raises(UsageError, match="min_p lies in"):
        CutPolicy(min_p=1.5)


def test_branches_differ_as_they_say(model):
    prompts = model.encode_prompts(TEXTS[:2])
    drawn = model.sample(prompts, Policy(3.0), [1, 2])
    weight = model.trunk.layers[1].mlp.up_proj.weight
    whole, detached, cond = (model.log_prob(prompts, drawn, which) for which in ("guided", "guided_detach_uncond", "cond"))
    assert torch.allclose(whole, detached, atol=1e-5) and not torch.allclose(whole, cond, atol=0.1)
    first, second = (torch.autograd.grad(value.mean(), weight)[0] for value in (whole, detached))
    assert first.abs().max() > 0 and second.abs().max() > 0 and not torch.allclose(first, second)
    unguided = model.sample(prompts, Policy(1.0), [1, 2])
    assert torch.allclose(model.log_prob(prompts, unguided, "cond"), unguided.log_prob, atol=1e-5)


def test_new_weights_and_hooks_count_at_once(model):
    prompts = model.encode_prompts(TEXTS[:2])
    before = model.sample(prompts, Policy(2.0), [1, 2])
    weight = model.trunk.layers[0].self_attn.v_proj.weight
    kept = weight.detach().clone()
    handle = model.net.mm_head.register_forward_hook(lambda module, inputs, output: output * 0.5)
    with torch.no_grad():
        weight.mul_(3.0)
        after = model.sample(prompts, Policy(2.0), [1, 2])
        ratio = (model.log_prob(prompts, after) - after.log_prob).abs().max()
        weight.copy_(kept)
    handle.remove()
    assert ratio < 1e-4 and not torch.equal(before.log_prob, after.log_prob)


# Batches


def test_samples_are_alone_what_they_are_in_company(model):
    together = model.sample(model.encode_prompts(TEXTS), Policy(2.0), [1, 2, 3])
    for row, text in enumerate(TEXTS):
        alone = model.sample(model.encode_prompts([text]), Policy(2.0), [row + 1])
        assert torch.equal(alone.actions[0], together.actions[row]) and torch.equal(alone.log_prob[0], together.log_prob[row])
        scored = model.log_prob(model.encode_prompts([text]), together.select([row]))
        assert torch.allclose(scored[0], together.log_prob[row], atol=1e-5)


def test_pictures_are_bitwise_equal_at_any_batch_size(model):
    requests = [request(TEXTS[number % 3], number, size=(32, 48)) for number in range(5)]
    whole = model.generate(requests)
    assert whole[0].image.shape == (32, 48, 3) and not np.array_equal(whole[0].image, whole[3].image)
    for size in (1, 3):
        parts = [sample for start in range(0, 5, size) for sample in model.generate(requests[start : start + size])]
        assert all(np.array_equal(one.image, other.image) for one, other in zip(parts, whole, strict=True)), size


def test_texts_are_alone_what_they_are_in_company(model):
    together = model.generate_text(QUESTIONS, PICTURES, [1, 2, 3], temperature=1.0, max_tokens=40)
    for row, question in enumerate(QUESTIONS):
        alone = model.generate_text([question], [PICTURES[row]], [row + 1], temperature=1.0, max_tokens=40)
        assert alone.ids[0][alone.mask[0]].tolist() == together.ids[row][together.mask[row]].tolist()
        assert torch.equal(alone.log_prob[0][alone.mask[0]], together.log_prob[row][together.mask[row]])


def test_padding_holds_nothing_that_a_result_could_see(model):
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, Policy(3.0), [1, 2, 3])
    other = type(prompts)(
        prompts.texts, torch.where(prompts.mask, prompts.ids, 11), prompts.mask, prompts.uncond_ids, prompts.uncond_mask, prompts.embeds
    )
    assert torch.equal(model.sample(other, Policy(3.0), [1, 2, 3]).actions, drawn.actions)
    assert torch.allclose(model.log_prob(other, drawn), model.log_prob(prompts, drawn), atol=1e-6)


# Text and pictures


def test_written_text_is_scored_as_it_was_drawn(model):
    written = model.generate_text(QUESTIONS, PICTURES, [1, 2, 3], temperature=0.8, max_tokens=20)
    scored = model.text_tokens_log_prob(QUESTIONS, PICTURES, written.ids, written.mask, temperature=0.8)
    assert torch.allclose(scored, written.log_prob, atol=2e-5) and written.mask.any(1).all() and scored.requires_grad
    assert int(written.ids.max()) < model.first


def test_an_answers_log_prob_is_that_of_each_of_its_tokens_in_turn(model):
    found, mask = model.text_log_prob([QUESTIONS[0]], [PICTURES[0]], ["red"])
    ids, (row,) = model.chat.answer("red"), model.questions([QUESTIONS[0]], [PICTURES[0]])[0]
    assert mask.all() and ids[-1] == model.chat.eos and found.shape == (1, len(ids))
    for index, id in enumerate(ids):
        prefix = torch.tensor([row + ids[:index]])
        logits = model.net.lm_head(model.trunk(prefix, torch.ones_like(prefix, dtype=torch.bool))[0, -1]).detach()
        assert float(logits.log_softmax(-1)[id]) == pytest.approx(float(found[0, index].detach()), abs=1e-5)


def test_rows_are_the_official_strings(model):
    tokenizer = model.chat.tokenizer
    assert tokenizer(TEXTS[0] + "<SOM>2 3<IMAGE>").input_ids == model.chat.drawing(TEXTS[0], (2, 3))
    assert tokenizer("<SOM>2 3<IMAGE>", add_special_tokens=False).input_ids == model.chat.blank((2, 3))
    codes = [[1, 2, 3], [4, 5, 31]]
    frame = "<SOM>2 3<IMAGE>" + "".join(f"<MM-Token-{code}>" for row in codes for code in row) + "<EOM>"
    message = [{"role": "user", "content": frame + "\n" + QUESTIONS[0]}]
    official = tokenizer.apply_chat_template(message, chat_template=TEMPLATE, add_generation_prompt=True, tokenize=False)
    assert tokenizer(official, add_special_tokens=False).input_ids == model.chat.question(QUESTIONS[0], codes)
    for token in (*SPECIALS, "<MM-Token-7>", "<|im_end|>"):
        assert model.chat.question("a" + token + "b", None) == model.chat.question("ab", None)


def test_pictures_may_be_given_as_their_codes(model):
    codes = model.sample(model.encode_prompts(TEXTS[:1]), Policy(), [1]).actions
    as_codes = model.text_log_prob([QUESTIONS[0]], codes, ["red"])[0]
    assert torch.equal(as_codes, model.text_log_prob([QUESTIONS[0]], [codes[0].view(4, 4)], ["red"])[0])
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        model.text_log_prob([QUESTIONS[0]], pixels, ["red"])[0],
        model.text_log_prob([QUESTIONS[0]], model.encode_image(pixels), ["red"])[0],
    )
    assert model.encode_image(pixels).unique().numel() > 3
    found = model.embed([QUESTIONS[0]], pixels)
    assert found.is_image.sum() == 16 and found.is_text.any() and not (found.is_text & found.is_image).any()
    assert model.image_features(pixels).shape == (1, 16, 48)


@pytest.mark.parametrize(
    ("size", "fitted"), [((100, 150), (384, 576)), ((900, 300), (1152, 384)), ((1000, 2000), (576, 1152)), ((400, 401), (400, 400))]
)
def test_pictures_are_fitted_as_the_original_does(size, fitted):
    assert Fitting().size(size) == fitted


def test_pictures_that_the_original_refuses_cost_their_request_alone(model):
    asked = [request("?", 1, [picture(0, 9, 40)], task="answer"), request("?", 2, [picture(0)], task="answer", max_tokens=3)]
    refused, answered = model.generate(asked)
    assert isinstance(refused, Failure) and "9 x 40" in refused.message and answered.answer is not None
    with pytest.raises(MmalignError, match="at most 3 : 1"):
        model.text_log_prob(["?"], [picture(0, 9, 40)], ["red"])


# Pixels


def test_pixels_are_those_of_diffusers_own_pipeline(model):
    """With no semantic features left, the decoder is FLUX with true guidance."""
    weight = model.decoder.layout.net.siglip_embed.weight
    kept, pipe = weight.detach().clone(), model.decoder.layout.pipe
    codes = model.sample(model.encode_prompts(TEXTS[:2]), Policy(), [1, 2]).actions
    with_features = model.decode(codes, None, TEXTS[:2], [5, 6])
    from mmalign.models.layers.noise import normals, streams
    from mmalign.types import request_seed

    noise = normals(streams([request_seed(seed, "decoder", 0) for seed in (5, 6)]), *model.decoder.layout.shape((64, 64)))
    pipe.set_progress_bar_config(disable=True)
    try:
        weight.data.zero_()
        own = model.decode(codes, None, TEXTS[:2], [5, 6])
        official = pipe(
            TEXTS[:2],
            negative_prompt=["", ""],
            true_cfg_scale=1.5,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=1.0,
            latents=pipe._pack_latents(noise, 2, *noise.shape[1:]),
            max_sequence_length=16,
            output_type="np",
        ).images
    finally:
        weight.data.copy_(kept)
    assert np.abs(own.permute(0, 2, 3, 1).numpy() - official).max() < 1e-5
    assert (own - with_features).abs().max() > 0.01 and with_features.shape == (2, 3, 64, 64)


def test_a_picture_depends_on_its_codes_its_prompt_and_its_seed(model):
    prompts = model.encode_prompts([TEXTS[0]])
    drawn = model.sample(prompts, Policy(), [1])
    base = model.render(prompts, drawn)
    assert torch.equal(base, model.decode(drawn.actions, None, [TEXTS[0]], [1]))
    others = [
        model.decode(drawn.actions, None, ["x"], [1]),
        model.decode(drawn.actions, None, [TEXTS[0]], [2]),
        model.decode((drawn.actions + 1) % 32, None, [TEXTS[0]], [1]),
    ]
    assert all((base - other).abs().max() > 1e-3 for other in others)
    with pytest.raises(UsageError, match="16; got 15"):
        model.decode(drawn.actions[:, :15])


def test_sizes_that_cannot_be_drawn_are_failures(model):
    (made,) = model.generate([request("a cat", size=(40, 40))])
    assert isinstance(made, Failure) and "multiples of 16" in made.message
    with pytest.raises(UsageError, match="multiples of 16"):
        model.encode_prompts(["a cat"], size=(40, 40))


def test_the_supervised_loss_is_the_cross_entropy_of_the_codes(model):
    prompts, pixels = model.encode_prompts(TEXTS[:2]), model.fit([picture(1, 64, 64), picture(2, 64, 64)])
    codes, loss = model.encode_image(pixels), model.supervised_loss(prompts, pixels)
    trajectory = Trajectory("ar", codes, torch.zeros(codes.shape), Policy(1.0), (0, 0))
    assert torch.allclose(loss, -model.log_prob(prompts, trajectory).mean(-1), atol=1e-5) and loss.requires_grad
    blank = model.supervised_loss(prompts, pixels, torch.tensor([True, False]))
    assert abs(blank[0] - loss[0]) > 1e-4 and torch.isclose(blank[1], loss[1], atol=1e-5)


# Reading, saving, training


def test_a_saved_model_draws_and_answers_the_same(model, tmp_path):
    model.save(tmp_path / "saved")
    assert hub.resolve_model(str(tmp_path / "saved")).family == "xomni"
    again = family.load(tmp_path / "saved")
    asked = [request(TEXTS[0], 1), request(QUESTIONS[0], 2, [picture(1)], task="answer", max_tokens=5)]
    (image, answer), (image_again, answer_again) = model.generate(asked), again.generate(asked)
    assert np.array_equal(image.image, image_again.image) and answer.answer == answer_again.answer


def test_what_is_missing_is_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.move(copy / "flux", tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="needs 'flux'.*--model-extra flux=FOLDER"):
        family.load(copy)
    assert family.load(copy, extra={"flux": tmp_path / "elsewhere"}).fingerprint
    with pytest.raises(UsageError, match="this family takes 'flux'"):
        family.load(copy, extra={"vae": tmp_path})
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if name != "mm_head.weight"}, copy / "model.safetensors")
    with pytest.raises(MmalignError, match="1 parameters are missing .mm_head.weight"):
        family.load(copy, extra={"flux": tmp_path / "elsewhere"})
    save_file(tensors, copy / "model.safetensors")
    (copy / "vision" / "projector.pt").unlink()
    with pytest.raises(MmalignError, match="projector.pt"):
        family.load(copy, extra={"flux": tmp_path / "elsewhere"})


def test_a_tokenizer_whose_image_tokens_lie_elsewhere_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "image_vocab_size": 31}))
    with pytest.raises(MmalignError, match="32 codes"):
        family.load(copy)


def test_half_precision_stays_near(folder):
    """Log-probabilities of a fresh trajectory in bfloat16, by the same model's training forward (measured: 0.17 at most)."""
    low = family.load(folder, dtype="bfloat16")
    prompts = low.encode_prompts(TEXTS)
    drawn = low.sample(prompts, Policy(2.0), [1, 2, 3])
    assert (low.log_prob(prompts, drawn).detach() - drawn.log_prob).abs().max() < 0.5


def test_lora_that_is_off_is_the_base_and_gradients_reach_adapters_alone(folder, tmp_path):
    from mmalign.loop import Loop, LoopConfig

    model = family.load(folder)
    prompts = model.encode_prompts(TEXTS[:2])
    drawn = model.sample(prompts, Policy(2.0), [1, 2])
    base = model.log_prob(prompts, drawn).detach()
    loop = Loop(LoopConfig(steps=1, lora_rank=4, learning_rate=1e-2, image_every=0), model, tmp_path / "run")
    assert torch.equal(model.log_prob(prompts, drawn), base)
    for _ in loop.steps():
        loop.backward(-model.log_prob(prompts, drawn).mean(), {}, [])
        assert {"lora_" in name for name, weight in model.net.named_parameters() if weight.grad is not None} == {True}
        loop.update()
    assert not torch.equal(model.log_prob(prompts, drawn), base)
    again = model.sample(prompts, Policy(2.0), [1, 2])
    assert (model.log_prob(prompts, again) - again.log_prob).abs().max() < 1e-4  # the sampler sees the adapters
    with loop.reference():
        assert torch.allclose(model.log_prob(prompts, drawn), base, atol=1e-6)


def test_gvu_trains_it_from_the_command_line(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue squares\n")
    words = ["train", "gvu", "--model", f"xomni:{folder}", "--prompts", str(prompts), "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    options = "--steps 2 --prompts-per-step 2 --samples 12 --guidance 1 --log-prob guided --learning-rate 1e-2 --image-every 1"
    assert cli.main([*words, *options.split()]) == 0
    lines = [line for line in read_metrics(tmp_path / "run") if line["step"]]
    assert len(lines) == 2 and all(line["ratio_deviation"] < 1e-5 and 0 < line["reward"] < 1 for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines)  # a group whose pictures are all read as the same codes teaches nothing
    assert family.load(tmp_path / "run" / "model").generate([request(TEXTS[0])])[0].image.shape == (64, 64, 3)
