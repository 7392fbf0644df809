"""The loaded Harmon: drawing with a record, its ratios and batches, learning with and without hints, reading, writing, both layouts."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import masked_contract as contract
from helpers.masked_contract import QUESTIONS, TEXTS, picture, request
from helpers.tiny_harmon import INNER, SIDE, STRIDE, make_harmon, make_original_harmon

from mmalign import hub
from mmalign.models import _harmon_layout
from mmalign.models import harmon as family
from mmalign.models._harmon_draw import cosine, hidden_after
from mmalign.models.layers import token_diffusion
from mmalign.models.layers.hints import behind_hints, causal
from mmalign.models.layers.token_diffusion import Schedule
from mmalign.trajectory import Policy, Supervision
from mmalign.types import Failure, MmalignError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_harmon(tmp_path_factory.mktemp("harmon"), seed=3)


@pytest.fixture(scope="module")
def model(folder):
    loaded = family.load(folder)
    loaded.steps = 4
    return loaded


# At the noisiest time the prediction's last bit is 2e4 times as large in the token. Over the 100 steps of a released checkpoint that
# is nothing; where a few steps must do, the first one is taken without noise and so is no decision.
LEVELS = (0.0, *[1.0] * (INNER - 1))


def drawn(model, texts=TEXTS, **policy):
    prompts = model.encode_prompts(list(texts))
    return prompts, model.sample(prompts, Policy(**{"guidance": 3.0, "levels": LEVELS, **policy}), list(range(1, len(texts) + 1)))


# Drawing


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"guidance": 1.0, "temperature": 1.3},
        {"guidance": 2.5, "temperature": 0.7, "levels": (0.0, 0.5, 1.0) * 5},
        {"levels": (1.0,) * 100, "hidden": cosine(2)},
    ],
)
def test_a_fresh_trajectory_has_ratio_one(model, policy):
    prompts, trajectory = drawn(model, **policy)
    scored = model.log_prob(prompts, trajectory)
    assert ((scored - trajectory.log_prob).exp() - 1).abs().max() < 1e-5
    assert scored.requires_grad and not trajectory.log_prob.requires_grad and trajectory.kind == "mar"
    assert trajectory.times.shape[2] == len(trajectory.policy.levels) + 1
    assert torch.equal(trajectory.times[:, :, -1], trajectory.actions)


def test_the_log_probability_is_the_gaussian_of_each_inner_step(model):
    """Against torch's own distribution, in a state rebuilt by hand: the tokens of the first step, which see nothing."""
    prompts, trajectory = drawn(model, TEXTS[:1], guidance=1.0, temperature=0.8)
    grid, hidden = model.grid, torch.ones(1, 16, dtype=torch.bool)
    with torch.no_grad():
        z = model._conditions(prompts.ids, prompts.mask, torch.zeros(1, 16, 4), hidden, grid)[0]
        total, schedule = torch.zeros(16), Schedule(INNER)
        for index in range(1, INNER - 1):
            at = torch.full((16,), INNER - 1 - index)
            x = trajectory.times[0, :, index]
            eps, v = model.mar.diffloss["net"](x, schedule.time_of(at), z).chunk(2, -1)
            made = schedule.step(eps, v, x, at)
            normal = torch.distributions.Normal(made.mean, 0.8 * (made.log_variance / 2).exp())
            total += normal.log_prob(trajectory.times[0, :, index + 1]).mean(-1) / (INNER - 2)
    first = trajectory.step_of[0] == 0
    assert first.any() and torch.allclose(total[first], trajectory.log_prob[0, first], atol=1e-4)


def test_steps_and_inner_steps_are_parts_of_the_whole(model):
    prompts, trajectory = drawn(model)
    whole = model.log_prob(prompts, trajectory).detach()
    some = model.log_prob(prompts, trajectory, steps=[1, 2]).detach()
    is_some = (trajectory.step_of == 1) | (trajectory.step_of == 2)
    assert torch.allclose(some, whole * is_some, atol=1e-5) and (~is_some).any()
    parts = [model.log_prob(prompts, trajectory, inner=[index]).detach() for index in range(1, INNER - 1)]
    assert torch.allclose(torch.stack(parts).mean(0), whole, atol=1e-4)
    for index in (0, INNER - 1):
        with pytest.raises(UsageError, match="Only the inner steps"):
            model.log_prob(prompts, trajectory, inner=[index])


