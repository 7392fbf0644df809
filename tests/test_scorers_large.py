"""HPSv3 and RAHF on tiny checkpoints: values against a plain call of the network, layouts, batches, failures."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch
from helpers import tiny_questions as tiny

from mmalign.scorers import hpsv3, rahf
from mmalign.scorers._hpsv3_question import QUESTION
from mmalign.types import Failure, MmalignError, Value


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.hpsv3(tmp_path_factory.mktemp("hpsv3"))


def make(made, **options):
    weights, base, _ = made
    return hpsv3.load(hpsv3.Config(**{"weights": str(weights), "base": str(base), "pixels": 4 * 28 * 28, "dtype": "float32"} | options))


def test_the_question_is_the_official_one_to_the_byte():
    assert hashlib.sha256(QUESTION.encode()).hexdigest() == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"


@torch.no_grad()
def test_hpsv3_equals_a_plain_call_with_counted_positions(made):
    _, base, (network, head) = made
    scorer, samples = make(made), tiny.seven()[:3]
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    words = AutoTokenizer.from_pretrained(base)
    words.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    processor = Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=4 * 28 * 28)
    for sample in samples:
        seen = processor(images=sample.image, return_tensors="pt")
        pads = "<|image_pad|>" * (int(seen.image_grid_thw.prod()) // 4)
        text = (
            f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>"
            f"{QUESTION.replace('{text_prompt}', sample.request.prompt.text)}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = words(text, return_tensors="pt").input_ids
        positions = torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, 1, -1)
        states = network(input_ids=ids, position_ids=positions, **seen).last_hidden_state
        mu, log_sigma = head.eval()(states[0, int((ids[0] == words.convert_tokens_to_ids("<|Reward|>")).nonzero())]).tolist()
        (value,) = scorer.score([sample])
        assert value.x == pytest.approx(mu, abs=1e-5)
        assert value.parts == {"mu": value.x, "sigma": pytest.approx(math.exp(log_sigma), rel=1e-4)}


def test_hpsv3_batches_agree_and_keep_the_order(made):
    scorer, samples = make(made), tiny.seven()
    alone = [scorer.score([sample])[0].x for sample in samples]
    assert len({round(number, 5) for number in alone}) == 7
    for size in (3, 7):
        scorer.config = dataclasses.replace(scorer.config, batch_size=size)
        assert [score.x for score in scorer.score(samples)] == pytest.approx(alone, abs=1e-5)


def test_hpsv3_failures(made):
    scorer = make(made)
    bad = [tiny.sample("", 1), tiny.sample("x", 2, image=None), tiny.sample("x", 3, size=(1, 1)), tiny.sample("a <|Reward|> b", 4)]
    bad += [tiny.sample("car " * 2500, 5), tiny.sample("a <|image_pad|>", 6), tiny.sample("x", 7, size=(8, 1700))]
    good = tiny.sample("a car", 8)
    scores = scorer.score([*bad, good])
    assert [score.kind for score in scores if isinstance(score, Failure)] == ["missing", "missing"] + ["error"] * 5
    assert scores[-1].x == pytest.approx(scorer.score([good])[0].x, abs=1e-6)
    with torch.no_grad():
        scorer.model.head[0].weight.fill_(math.nan)
    assert scorer.score([good])[0].kind == "nonfinite"


def test_hpsv3_refuses_weights_that_are_not_whole(made, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(made[0])
    del state["visual.merger.ln_q.weight"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(MmalignError, match="1 missing, first network.visual.merger.ln_q.weight"):
        make(made, weights=str(tmp_path / "cut.safetensors"))


@pytest.mark.parametrize("size", [(512, 512), (1024, 768), (100, 90), (448, 448), (30, 900), (28, 28)])
def test_smart_size_is_qwens(size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    assert hpsv3.smart_size(size, 200704, 28) == smart_resize(*size, factor=28, min_pixels=200704, max_pixels=200704)


def test_patches_are_those_of_qwens_processor():
    from transformers import Qwen2VLImageProcessorPil

    image = tiny.picture(0, 61, 90)
    theirs = Qwen2VLImageProcessorPil(min_pixels=6 * 28 * 28, max_pixels=6 * 28 * 28)(images=image, return_tensors="pt")
    ours, grid = hpsv3.patchify(image, 6 * 28 * 28, 14, 2, 2)
    assert torch.allclose(ours, theirs.pixel_values, atol=1e-5) and [1, *grid] == theirs.image_grid_thw[0].tolist()


# -- RAHF


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rahf")
    return path, tiny.rahf(path)


def test_rahf_gives_four_ratings_and_the_chosen_map(folder):
    path, model = folder
    samples = tiny.seven()
    scorer = rahf.load(rahf.Config(str(path)))
    alone = [scorer.score([sample])[0] for sample in samples]
    scorer.config = dataclasses.replace(scorer.config, batch_size=7)
    together = scorer.score(samples)
    for one, many in zip(alone, together, strict=True):
        assert list(one.parts) == ["plausibility", "alignment", "aesthetics", "overall"] and one.x == one.parts["overall"]
        assert many.parts == pytest.approx(one.parts, abs=1e-5)
        assert one.heatmap.shape == (4, 4) and one.heatmap.min() >= 0 and one.heatmap.max() <= 1
        assert np.allclose(one.heatmap, many.heatmap, atol=1e-5)
    other = rahf.load(rahf.Config(str(path), rating="alignment", heatmap="implausibility"))
    (value,) = other.score(samples[:1])
    assert value.x == alone[0].parts["alignment"] and not np.allclose(value.heatmap, alone[0].heatmap)
    assert other.fingerprint != scorer.fingerprint


@torch.no_grad()
def test_rahf_is_vit_then_t5_over_patches_and_words_then_heads(folder):
    path, model = folder
    sample = tiny.seven()[1]
    (value,) = rahf.load(rahf.Config(str(path))).score([sample])
    from PIL import Image
    from transformers import AutoTokenizer

    small = np.asarray(Image.fromarray(sample.image).resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    pixels = torch.tensor(small / 127.5 - 1).permute(2, 0, 1)[None]
    ids = AutoTokenizer.from_pretrained(path)(sample.request.prompt.text, return_tensors="pt").input_ids
    patches = model.vision(pixels).last_hidden_state[:, 1:] @ model.project.weight.T + model.project.bias
    states = model.encoder(inputs_embeds=torch.cat([patches, model.encoder.shared(ids)], 1)).last_hidden_state[0, :16]
    grid = states.T.reshape(1, 16, 4, 4)
    assert value.heatmap == pytest.approx(model.map_heads["misalignment"](grid)[0, 0].sigmoid().numpy(), abs=1e-5)
    head = model.score_heads["overall"]
    assert value.x == pytest.approx(float(head.line(head.convolutions(grid).mean((2, 3))).sigmoid()), abs=1e-5)


def test_rahf_failures_and_sentences(folder, tmp_path):
    scorer = rahf.load(rahf.Config(str(folder[0])))
    scores = scorer.score(
        [tiny.sample("", 1), tiny.sample("a car", 2, image=None), tiny.sample("x", 3, size=(1, 1)), tiny.sample("car " * 1500, 4)]
    )
    assert [getattr(score, "kind", "value") for score in scores] == ["missing", "missing", "error", "value"]
    assert isinstance(scores[-1], Value) and "text cut" in scores[-1].detail
    with torch.no_grad():
        scorer.model.project.weight.fill_(math.nan)
    assert scorer.score([tiny.sample("a car", 1)])[0].kind == "nonfinite"
    with pytest.raises(MmalignError, match="no weights that could be fetched"):
        rahf.load(rahf.Config())
    (tmp_path / "config.json").write_text('{"depth": 3}')
    with pytest.raises(MmalignError, match="unknown size 'depth'"):
        rahf.load(rahf.Config(str(tmp_path)))
