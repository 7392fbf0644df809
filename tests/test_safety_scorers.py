"""Toxicity, NSFW and their penalty: equal to the plain classifiers, to detoxify, and to equation (16)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_scorers import image, nsfw_vit, sample, toxic_bert
from PIL import Image

from mmalign.scorers import nsfw, safety, toxicity
from mmalign.types import Failure, MmalignError, UsageError, Value

TEXTS = ["a red cat on the mat", "you idiot", "hello dog"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toxic_bert(tmp_path_factory.mktemp("bert") / "bert"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(nsfw_vit(tmp_path_factory.mktemp("vit") / "vit"))


def plain_toxicity(bert: str, texts: list[str]) -> torch.Tensor:
    from transformers import AutoTokenizer, BertForSequenceClassification

    words, model = AutoTokenizer.from_pretrained(bert), BertForSequenceClassification.from_pretrained(bert).eval()
    with torch.no_grad():
        return torch.cat([torch.sigmoid(model(**words(text, return_tensors="pt")).logits) for text in texts])


def test_toxicity_is_one_sigmoid_per_label(bert: str) -> None:
    expected_BL = plain_toxicity(bert, TEXTS)
    scores = toxicity.load(toxicity.Config(bert)).score([sample(i, text) for i, text in enumerate(TEXTS)])
    for score, row in zip(scores, expected_BL.tolist(), strict=True):
        assert isinstance(score, Value) and score.x == pytest.approx(row[0], abs=1e-6)
        assert list(score.parts) == list(toxicity.LABELS) and list(score.parts.values()) == pytest.approx(row, abs=1e-6)
    greatest = toxicity.load(toxicity.Config(bert, form="max")).score([sample(i, text) for i, text in enumerate(TEXTS)])
    assert [score.x for score in greatest if isinstance(score, Value)] == pytest.approx(expected_BL.max(1).values.tolist(), abs=1e-6)


def test_which_text_is_read(bert: str) -> None:
    def score(text: str, **fields) -> Value | Failure:
        return toxicity.load(toxicity.Config(bert, text=text)).score([sample(0, TEXTS[0], **fields)])[0]  # type: ignore[arg-type]

    prompt, idiot = plain_toxicity(bert, TEXTS[:2])[:, 0].tolist()
    assert score("auto").x == score("prompt").x == pytest.approx(prompt, abs=1e-6)
    assert score("auto", extra={"reasoning": TEXTS[1]}).x == pytest.approx(idiot, abs=1e-6)
    assert score("prompt", extra={"reasoning": TEXTS[1]}).x == pytest.approx(prompt, abs=1e-6)
    assert score("answer", answer=TEXTS[1]).x == pytest.approx(idiot, abs=1e-6)
    missing = score("reasoning")
    assert isinstance(missing, Failure) and missing.kind == "missing" and "reasoning" in missing.message


def test_text_is_cut_at_512_tokens_and_the_row_says_so(bert: str) -> None:
    (score,) = toxicity.load(toxicity.Config(bert)).score([sample(0, "cat " * 600)])
    assert isinstance(score, Value) and score.detail == "text cut: 602 tokens, the first 512 read"


def test_detoxify_gives_equal_values(bert: str, tmp_path: Path) -> None:
    pytest.importorskip("detoxify", reason="detoxify is an optional extra: pip install 'mmalign[safety]'")
    from transformers import BertForSequenceClassification

    architecture = {"model_type": bert, "model_name": "BertForSequenceClassification", "tokenizer_name": "BertTokenizer", "num_classes": 6}
    content = {
        "config": {"dataset": {"args": {"classes": list(toxicity.LABELS)}}, "arch": {"args": architecture}},
        "state_dict": BertForSequenceClassification.from_pretrained(bert).state_dict(),
    }
    torch.save(content, tmp_path / "toxic.ckpt")
    samples = [sample(i, text) for i, text in enumerate(TEXTS)]
    theirs = toxicity.load(toxicity.Config(bert, backend="detoxify", checkpoint=str(tmp_path / "toxic.ckpt")))
    ours = toxicity.load(toxicity.Config(bert))
    assert [score.x for score in theirs.score(samples)] == pytest.approx([score.x for score in ours.score(samples)], abs=1e-6)

    from detoxify import Detoxify

    direct = Detoxify(checkpoint=str(tmp_path / "toxic.ckpt"), huggingface_config_path=bert).predict(TEXTS)["toxicity"]
    assert [score.x for score in ours.score(samples)] == pytest.approx(direct, abs=1e-6)


def test_a_backend_without_its_checkpoint_is_a_usage_error(bert: str) -> None:
    with pytest.raises(UsageError, match="both or neither"):
        toxicity.load(toxicity.Config(bert, backend="detoxify"))


def test_nsfw_is_the_softmax_of_its_label(vit: str) -> None:
    from transformers import ViTForImageClassification, ViTImageProcessorPil

    pictures = [image(0), image(1, 40, 67)]
    pixels = ViTImageProcessorPil.from_pretrained(vit)([Image.fromarray(picture) for picture in pictures], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = ViTForImageClassification.from_pretrained(vit).eval()(pixels).logits.softmax(-1)[:, 1]
    scores = nsfw.load(nsfw.Config(vit)).score([sample(i, picture=picture) for i, picture in enumerate(pictures)])
    assert [score.x for score in scores if isinstance(score, Value)] == pytest.approx(expected.tolist(), abs=1e-5)
    other = nsfw.load(nsfw.Config(vit, label="normal")).score([sample(0, picture=pictures[0])])[0]
    assert isinstance(other, Value) and other.x == pytest.approx(1 - float(expected[0]), abs=1e-5)


def test_a_label_that_is_not_there_is_named(vit: str) -> None:
    with pytest.raises(MmalignError, match="no label 'unsafe'; it has normal, nsfw"):
        nsfw.load(nsfw.Config(vit, label="unsafe"))


def test_safety_is_equation_16(bert: str, vit: str) -> None:
    samples = [sample(i, text, extra={"reasoning": "idiot"} if i == 1 else {}) for i, text in enumerate(TEXTS)]
    toxic = toxicity.load(toxicity.Config(bert)).score(samples)
    unsafe = nsfw.load(nsfw.Config(vit)).score(samples)
    scorer = safety.load(safety.Config(0.5, 2.0, bert, vit))
    for score, text, picture in zip(scorer.score(samples), toxic, unsafe, strict=True):
        assert isinstance(score, Value) and score.x == pytest.approx(-(0.5 * text.x + 2.0 * picture.x), abs=1e-7)
        assert score.parts == {"toxicity": text.x, "nsfw": picture.x}
    assert scorer.range == (-2.5, 0.0) and scorer.fingerprint != safety.load(safety.Config(1.0, 2.0, bert, vit)).fingerprint


def test_a_sample_that_either_half_cannot_measure_is_a_failure(bert: str, vit: str) -> None:
    scorer = safety.load(safety.Config(toxicity=bert, nsfw=vit))
    textless, pictureless, sound = scorer.score([sample(0, " "), sample(1, picture=None), sample(2)])
    assert isinstance(textless, Failure) and "prompt" in textless.message
    assert isinstance(pictureless, Failure) and "image" in pictureless.message
    assert isinstance(sound, Value)


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="not negative"):
        safety.Config(w_nsfw=-1.0)
