"""The loaded Janus: ratios, batches, guidance, text, pixels; and against transformers' own generation of the same checkpoint."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmalign.images import encode_png
from mmalign.models import janus as family
from mmalign.testbed.tiny import make_janus, make_original_janus
from mmalign.trajectory import Policy
from mmalign.types import Failure, MmalignError, Prompt, Request, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [
    "a red circle",
    "two small blue squares to the left of a large green triangle, and a yellow star above them",
    "x",
    "a photo of a red circle and two small blue squares above the table next to the bench",
]
QUESTIONS = ["what colour is the circle?", "how many", "describe the image in detail: what is above the star and what is below it?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_janus(tmp_path_factory.mktemp("janus"), seed=3)


@pytest.fixture(scope="module")
def model(folder):
    return family.load(folder)


@pytest.fixture(scope="module")
def hugging(folder):
    """transformers' own model and processor of the checkpoint."""
    from transformers import AutoProcessor, JanusForConditionalGeneration

    return JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval(), AutoProcessor.from_pretrained(folder)


def picture(seed, height=20, width=31):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def request(text, seed=0, index=0, images=None, **settings):
    return Request(Prompt(f"p{seed}", text, meta={} if images is None else {"images": images}), index, seed, settings=settings)


def messages(text, pictured=False):
    parts = [{"type": "image"}] if pictured else []
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


# The policy


@pytest.mark.parametrize("policy", [Policy(5.0, 1.0), Policy(2.5, 0.7), Policy(1.0, 1.3)])
def test_the_ratio_of_a_fresh_trajectory_is_one(model, policy):
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, policy, [1, 2, 3, 4])
    scored = model.log_prob(prompts, drawn)
    assert (scored.exp() - drawn.log_prob.exp()).abs().max() < 1e-5
    # Improbable codes have log-probabilities of tens, and float32 resolves those relatively.
    assert ((scored - drawn.log_prob).abs() <= 1e-5 * drawn.log_prob.abs().clamp(min=1)).all()
    assert scored.requires_grad and not drawn.log_prob.requires_grad


def test_the_conditional_log_prob_is_that_of_guidance_one(model):
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, Policy(1.0, 1.0), [1, 2, 3, 4])
    assert torch.allclose(model.log_prob(prompts, drawn, "cond"), drawn.log_prob, atol=1e-5)
    guided = model.sample(prompts, Policy(4.0, 1.0), [1, 2, 3, 4])
    assert (model.log_prob(prompts, guided, "cond") - guided.log_prob).abs().max() > 0.1


def test_detaching_the_unconditional_branch_changes_the_gradient_alone(model):
    prompts = model.encode_prompts(TEXTS[:2])
    drawn = model.sample(prompts, Policy(3.0), [1, 2])
    weight = model.trunk.layers[0].mlp.up_proj.weight
    whole, detached = (model.log_prob(prompts, drawn, which) for which in ("guided", "guided_detach_uncond"))
    assert torch.allclose(whole, detached, atol=1e-5)
    first, second = (torch.autograd.grad(value.mean(), weight)[0] for value in (whole, detached))
    assert first.abs().max() > 0 and second.abs().max() > 0 and not torch.allclose(first, second)


def test_the_gradient_of_the_log_prob_is_its_slope(model):
    prompts = model.encode_prompts(TEXTS[:2])
    drawn = model.sample(prompts, Policy(2.0), [1, 2])
    weight = model.net.model.generation_head.vision_head.weight
    gradient = torch.autograd.grad(model.log_prob(prompts, drawn).sum(), weight)[0]
    direction = gradient / gradient.norm()
    kept, values = weight.detach().clone(), []
    with torch.no_grad():
        for step in (1e-3, -1e-3):
            weight.copy_(kept + direction * step)
            values.append(float(model.log_prob(prompts, drawn).double().sum()))
        weight.copy_(kept)
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(float(gradient.norm()), rel=0.02)


def test_new_weights_count_at_once(model):
    prompts = model.encode_prompts(TEXTS[:2])
    weight = model.trunk.layers[1].self_attn.v_proj.weight
    before = model.sample(prompts, Policy(2.0), [1, 2])
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(3.0)
        after = model.sample(prompts, Policy(2.0), [1, 2])
        ratio = (model.log_prob(prompts, after) - after.log_prob).abs().max()
        weight.copy_(kept)
    assert ratio < 1e-4 and not torch.equal(before.log_prob, after.log_prob)


