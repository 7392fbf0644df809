"""BLIP-VQA, GIT, VQAScore and ORM on tiny checkpoints: values by an independent formula, batches, order, failures, layouts."""

from __future__ import annotations

import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch
from helpers import tiny_questions as tiny

from mmalign.images import pad_square
from mmalign.types import Failure, MmalignError, Value

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EXACT = pytest.approx


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("questions")
    return {
        "blip_vqa": {"model": str(tiny.blip(root / "blip")), "processor": str(root / "blip"), "resolution": 48, "is_rounded": False},
        "git": {"model": str(tiny.git(root / "git"))},
        "vqascore": dict(zip(("model", "vision"), map(str, tiny.clip_t5(root / "t5")), strict=True))
        | {"tokenizer": str(root / "t5"), "dtype": "float32"},
        "orm": {"model": str(tiny.llava_next(root / "orm")[0]), "dtype": "float32"},
    }


def make(folders, name, **options):
    module = importlib.import_module(f"mmalign.scorers.{name}")
    return module.load(module.Config(**folders[name] | options))


NAMES = ("blip_vqa", "git", "vqascore", "orm")


@pytest.fixture(scope="module", params=NAMES)
def scorer(request, folders):
    return make(folders, request.param)


def numbers(scores):
    assert all(isinstance(score, Value) for score in scores), scores
    return [score.x for score in scores]


def test_batches_of_one_three_and_seven_agree_and_keep_the_order(scorer):
    samples = tiny.seven()
    alone = numbers([scorer.score([sample])[0] for sample in samples])
    for size in (3, 7):
        scorer.config = dataclasses.replace(scorer.config, batch_size=size)
        assert numbers(scorer.score(samples)) == EXACT(alone, abs=1e-5)
        assert numbers(scorer.score(samples[::-1])) == EXACT(alone[::-1], abs=1e-5)
    assert len({round(number, 6) for number in alone}) > 4, "a scorer that answers the same to everything tests nothing"
    low, high = scorer.range
    assert all(low <= number <= high for number in alone)


