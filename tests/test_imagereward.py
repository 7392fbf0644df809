"""ImageReward: the official file into transformers' BLIP, the formula on plain modules, the cut at 35 tokens, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_scorers import bert_tokenizer, blip_parts, head_state, image, imagereward_state, sample

from mmalign.attribution.protocol import ActivationScorer, PixelScorer
from mmalign.scorers import imagereward
from mmalign.scorers._affine import fold
from mmalign.types import MmalignError, Value

TEXTS = ["a red cat", "the blue dog says hello"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> imagereward.Config:
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(imagereward_state(), folder / "ImageReward.pt")
    return imagereward.Config(str(folder / "ImageReward.pt"), str(bert_tokenizer(folder / "words")))


def plain_rewards(config: imagereward.Config, x_BCHW: torch.Tensor, texts: list[str]) -> list[float]:
    """The reward by BLIP's modules and the unfolded head, one pair at a time, as the original loops."""
    from transformers import AutoTokenizer

    vision, text = blip_parts()
    words, state, rewards = AutoTokenizer.from_pretrained(config.tokenizer), head_state(64), []
    for x_CHW, sentence in zip(x_BCHW, texts, strict=True):
        tokens = words(sentence, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        with torch.no_grad():
            seen = vision(pixel_values=x_CHW[None]).last_hidden_state
            ones = torch.ones(seen.shape[:2], dtype=torch.long)
            read = text(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen, encoder_attention_mask=ones, is_decoder=False)
        h = read.last_hidden_state[0, 0].double()
        for layer in (0, 2, 4, 6, 7):
            h = state[f"layers.{layer}.weight"].double() @ h + state[f"layers.{layer}.bias"].double()
        rewards.append((float(h) - 0.16717362830052426) / 1.0333394966054072)
    return rewards


def test_the_reward_is_the_papers(config: imagereward.Config) -> None:
    scorer = imagereward.load(config)
    pictures = [image(0), image(1, 40, 67)]
    x_BCHW = torch.cat([scorer.preprocess.image(picture) for picture in pictures])
    expected = plain_rewards(config, x_BCHW, TEXTS)
    scores = scorer.score([sample(i, text, picture) for i, (text, picture) in enumerate(zip(TEXTS, pictures, strict=True))])
    assert [score.x for score in scores if isinstance(score, Value)] == pytest.approx(expected, abs=1e-5)
    other_text, other_image = plain_rewards(config, x_BCHW, TEXTS[::-1]), plain_rewards(config, x_BCHW.flip(0), TEXTS)
    assert abs(other_text[0] - expected[0]) > 1e-3, "the text must matter, or half of the network goes untested"
    assert abs(other_image[0] - expected[0]) > 1e-3, "and so must the image"


def test_text_is_cut_at_35_tokens_and_the_row_says_so(config: imagereward.Config) -> None:
    scorer = imagereward.load(config)
    long = "the red cat on the mat " * 8
    (score,) = scorer.score([sample(0, long, image(0))])
    assert isinstance(score, Value) and score.detail == "text cut: 50 tokens, the first 35 read"
    assert score.x == pytest.approx(plain_rewards(config, scorer.preprocess.image(image(0)), [long])[0], abs=1e-5)


def test_pixels_score_as_the_image_does_and_have_gradients(config: imagereward.Config) -> None:
    scorer = imagereward.load(config)
    assert isinstance(scorer, PixelScorer) and isinstance(scorer, ActivationScorer)
    pixels = torch.from_numpy(image(2, 32, 32)).permute(2, 0, 1)[None].float().div(255).requires_grad_()
    score = scorer.score_pixels(pixels, TEXTS[:1])
    (value,) = scorer.score([sample(0, TEXTS[0], image(2, 32, 32))])
    assert isinstance(value, Value) and score.item() == pytest.approx(value.x, abs=1e-5)
    (gradient,) = torch.autograd.grad(score.sum(), pixels)
    step = 0.5 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (scorer.score_pixels(pixels + sign * 0.02 * step, TEXTS[:1]) for sign in (1, -1))
    assert float(ahead - behind) / 0.04 == pytest.approx(float((gradient * step).sum()), rel=0.02)
    assert scorer.patch_activations(pixels).shape == (1, 128, 4, 4)


@pytest.mark.parametrize("prefix", ["blip.visual_encoder.", "blip.text_encoder.", "mlp."])
def test_a_file_without_a_part_is_refused(config: imagereward.Config, tmp_path: Path, prefix: str) -> None:
    state = {key: tensor for key, tensor in imagereward_state().items() if not key.startswith(prefix)}
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(MmalignError, match=prefix.replace(".", r"\.")):
        imagereward.load(imagereward.Config(str(tmp_path / "part.pt"), config.tokenizer))


@pytest.mark.parametrize("change", ["width", "missing", "chain"])
def test_a_head_that_does_not_fit_is_refused(change: str) -> None:
    state = head_state(16)
    if change == "missing":
        del state["layers.4.bias"]
    elif change == "chain":
        state["layers.4.weight"] = torch.zeros(10, 11)
    with pytest.raises(MmalignError, match="head"):
        fold(state, 8 if change == "width" else 16, "head.pth")