def test_a_layer_with_an_adapter_is_called_and_not_copied(model):
    prompts = model.encode_prompts(TEXTS[:2])
    handle = model.trunk.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: output * 0.5)
    try:
        drawn = model.sample(prompts, Policy(2.0), [1, 2])
        assert (model.log_prob(prompts, drawn) - drawn.log_prob).abs().max() < 1e-4
    finally:
        handle.remove()


# Batches


@pytest.mark.parametrize("n_texts", [1, len(TEXTS)])
def test_images_are_bitwise_equal_at_any_batch_size(model, n_texts):
    """64 requests of one length fill a wide lane; of several lengths, narrow ones."""
    requests = [request(TEXTS[number % n_texts], seed=number) for number in range(64)]
    whole = model.generate(requests)
    for size in (1, 3, 7):
        parts = [sample for start in range(0, 21, size) for sample in model.generate(requests[start : start + size])]
        for one, other in zip(parts, whole, strict=False):
            assert np.array_equal(one.image, other.image), (size, one.request.id)
    assert all(model.lanes._is_wide.values())  # on this kind of machine wide lanes are exact


def test_samples_are_bitwise_equal_alone_and_in_company(model):
    policy = Policy(5.0)
    together = model.sample(model.encode_prompts(TEXTS), policy, [1, 2, 3, 4])
    for row, (text, seed) in enumerate(zip(TEXTS, [1, 2, 3, 4], strict=True)):
        alone = model.sample(model.encode_prompts([text]), policy, [seed])
        assert torch.equal(alone.actions[0], together.actions[row])
        assert torch.equal(alone.log_prob[0], together.log_prob[row])


def test_log_probs_of_a_padded_batch_are_those_of_its_rows_alone(model):
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, Policy(2.0), [1, 2, 3, 4])
    together = model.log_prob(prompts, drawn)
    for row, text in enumerate(TEXTS):
        alone = model.log_prob(model.encode_prompts([text]), drawn.select([row]))
        assert torch.allclose(alone[0], together[row], atol=1e-5)


def test_a_sample_is_its_seed(model):
    prompts = model.encode_prompts([TEXTS[0]] * 3)
    codes = model.sample(prompts, Policy(2.0), [5, 6, 5]).actions
    assert torch.equal(codes[0], codes[2]) and not torch.equal(codes[0], codes[1])


def test_texts_are_bitwise_equal_at_any_batch_size(model):
    pictures = [picture(1), None, picture(2, 40, 16)]
    together = model.generate_text(QUESTIONS, pictures, [1, 2, 3], temperature=1.0, max_tokens=80)
    for row, question in enumerate(QUESTIONS):
        alone = model.generate_text([question], [pictures[row]], [row + 1], temperature=1.0, max_tokens=80)
        length = int(alone.mask.sum())
        assert alone.ids[0, :length].tolist() == together.ids[row][together.mask[row]].tolist()
        assert torch.equal(alone.log_prob[0, :length], together.log_prob[row, :length])


# Against transformers


def test_prompts_are_the_processors(model, hugging):
    _, processor = hugging
    texts = processor.apply_chat_template([messages(text) for text in TEXTS], add_generation_prompt=True, tokenize=False)
    expected = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    prompts = model.encode_prompts(TEXTS)
    assert torch.equal(prompts.ids, expected.input_ids)
    assert torch.equal(prompts.mask.long(), expected.attention_mask)


def test_questions_are_the_processors(model, hugging):
    _, processor = hugging
    text = processor.apply_chat_template([messages(QUESTIONS[0], pictured=True)], add_generation_prompt=True, tokenize=False)
    expected = processor(text=text, images=[picture(0)], return_tensors="pt")
    assert model.chat.question(QUESTIONS[0], pictured=True) == expected.input_ids[0].tolist()


@pytest.mark.parametrize("size", [(20, 31), (16, 16), (64, 9), (7, 7), (200, 150), (5, 90)])
def test_pictures_are_the_processors(model, hugging, size):
    _, processor = hugging
    image = picture(4, *size)
    expected = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.allclose(model.pixels.normalise(model.fit([image])), torch.as_tensor(expected).float(), atol=1e-6)