def test_what_cannot_be_measured_is_a_typed_failure_in_its_place(scorer):
    bad = [
        tiny.sample("", 1),
        tiny.sample("a car", 2, image=None),
        tiny.sample("a car", 3, image=b"no image"),
        tiny.sample("a car", 4, size=(1, 1)),
        tiny.sample("car " * 2500, 5),
        tiny.sample("a car", 6, image=np.zeros((4, 4), np.uint8)),
    ]
    good = tiny.sample("a red car", 7)
    scores = scorer.score([bad[0], good, *bad[1:]])
    assert [type(score) for score in scores] == [Failure, Value] + [Failure] * 5
    kinds = [score.kind for score in scores if isinstance(score, Failure)]
    assert kinds == ["missing", "missing", "error", "error", "error", "error"]
    assert scores[1].x == EXACT(scorer.score([good])[0].x, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_nan_weights_are_nonfinite_failures_and_change_the_fingerprint(name, folders):
    broken, sound = make(folders, name), make(folders, name)
    assert broken.fingerprint == sound.fingerprint
    with torch.no_grad():
        for tensor in broken.model.parameters():
            tensor.fill_(math.nan)
    (score,) = broken.score([tiny.sample()])
    assert isinstance(score, Failure) and score.kind == "nonfinite"


@pytest.mark.parametrize("name", NAMES)
def test_absent_weights_are_a_sentence_with_the_option(name, folders, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MmalignError, match=rf"--set {name}\.model=PATH"):
        make(folders, name, model="/nowhere/at-all")


def squash(image, side, mean, std, method="BICUBIC"):
    from PIL import Image

    small = np.asarray(Image.fromarray(image).resize((side, side), getattr(Image.Resampling, method)), np.float32) / 255
    return torch.tensor((small - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)[None]


def share(logits, yes, no):
    shares = logits.double().softmax(-1)
    return float(shares[yes] / (shares[yes] + shares[no]))


# -- BLIP-VQA


@torch.no_grad()
def plain_blip(folder, image, question, side):
    from transformers import BertTokenizer, BlipForQuestionAnswering

    model, words = BlipForQuestionAnswering.from_pretrained(folder).eval(), BertTokenizer.from_pretrained(folder)
    visual = model.vision_model(squash(image, side, CLIP_MEAN, CLIP_STD), interpolate_pos_encoding=side != 32).last_hidden_state
    ids = words(question, return_tensors="pt").input_ids
    ids[:, 0] = 1041
    read = model.text_encoder(ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=visual).last_hidden_state
    logits = model.text_decoder(torch.tensor([[1040]]), encoder_hidden_states=read).logits[0, 0]
    return share(logits, words.convert_tokens_to_ids("yes"), words.convert_tokens_to_ids("no"))


@pytest.mark.parametrize("side", [32, 48])
def test_blip_is_the_product_of_its_answers(folders, side):
    sample = tiny.sample("A red car. and a blue dog", 3)
    (value,) = make(folders, "blip_vqa", resolution=side).score([sample])
    expected = {
        phrase: plain_blip(folders["blip_vqa"]["model"], sample.image, f"{phrase}?".lower(), side) for phrase in ("A red car", "a blue dog")
    }
    assert value.parts == EXACT(expected, abs=1e-5)
    assert value.x == EXACT(math.prod(expected.values()), abs=1e-5)


def test_blip_rounds_as_the_official_code_and_takes_eight_phrases(folders):
    sample = tiny.sample("text", 3, noun_phrases=["car", "*", *"abcdefghijk"])
    (exact,), (rounded,) = (make(folders, "blip_vqa", is_rounded=flag).score([sample]) for flag in (False, True))
    assert list(rounded.parts) == ["car", *"abcdefg"], "a phrase of punctuation asks nothing"
    assert rounded.parts == {phrase: round(yes, 4) for phrase, yes in exact.parts.items()}
    assert rounded.x == round(math.prod(rounded.parts.values()), 4)


def test_blip_questions_lose_case_punctuation_and_length():
    from mmalign.scorers.blip_vqa import question_of

    assert question_of('The "Red" (car)*') == "the red car?"
    assert question_of(" ".join(["word"] * 60)) == " ".join(["word"] * 50)


def test_blip_reads_the_original_file(folders, tmp_path):
    from safetensors.torch import load_file

    old = {}
    for key, tensor in load_file(f"{folders['blip_vqa']['model']}/model.safetensors").items():
        for new, name in (
            ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
            ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
            ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
            ("vision_model.post_layernorm", "visual_encoder.norm"),
            ("vision_model.encoder.layers", "visual_encoder.blocks"),
            ("self_attn.qkv", "attn.qkv"),
            ("self_attn.projection", "attn.proj"),
            ("layer_norm", "norm"),
        ):
            key = key.replace(new, name)
        old[key] = tensor
    table = "text_decoder.bert.embeddings.word_embeddings.weight"
    old["text_decoder.cls.predictions.decoder.weight"] = old.setdefault(table, old.get("text_decoder.cls.predictions.decoder.weight"))
    old.setdefault("text_decoder.cls.predictions.decoder.bias", old.get("text_decoder.cls.predictions.bias"))
    old.setdefault("text_decoder.cls.predictions.bias", old["text_decoder.cls.predictions.decoder.bias"])
    file = tmp_path / "model_base_vqa_capfilt_large.pth"
    torch.save({"model": old}, file)
    ours = make(folders, "blip_vqa", model=str(file))
    samples = tiny.seven()[:3]
    assert numbers(ours.score(samples)) == EXACT(numbers(make(folders, "blip_vqa").score(samples)), abs=1e-6)
    del old["visual_encoder.norm.bias"]
    torch.save({"model": old}, file)
    with pytest.raises(MmalignError, match="missing, first vision_model.post_layernorm.bias"):
        make(folders, "blip_vqa", model=str(file))


# -- GIT


@torch.no_grad()
def plain_git(folder, image, noun):
    from transformers import BertTokenizer, CLIPImageProcessorPil, GitForCausalLM

    model, words = GitForCausalLM.from_pretrained(folder).eval(), BertTokenizer.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=image, return_tensors="pt").pixel_values
    ids = torch.tensor([[words.cls_token_id, *words(f"{noun}?", add_special_tokens=False).input_ids]])
    logits = model(pixel_values=pixels, input_ids=ids).logits[0, -1]
    return share(logits, words.encode("yes")[1], words.encode("no")[1])


def test_git_is_the_mean_over_attributed_nouns(folders):
    sample = tiny.sample("text", 5, nouns=["car", "dog"], attr_nouns=["red car", "blue dog"], task_type="color")
    (value,) = make(folders, "git").score([sample])
    expected = {noun: plain_git(folders["git"]["model"], sample.image, noun) for noun in ("red car", "blue dog")}
    assert value.parts == EXACT(expected, abs=1e-5) and value.x == EXACT(sum(expected.values()) / 2, abs=1e-5)


def test_git_takes_nouns_then_text_and_knows_the_tasks_it_does_not_judge(folders):
    metas = [{"nouns": ["car"], "attr_nouns": []}, {"nouns": ["car"], "attr_nouns": None}, {}, {"nouns": []}]
    metas += [{"nouns": ["car"], "task_type": task} for task in ("spatial", "numeracy")]
    scores = make(folders, "git").score([tiny.sample("the dog on a car", 1, **meta) for meta in metas])
    assert [list(score.parts) for score in scores] == [["car"], ["car"], ["the dog", "a car"], [], [], []]
    assert [score.x for score in scores[3:]] == [1.0, 0.0, 0.0]


def test_git_refuses_a_noun_longer_than_its_context(folders):
    long, good = tiny.sample("t", 1, nouns=["car " * 40]), tiny.sample("t", 1, nouns=["car"])
    scores = make(folders, "git").score([long, good])
    assert isinstance(scores[0], Failure) and "longer than GIT's context" in scores[0].message and isinstance(scores[1], Value)


# -- VQAScore


@torch.no_grad()
def plain_vqascore(folders, sample):
    """The official path: one row, cross entropy of T5 on the answer, exp of minus the mean."""
    from pathlib import Path

    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    from mmalign.scorers._folders import tensors_of

    folder = Path(folders["vqascore"]["model"])
    words, state = AutoTokenizer.from_pretrained(folder), tensors_of(folder)
    t5 = T5ForConditionalGeneration(T5Config.from_pretrained(folder)).eval()
    t5.load_state_dict({key: tensor for key, tensor in state.items() if "mm_projector" not in key and "lm_head" not in key}, strict=False)
    tower = CLIPVisionModel.from_pretrained(folders["vqascore"]["vision"])
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    fill = tuple(int(mean * 255) for mean in CLIP_MEAN)
    pixels = processor(images=pad_square(sample.image, fill), return_tensors="pt").pixel_values
    patches = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    hidden = torch.nn.functional.gelu(patches @ state["mm_projector.0.weight"].T + state["mm_projector.0.bias"])
    visual = hidden @ state["mm_projector.2.weight"].T + state["mm_projector.2.bias"]
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
        "answers to the user's questions. USER: "
    )
    question = f'\nDoes this figure show "{sample.request.prompt.text}"? Please answer yes or no. ASSISTANT: '
    before, after, answer = (words(text, return_tensors="pt").input_ids for text in (system, question, "Yes"))
    assert before[0, -1] == after[0, -1] == answer[0, -1] == words.eos_token_id
    inputs = torch.cat([t5.shared(before), visual, t5.shared(after)], dim=1)
    hidden = t5(
        inputs_embeds=inputs, decoder_input_ids=torch.tensor([[0, int(answer[0, 0])]]), output_hidden_states=True
    ).decoder_hidden_states[-1]
    logits = hidden @ state["lm_head.weight"].T
    return math.exp(-float(torch.nn.functional.cross_entropy(logits[0], answer[0])))