def test_branches_differ_as_they_say(model):
    prompts, trajectory = drawn(model, TEXTS[:2])
    whole, detached, cond = (model.log_prob(prompts, trajectory, which) for which in ("guided", "guided_detach_uncond", "cond"))
    assert torch.allclose(whole, detached, atol=1e-5) and (whole - cond).abs().max() > 3e-4
    weight = model.trunk.layers[0].self_attn.v_proj.weight
    first, second = (torch.autograd.grad(value.mean(), weight)[0] for value in (whole, detached))
    assert first.abs().max() > 0 and second.abs().max() > 0 and not torch.allclose(first, second)
    with pytest.raises(UsageError, match="no log-probability"):
        model.log_prob(prompts, trajectory, "uncond")


@pytest.mark.parametrize(
    "promise", [contract.a_sample_is_its_seed, contract.images_are_bitwise_equal_at_any_batch_size], ids=lambda promise: promise.__name__
)
def test_promise(model, promise):
    promise(model)


def test_samples_are_alone_what_they_are_in_company(model):
    _, together = drawn(model)
    for row, text in enumerate(TEXTS):
        prompts = model.encode_prompts([text])
        alone = model.sample(prompts, Policy(3.0, levels=LEVELS), [row + 1])
        for name in ("actions", "step_of", "log_prob", "times"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), name
        assert torch.allclose(model.log_prob(prompts, together.select([row]))[0], together.log_prob[row], atol=1e-5)


def test_every_step_decides_as_many_tokens_as_the_cosine_says_in_an_order_of_the_samples_own(model):
    assert hidden_after(256, cosine(64))[:3] == [255, 254, 253] and hidden_after(256, cosine(64))[-2:] == [6, 0]
    assert hidden_after(3, cosine(5)) == [2, 1, 1, 1, 0] and hidden_after(1024, cosine(60))[39] == 512
    _, trajectory = drawn(model)
    counts = torch.stack([(trajectory.step_of > step).sum(1) for step in range(4)], 1)
    assert counts.tolist() == [hidden_after(16, cosine(4))] * len(TEXTS)
    assert not torch.equal(trajectory.step_of[0], trajectory.step_of[1])


def test_other_sizes_and_refusals(model):
    asked = [
        request("a star", 1, size=(STRIDE, 2 * SIDE), steps=2),
        request("a star", 2, size=(SIDE + 1, SIDE)),
        request("a star", 3, steps=2),
    ]
    wide, odd, own = model.generate(asked)
    assert wide.image.shape == (STRIDE, 2 * SIDE, 3) and own.image.shape == (SIDE, SIDE, 3)
    assert isinstance(odd, Failure) and f"multiples of {STRIDE}" in odd.message
    with pytest.raises(UsageError, match="own seed"):
        model.sample(model.encode_prompts(["x"]), Policy(), [1, 2])


def test_pictures_are_rounded(model):
    tokens = model.sample(model.encode_prompts(["a star"]), model.policy(family.Sampling(steps=2)), [7]).actions
    exact = model.decode(tokens)[0].permute(1, 2, 0) * 255
    made = model.generate([request("a star", 7, steps=2)])[0].image
    assert np.abs(made - exact.numpy()).max() <= 0.5 + 1e-3


def test_inner_steps_are_a_setting(model):
    first, second = (model.generate([request("a star", 7, steps=2, inner_steps=inner)])[0].image for inner in (0, 3))
    assert not np.array_equal(first, second)


# Learning


def test_the_loss_is_of_hidden_tokens_and_each_samples_own(model):
    prompts, seeds = model.encode_prompts(TEXTS), [1, 2, 3, 4]
    pixels = model.fit([picture(seed) for seed in seeds])
    found = model.token_losses(prompts, pixels, seeds)
    assert found.scored.sum(1).tolist() == model.hidden_number(seeds).tolist() and (found.loss[~found.scored] == 0).all()
    loss = model.supervised_loss(prompts, pixels, seeds)
    assert torch.equal(found.mean, loss) and loss.isfinite().all()
    for row in range(4):  # also where another row sees fewer tokens
        alone = model.supervised_loss(prompts.select([row]), pixels[row : row + 1], seeds[row : row + 1])
        assert torch.allclose(alone[0], loss[row], rtol=1e-5)
    blank = model.supervised_loss(prompts, pixels, seeds, torch.tensor([True, False, False, True]))
    assert torch.allclose(blank[1:3], loss[1:3], rtol=1e-5) and (blank[[0, 3]] - loss[[0, 3]]).abs().min() > 1e-5