def test_greedy_images_are_those_of_transformers(model, hugging):
    network, processor = hugging
    texts = processor.apply_chat_template([messages(text) for text in TEXTS], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    expected = network.generate(**inputs, generation_mode="image", do_sample=False)
    drawn = model.sample(model.encode_prompts(TEXTS), Policy(5.0, temperature=1e-5), [1, 2, 3, 4])
    assert torch.equal(drawn.actions, expected)


def test_the_sampled_distribution_is_that_of_transformers(model, hugging):
    """transformers' guided logits at each step of its own sample give our log-probs: nothing is truncated on either side."""
    network, processor = hugging
    texts = processor.apply_chat_template([messages(text) for text in TEXTS], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    steps = []

    def record(ids, scores):
        steps.append(scores.detach().clone())
        return scores

    from transformers import LogitsProcessorList

    torch.manual_seed(0)
    codes = network.generate(**inputs, generation_mode="image", do_sample=True, top_k=0, logits_processor=LogitsProcessorList([record]))
    cond, uncond = torch.stack(steps, 1).chunk(2)
    expected = (uncond + 5.0 * (cond - uncond)).log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, Policy(5.0), [1, 2, 3, 4])
    found = model.log_prob(prompts, type(drawn)("ar", codes, drawn.log_prob, drawn.policy, drawn.seeds))
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5)


def test_greedy_answers_are_those_of_transformers(model, hugging):
    network, processor = hugging
    text = processor.apply_chat_template([messages(QUESTIONS[0], pictured=True)], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=[picture(0)], return_tensors="pt")
    expected = network.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs.input_ids.shape[1] :]
    found = model.generate_text([QUESTIONS[0]], [picture(0)], [0], temperature=0.0, max_tokens=12)
    assert found.ids[0].tolist() == expected.tolist()