def test_vqascore_is_the_geometric_mean_of_yes_and_the_end(folders):
    samples = tiny.seven()[:3]
    values = make(folders, "vqascore").score(samples)
    assert numbers(values) == EXACT([plain_vqascore(folders, sample) for sample in samples], abs=1e-5)
    assert all(value.x == EXACT(math.sqrt(value.parts["yes"] * value.parts["end"]), abs=1e-6) for value in values)


def test_vqascore_refuses_a_checkpoint_with_a_lost_shard(folders, tmp_path):
    import shutil
    from pathlib import Path

    copy = Path(shutil.copytree(folders["vqascore"]["model"], tmp_path / "copy"))
    torch.save({}, copy / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(MmalignError, match="lack .* tensors that the index names"):
        make(folders, "vqascore", model=str(copy))


# -- ORM


@torch.no_grad()
def plain_orm(folders, sample, tmp_path):
    """The same network in transformers' own layout, called with embeddings put together by hand."""
    from transformers import AutoTokenizer

    _, model = tiny.llava_next(tmp_path)
    words = AutoTokenizer.from_pretrained(folders["orm"]["model"])
    pixels = squash(pad_square(sample.image, (127, 127, 127)), 28, (0.5,) * 3, (0.5,) * 3)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    visual = torch.cat([model.model.multi_modal_projector(states)[0], model.model.image_newline[None]])
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image> This image is generated by a prompt: "
        f"{sample.request.prompt.text}. Does this image accurately represent the prompt? Please answer yes or no without explanation."
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    before, after = (torch.tensor(words(part).input_ids) for part in text.split("<image>"))
    embed = model.get_input_embeddings()
    logits = model(inputs_embeds=torch.cat([embed(before), visual, embed(after)])[None]).logits[0, -1]
    return logits, words.convert_tokens_to_ids("yes"), words.convert_tokens_to_ids("no")


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_orm_is_the_sigmoid_of_the_warped_difference(folders, temperature, tmp_path):
    sample = tiny.sample("a red car", 2)
    logits, yes, no = plain_orm(folders, sample, tmp_path)
    (value,) = make(folders, "orm", temperature=temperature).score([sample])
    assert value.x == EXACT(1 / (1 + math.exp(-float(logits[yes] - logits[no]) / temperature)), abs=1e-5)
    assert value.parts == EXACT({"yes": float(logits.softmax(-1)[yes]), "no": float(logits.softmax(-1)[no])}, abs=1e-6)


def test_orm_upstream_draws_by_the_samples_seed_and_scores_zero_without_an_answer(folders):
    scorer = make(folders, "orm", compat="upstream")
    samples = [tiny.sample("a red car", seed) for seed in range(12)]
    scores = scorer.score(samples)
    again = [*scorer.score(samples[:3]), *scorer.score(samples[3:])]
    assert numbers(again) == EXACT(numbers(scores), abs=1e-5) and [score.detail for score in again] == [score.detail for score in scores]
    drawn = [score.x for score in scores if score.detail.startswith("drew") and "neither" in score.detail]
    assert drawn and set(drawn) == {0.0}
    assert scorer.fingerprint != make(folders, "orm").fingerprint


def test_orm_warps_as_transformers_does():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from mmalign.scorers.orm import Sampling, warp

    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2
    theirs = logits[None]
    for warper in (TemperatureLogitsWarper(0.3), TopKLogitsWarper(20), TopPLogitsWarper(0.8)):
        theirs = warper(None, theirs)
    assert torch.equal(warp(logits, 0.3, Sampling(20, 0.8)), theirs[0].softmax(-1))
    assert torch.allclose(warp(logits, 0.3, Sampling()), (logits / 0.3).softmax(-1))


# -- phrases


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red car on the left of two dogs", ["a red car", "two dogs"]),
        ("A cat, a dog and the bird.", ["A cat", "a dog", "the bird"]),
        ("the", []),
        ("a photo of a hot dog", ["a photo", "a hot dog"]),
    ],
)
def test_the_rule_finds_phrases(text, expected):
    from mmalign.scorers._phrases import by_rule

    assert by_rule(text) == expected