def test_numbers_of_hidden_tokens_follow_the_cut_normal(model):
    share = model.hidden_number(list(range(4000)), 1000) / 1000
    assert share.min() >= 0.7 and share.max() <= 1
    assert abs(float(share.mean()) - 0.867) < 0.005 and abs(float(share.quantile(0.05)) - 0.724) < 0.005  # scipy's truncnorm


def test_what_is_hidden_and_scored_can_be_given(model):
    prompts, pixels = model.encode_prompts(TEXTS[:2]), model.fit([picture(1), picture(2)])
    hidden = torch.arange(16).expand(2, -1) >= torch.tensor([[4], [9]])
    scored = hidden & (torch.arange(16) % 2 == 0)
    found = model.token_losses(prompts, pixels, [1, 2], given=Supervision(hidden=hidden, scored=scored))
    whole = model.token_losses(prompts, pixels, [1, 2], given=Supervision(hidden=hidden))
    assert torch.equal(found.scored, scored) and torch.allclose(found.loss, whole.loss * scored, rtol=1e-4)


def test_the_variational_term_trains_the_variance_alone_and_counts_bins_at_the_end():
    net = token_diffusion.TokenDenoiser(4, 16, 1, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clean, z, noise = torch.randn(6, 4) * 0.1, torch.randn(6, 8), torch.randn(6, 4)
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    schedule, at = Schedule(), torch.tensor([0, 0, 1, 500, 900, 999])
    each = token_diffusion.loss(net, schedule, clean, z, at, noise)
    x = schedule.noised(clean, at, noise)
    eps, v = net(x, schedule.time_of(at), z).chunk(2, -1)
    made = schedule.step(eps, v, x, at)
    normal = torch.distributions.Normal(made.mean[:2], (made.log_variance[:2] / 2).exp())
    bins = normal.cdf(clean[:2] + 1 / 255) - normal.cdf(clean[:2] - 1 / 255)
    expected = ((noise - eps) ** 2).mean(-1)[:2] - bins.clamp(min=1e-12).log().mean(-1) / math.log(2)
    assert torch.allclose(each[:2], expected, rtol=1e-2)
    noise_part, bias = ((noise - eps) ** 2).mean(), net.final_layer["linear"].bias
    (whole,), (alone,) = torch.autograd.grad(each.mean(), bias, retain_graph=True), torch.autograd.grad(noise_part, bias)
    assert torch.allclose(whole[:4], alone[:4], rtol=1e-4) and (whole[4:] != 0).all() and (alone[4:] == 0).all()


def test_hints_count_where_they_are_given(model):
    prompts, pixels = model.encode_prompts(TEXTS[:3]), model.fit([picture(seed) for seed in (1, 2, 3)])
    plain = model.supervised_loss(prompts, pixels, [1, 2, 3])
    hints = model.image_features(pixels)[:, :5]
    assert hints.shape == (3, 5, model.trunk.config.hidden_size) and hints.requires_grad
    hinted = torch.tensor([True, False, True])
    found = model.supervised_loss(prompts, pixels, [1, 2, 3], given=Supervision(hints=hints, hinted=hinted))
    assert torch.allclose(found[1], plain[1], rtol=1e-5) and (found[[0, 2]] - plain[[0, 2]]).abs().min() > 1e-5
    alone = model.supervised_loss(prompts.select([2]), pixels[2:], [3], given=Supervision(hints=hints[2:]))
    assert torch.allclose(alone[0], found[2], rtol=1e-5)
    found[0].backward()
    assert model.net.proj_in[0].weight.grad.abs().max() > 0
    model.net.zero_grad()


def test_the_layout_with_hints():
    """Two hints, three text slots (the first one padding), two image tokens."""
    mask = torch.tensor([[False, True, True, True, True]]).expand(2, -1)
    seen = behind_hints(mask, 3, 2, torch.tensor([True, False]))
    assert seen[0].int().tolist() == [
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [1, 1, 0, 1, 1, 1, 1],
        [1, 1, 0, 1, 1, 1, 1],
    ]
    assert torch.equal(seen[1, 2:, 2:], causal(mask)[1]) and not seen[1, 3:, :2].any()


def test_gradients_reach_what_is_trainable_alone(model):
    prompts, pixels = model.encode_prompts(TEXTS[:1]), model.fit([picture(1)])
    model.net.requires_grad_(False)
    for part in ("mar", "projections"):
        model.trainable[part].requires_grad_(True)
    try:
        model.supervised_loss(prompts, pixels, [1]).mean().backward()
        got = {name for name, weight in model.net.named_parameters() if weight.grad is not None and weight.grad.abs().max() > 0}
        assert got and all(name.startswith(("mar.", "proj_")) for name in got)
        assert {name for name, _ in model.net.named_parameters() if name.startswith(("mar.", "proj_"))} - got == {"mar.class_emb.weight"}
        assert not any(weight.requires_grad for weight in model.vae.parameters())
    finally:
        model.net.requires_grad_(True)
        model.net.zero_grad()


def test_lora_that_is_off_is_the_base(folder):
    loaded = family.load(folder)
    loaded.steps = 2
    contract.lora_that_is_off_is_the_base(loaded)


def test_half_precision_keeps_the_ratio_near_one(folder):
    low = family.load(folder, dtype="bfloat16")
    low.steps = 4
    prompts, trajectory = drawn(low, TEXTS[:2])
    assert trajectory.actions.dtype == torch.float32
    assert (low.log_prob(prompts, trajectory).detach() - trajectory.log_prob).abs().max() < 0.05


# Reading and writing


def test_text_log_probs_are_those_of_the_writer(model):
    pictures = [picture(1), None, picture(2, 40, 16)]
    written = model.generate_text(QUESTIONS, pictures, [1, 2, 3], temperature=1.0, max_tokens=10)
    scored = model.text_tokens_log_prob(QUESTIONS, pictures, written.ids, written.mask)
    assert (scored - written.log_prob).abs().max() < 1e-4 and scored.requires_grad and written.mask.any()
    alone = model.generate_text(QUESTIONS[2:], pictures[2:], [3], max_tokens=10)
    assert alone.texts[0] == written.texts[2]
    assert torch.equal(alone.log_prob[0][alone.mask[0]], written.log_prob[2][written.mask[2]])


def test_an_answer_counts_its_end_and_depends_on_the_picture(model):
    log_prob, mask = model.text_log_prob(["how many"] * 2, [picture(1), picture(2)], ["two", "two red circles"])
    assert mask.sum(1).tolist() == [len(model.chat.answer("two")), len(model.chat.answer("two red circles"))]
    other, _ = model.text_log_prob(["how many"] * 2, [picture(3), picture(2)], ["two", "two red circles"])
    assert not torch.allclose(log_prob[0], other[0], atol=1e-3) and torch.allclose(log_prob[1], other[1], atol=1e-5)


def test_prompts_and_questions_are_the_official_turns(model):
    text = model.chat.tokenizer.decode(model.chat.drawing(" a red circle "))
    assert text == "<|im_start|>user\nGenerate an image: a red circle.<|im_end|>\n<|im_start|>assistant\n"
    row = model.chat.question("how many <image>?", 19)
    assert row.count(model.chat.image) == 19 and model.chat.image == len(model.chat.tokenizer)
    before = row[: row.index(model.chat.image)]
    assert model.chat.tokenizer.decode(before) == "<|im_start|>user\n" and row[len(before) : len(before) + 19] == [model.chat.image] * 19


def test_embeddings_and_features(model):
    found = model.embed(QUESTIONS[:2], [picture(1), None])
    assert found.is_image.sum(1).tolist() == [16, 0] and not (found.is_text & found.is_image).any()
    assert (found.is_text.sum(1) > 3).all() and not (found.is_text & ~found.mask).any()
    (one, other) = model.text_features(["a red circle", ""])
    assert "".join(one.words) == "a red circle" and one.features.shape == (len(one.words), 32) and len(other.features) == 0


def test_pictures_to_read_keep_their_edges_and_pictures_to_draw_fill_the_square(model):
    wide = np.zeros((16, 64, 3), np.uint8)
    wide[:, 24:40] = 255
    assert model.fit([wide]).shape == (1, 3, SIDE, SIDE) and model.fit([wide]).min() == 1
    (_, pixels) = model.questions(["?"], [wide])
    assert abs(float(pixels[0][0, 0, 0]) - 127 / 255) < 1e-6 and float(pixels[0][0, SIDE // 2, SIDE // 2]) == 1


def test_images_answers_and_choices_in_one_call(model):
    results = model.generate(
        [request("a red circle", 1, steps=2), request("what colour?", 2, images=[picture(1)], task="answer", max_tokens=4)]
    )
    assert results[0].image.shape == (SIDE, SIDE, 3) and results[1].answer is not None


# The checkpoint


def test_a_saved_model_is_whole_and_draws_the_same(model, tmp_path):
    contract.saved_and_loaded_again_it_draws_the_same(model, family, tmp_path / "saved")
    assert family.load(tmp_path / "saved").inner_steps == INNER


def test_the_original_layout_draws_the_same(folder, model, tmp_path, monkeypatch):
    monkeypatch.setitem(_harmon_layout.HEADS_OF_WIDTH, 32, 4)
    original = make_original_harmon(folder, tmp_path / "original")
    spec = hub.resolve_model(f"harmon:{original}")
    again = family.load(spec.path)
    prompts, policy = model.encode_prompts(TEXTS[:1]), Policy(3.0, levels=(1.0,) * INNER)
    again.steps = model.steps
    one, other = (made.sample(prompts, policy, [1], model.size) for made in (model, again))
    assert torch.equal(one.actions, other.actions) and again.fingerprint != model.fingerprint


def test_what_is_missing_is_named(folder, tmp_path, monkeypatch):
    original = make_original_harmon(folder, tmp_path / "original")
    with pytest.raises(MmalignError, match="attention heads of a MAR of width 32"):
        family.load(original)
    monkeypatch.setitem(_harmon_layout.HEADS_OF_WIDTH, 32, 4)
    (original / "kl16.ckpt").rename(tmp_path / "kl16.ckpt")
    with pytest.raises(UsageError, match=r"'kl16'.*--model-extra kl16=FILE"):
        family.load(original)
    for given in (tmp_path, tmp_path / "kl16.ckpt"):
        family.load(original, extra={"kl16": given})
    (original / "qwen2.5").rename(tmp_path / "qwen")
    with pytest.raises(UsageError, match=r"'qwen2.5'.*--model-extra qwen2.5=FOLDER"):
        family.load(original, extra={"kl16": tmp_path})
    shutil.copy2(original / "harmon_0.5b.pth", original / "harmon_1.5b.pth")
    with pytest.raises(UsageError, match=r"has harmon_0.5b.pth, harmon_1.5b.pth; one is expected.*weights=FILE"):
        family.load(original, extra={"kl16": tmp_path, "qwen2.5": tmp_path / "qwen"})
    family.load(original, extra={"kl16": tmp_path, "qwen2.5": tmp_path / "qwen", "weights": original / "harmon_1.5b.pth"})
    with pytest.raises(UsageError, match="vq=.*this family takes"):
        family.load(original, extra={"vq": tmp_path})


def test_a_whole_folder_without_its_coder_asks_for_it(tmp_path):
    bare = make_harmon(tmp_path / "bare", seed=3, with_coder=False)
    assert family.load(bare).vae.channels == 4
    (bare / "kl16.ckpt").unlink()
    with pytest.raises(UsageError, match="'kl16'"):
        family.load(bare)
    with pytest.raises(UsageError, match="no further part but 'kl16'"):
        family.load(bare, extra={"qwen2.5": tmp_path})


def test_wrong_tensors_are_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    tensors = load_file(wrong / "model.safetensors")
    tensors["mar.encoder_norm.extra"] = tensors.pop("mar.encoder_norm.bias")
    save_file(tensors, wrong / "model.safetensors")
    with pytest.raises(MmalignError, match=r"missing \(mar.encoder_norm.bias\).*unexpected \(mar.encoder_norm.extra\)"):
        family.load(wrong)
    for name in [name for name in tensors if name.startswith("mar.z_proj")]:
        tensors.pop(name)
    save_file(tensors, wrong / "model.safetensors")
    with pytest.raises(MmalignError, match="no Harmon.*z_proj.weight"):
        family.load(wrong)
    content = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**content, "llm": {**content["llm"], "hidden_size": 64}}))
    shutil.copy2(folder / "model.safetensors", wrong / "model.safetensors")
    with pytest.raises(MmalignError, match="sizes of its config.json"):
        family.load(wrong)


def test_it_is_recognised_by_its_config_alone(folder, tmp_path):
    assert hub.resolve_model(str(folder)).family == "harmon" and not family.recognises(tmp_path)
    with pytest.raises(UsageError, match="float64"):
        family.load(folder, dtype="float64")