def test_answer_log_probs_are_those_of_transformers(model, hugging):
    network, processor = hugging
    text = processor.apply_chat_template([messages(QUESTIONS[0], pictured=True)], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=[picture(0)], return_tensors="pt")
    answer = processor.tokenizer(" red", add_special_tokens=False).input_ids + [processor.tokenizer.eos_token_id]
    ids = torch.cat([inputs.input_ids, torch.tensor([answer])], 1)
    logits = network(input_ids=ids, pixel_values=inputs.pixel_values, attention_mask=torch.ones_like(ids)).logits
    expected = logits[0, -len(answer) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
    found, mask = model.text_log_prob([QUESTIONS[0], QUESTIONS[2]], [picture(0), None], ["red", "a long answer about nothing at all"])
    assert torch.allclose(found[0][mask[0]], expected, atol=1e-5)
    assert (found[~mask] == 0).all() and found.requires_grad


# Text


def test_sampled_texts_carry_the_log_probs_that_a_forward_gives(model):
    pictures = [picture(1), None, picture(2)]
    written = model.generate_text(QUESTIONS, pictures, [1, 2, 3], temperature=0.8, max_tokens=30)
    scored = model.text_tokens_log_prob(QUESTIONS, pictures, written.ids, written.mask, temperature=0.8)
    assert torch.allclose(scored, written.log_prob, atol=2e-5)
    assert written.mask.any(1).all()


def test_reasoning_extends_the_prompt(model):
    plain, extended = model.encode_prompts(["a cat. sits"]), model.encode_prompts(["a cat"], reasoning=["sits"])
    assert torch.equal(plain.ids, extended.ids)


def test_the_unconditional_twin_keeps_the_ends_alone(model):
    prompts = model.encode_prompts(TEXTS[:2])
    for ids, mask in zip(prompts.uncond_ids, prompts.uncond_mask, strict=True):
        row = ids[mask].tolist()
        assert row[0] == model.chat.bos and row[-1] == model.chat.boi and set(row[1:-1]) == {model.chat.pad}


def test_a_prompt_cannot_smuggle_in_picture_tokens(model):
    ids = model.chat.question("<image_placeholder>what<begin_of_image>?", pictured=True)
    assert ids.count(model.chat.image) == model.tokens and ids.count(model.chat.boi) == 1


# Pixels and losses


def test_codes_survive_decoding_shapes(model):
    codes = torch.randint(0, model.codes, (3, model.tokens), generator=torch.Generator().manual_seed(0))
    pixels = model.decode(codes)
    assert pixels.shape == (3, 3, *model.size) and pixels.min() >= 0 and pixels.max() <= 1
    assert model.encode_image(pixels).shape == codes.shape


def test_the_supervised_loss_is_the_cross_entropy_of_the_codes(model):
    prompts, pixels = model.encode_prompts(TEXTS[:2]), torch.rand(2, 3, *model.size, generator=torch.Generator().manual_seed(0))
    drawn = model.sample(prompts, Policy(1.0), [1, 2])
    codes = model.encode_image(pixels)
    expected = -model.log_prob(prompts, type(drawn)("ar", codes, drawn.log_prob, Policy(1.0), drawn.seeds)).mean(-1)
    loss = model.supervised_loss(prompts, pixels)
    assert torch.allclose(loss, expected, atol=1e-5) and loss.requires_grad
    blanked = model.supervised_loss(prompts, pixels, torch.tensor([True, False]))
    assert not torch.isclose(blanked[0], loss[0]) and torch.isclose(blanked[1], loss[1], atol=1e-5)


def test_picture_features_let_gradients_reach_the_pixels(model):
    pixels = torch.rand(1, 3, *model.size, requires_grad=True)
    answers, _ = model.text_log_prob([QUESTIONS[0]], pixels, ["red"])
    answers.sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0


def test_embeddings_say_which_slots_are_text_and_picture(model):
    found = model.embed(QUESTIONS[:2], [picture(0), None])
    assert found.hidden.shape[:2] == found.mask.shape
    assert found.is_image.sum(1).tolist() == [model.tokens, 0]
    assert (found.is_text & found.is_image).sum() == 0 and found.is_text.any(1).all() and not (found.is_text & ~found.mask).any()


# Layouts, precision


@pytest.mark.parametrize("pickled", [True, False])
def test_the_original_layout_is_the_same_model(model, folder, tmp_path, pickled):
    original = family.load(make_original_janus(folder, tmp_path / "original", pickled))
    for name, tensor in model.net.state_dict().items():
        assert torch.equal(tensor, original.net.state_dict()[name]), name
    prompts, other = model.encode_prompts(TEXTS), original.encode_prompts(TEXTS)
    assert torch.equal(prompts.ids, other.ids)
    policy = Policy(5.0)
    assert torch.equal(model.sample(prompts, policy, [1, 2, 3, 4]).actions, original.sample(other, policy, [1, 2, 3, 4]).actions)
    assert family.recognises(tmp_path / "original") and family.recognises(folder)
    # The original processor speaks its system prompt in questions; otherwise the formats agree.
    assert original.chat.system and original.chat.question("what?", True)[-8:] == model.chat.question("what?", True)[-8:]


@pytest.mark.parametrize("layout", ["hugging face", "original"])
def test_a_saved_model_gives_the_same_images(model, folder, tmp_path, layout):
    source = model if layout == "hugging face" else family.load(make_original_janus(folder, tmp_path / "original"))
    source.save(tmp_path / "saved")
    again = family.load(tmp_path / "saved")
    requests = [request(text, seed=1) for text in TEXTS]
    for one, other in zip(source.generate(requests), again.generate(requests), strict=True):
        assert np.array_equal(one.image, other.image)
    assert again.settings == source.settings and again.chat.system == source.chat.system
    from transformers import JanusForConditionalGeneration

    assert JanusForConditionalGeneration.from_pretrained(tmp_path / "saved").generation_config.generation_kwargs == {
        "boi_token_id": model.chat.boi
    }


def test_half_precision_draws(folder):
    half = family.load(folder, dtype="bfloat16")
    sample = half.generate([request(TEXTS[0])])[0]
    assert sample.image.shape == (*half.size, 3) and half.fingerprint != family.load(folder).fingerprint


# Requests


def test_images_and_answers_in_one_call(model, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(picture(0)))
    asked = request(QUESTIONS[0], 1, images=[str(path)], task="answer", max_tokens=6)
    in_memory = request(QUESTIONS[0], 2, images=[picture(0)], task="answer", max_tokens=6)
    results = model.generate([request(TEXTS[0], 3), asked, in_memory, request(QUESTIONS[1], 4, task="answer", max_tokens=6)])
    assert results[0].image.dtype == np.uint8 and results[0].answer is None
    assert results[1].answer == results[2].answer == model.generate([asked])[0].answer
    assert results[3].answer is not None and set(results[1].extra) == {"tokens", "is_whole"}
    assert [result.request.prompt.id for result in results] == ["p3", "p1", "p2", "p4"]


def test_with_an_instruction_the_model_reasons_and_draws_from_what_it_wrote(model):
    plain, reasoned = (request(TEXTS[0], 3, **settings) for settings in ({}, {"instruction": "Plan: {prompt}", "reasoning_tokens": 5}))
    before, after, alone = *model.generate([plain, reasoned]), model.generate([reasoned])[0]
    assert "reasoning" not in before.extra and after.extra["reasoning"] == alone.extra["reasoning"]
    assert np.array_equal(after.image, alone.image) and not np.array_equal(before.image, after.image)
    codes = model.sample(model.encode_prompts(TEXTS[:1], reasoning=[after.extra["reasoning"]]), Policy(), [reasoned.seed]).actions
    assert np.array_equal((model.decode(codes)[0] * 255).to(torch.uint8).permute(1, 2, 0).numpy(), after.image)


def test_what_cannot_be_answered_is_a_failure_and_costs_nothing_else(model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    results = model.generate(
        [
            request("?", 1, images=[str(tmp_path / "absent.png")], task="answer"),
            request("?", 2, images=[str(tmp_path / "broken.png")], task="answer"),
            request("?", 3, images=[picture(0), picture(1)], task="answer"),
            Request(Prompt("large", "a cat"), 0, 1, size=(512, 512)),
            request("a red circle", 5),
        ]
    )
    assert [getattr(result, "kind", "made") for result in results] == ["missing", "error", "error", "error", "made"]
    assert isinstance(results[3], Failure) and "16 x 16" in results[3].message and "512 x 512" in results[3].message


def test_settings_come_from_the_checkpoint_and_the_request(model):
    assert model.settings["guidance"] == 5.0
    images = [model.generate([request(TEXTS[0], 1, **settings)])[0].image for settings in ({}, {"guidance": 5.0}, {"guidance": 1.0})]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "sing"}, "task 'sing'"),
        ({"guidence": 3}, "guidance"),
        ({"instruction": "Plan first."}, "where the prompt goes"),
        ({"temperature": 0.0}, "temperature"),
        ({"guidance": float("nan")}, "guidance"),
    ],
)
def test_wrong_settings_are_usage_errors(model, settings, message):
    with pytest.raises(UsageError, match=message):
        model.generate([request("a cat", **settings)])


def test_wrong_calls_say_what_is_wrong(model, folder):
    prompts = model.encode_prompts(TEXTS[:2])
    with pytest.raises(UsageError, match="own seed; got 1"):
        model.sample(prompts, Policy(), [1])
    drawn = model.sample(prompts, Policy(), [1, 2])
    with pytest.raises(UsageError, match="'marginal'.*cond, guided"):
        model.log_prob(prompts, drawn, "marginal")
    with pytest.raises(UsageError, match="own picture or None; got 1"):
        model.generate_text(QUESTIONS, [None], [1, 2, 3])
    with pytest.raises(MmalignError, match="reads 16 x 16 pixels"):
        model.image_features(torch.rand(1, 3, 20, 20))
    with pytest.raises(UsageError, match="dtype 'int4'"):
        family.load(folder, dtype="int4")
    with pytest.raises(UsageError, match="no extra part"):
        family.load(folder, extra={"vq": folder})


def test_an_empty_batch_is_empty(model):
    assert model.generate([]) == []


def test_padding_holds_nothing_that_a_result_could_see(model):
    """The same prompts with another token under the padding."""
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, Policy(3.0), [1, 2, 3, 4])
    other = type(prompts)(
        prompts.texts,
        torch.where(prompts.mask, prompts.ids, 11),
        prompts.mask,
        torch.where(prompts.mask, prompts.uncond_ids, 11),
        prompts.uncond_mask,
    )
    assert torch.equal(model.sample(other, Policy(3.0), [1, 2, 3, 4]).actions, drawn.actions)
    longer = type(prompts)(
        prompts.texts,
        F.pad(prompts.ids, (5, 0)),
        F.pad(prompts.mask, (5, 0)),
        F.pad(prompts.uncond_ids, (5, 0)),
        F.pad(prompts.uncond_mask, (5, 0)),
    )
    assert torch.allclose(model.log_prob(longer, drawn), model.log_prob(prompts, drawn), atol=1e-5)
