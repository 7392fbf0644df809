"""CLIP-type scorers: values equal to the published formulas on plain modules, official layouts, cut texts, pixels with gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_geneval import make_clip
from helpers.tiny_scorers import head_state, image, open_clip_state, sample
from PIL import Image

from mmalign.attribution.protocol import ActivationScorer, FeatureScorer, GatedScorer, PixelScorer
from mmalign.images import CLIP_MEAN, CLIP_STD
from mmalign.scorers import aesthetic, clipscore, hpsv2, pickscore
from mmalign.types import MmalignError, Value

TEXTS = ["a red cat on the mat", "two blue dogs, one large!"]
PICTURES = [image(0), image(1, 40, 67)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def hps_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": open_clip_state(), "epoch": 1}, path)
    return path


def plain_cosines(folder: Path) -> tuple[list[float], float]:
    """Cosines and the logit scale, by transformers' own processor and model."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    model, words = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor([Image.fromarray(picture) for picture in PICTURES], return_tensors="pt").pixel_values
    with torch.no_grad():
        out = model(pixel_values=pixels, **words(TEXTS, padding=True, return_tensors="pt"))
    image_BD, text_BD = out.image_embeds.double().numpy(), out.text_embeds.double().numpy()
    cosines = [float(i @ t / np.linalg.norm(i) / np.linalg.norm(t)) for i, t in zip(image_BD, text_BD, strict=True)]
    return cosines, float(np.exp(model.logit_scale.item()))


def scores_of(scorer, pictures=PICTURES, texts=TEXTS) -> list[float]:
    found = scorer.score([sample(i, text, picture) for i, (text, picture) in enumerate(zip(texts, pictures, strict=True))])
    assert all(isinstance(score, Value) for score in found), found
    return [score.x for score in found]


def test_clipscore_in_its_three_conventions(folder: Path) -> None:
    cosines, _ = plain_cosines(folder)
    assert max(cosines) > 0 > min(cosines), "one positive and one negative, or clamping goes untested"
    expected = {
        "cosine": cosines,
        "percent": [max(100 * cosine, 0) for cosine in cosines],
        "paper": [2.5 * max(cosine, 0) for cosine in cosines],
    }
    for convention, values in expected.items():
        scorer = clipscore.load(clipscore.Config(str(folder), convention))
        assert scores_of(scorer) == pytest.approx(values, abs=2e-5 if convention == "percent" else 1e-6)


def test_pickscore_is_the_scaled_cosine(folder: Path) -> None:
    cosines, scale = plain_cosines(folder)
    config = pickscore.Config(str(folder), str(folder))
    assert scores_of(pickscore.load(config)) == pytest.approx([scale * cosine for cosine in cosines], abs=1e-5)
    divided = pickscore.load(pickscore.Config(str(folder), str(folder), scale="flow-grpo"))
    assert scores_of(divided) == pytest.approx([scale * cosine / 26 for cosine in cosines], abs=1e-6)
    assert divided.range[1] == pytest.approx(scale / 26) and divided.fingerprint != pickscore.load(config).fingerprint


def test_aesthetic_is_the_head_on_the_unit_feature(folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    state = head_state(8)
    torch.save(state, tmp_path / "head.pth")
    chain = torch.nn.Sequential()
    for layer in (0, 2, 4, 6, 7):
        weight, bias = state[f"layers.{layer}.weight"], state[f"layers.{layer}.bias"]
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        chain.extend([linear, torch.nn.Dropout(0.2)])
    scorer = aesthetic.load(aesthetic.Config(str(folder), str(tmp_path / "head.pth")))
    pixels = torch.cat([scorer.clip.preprocess.image(picture) for picture in PICTURES])
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folder).eval().get_image_features(pixel_values=pixels).pooler_output
        expected = chain.eval()(features / features.norm(dim=-1, keepdim=True))[:, 0]
    assert scores_of(scorer) == pytest.approx(expected.tolist(), abs=1e-5)


def open_clip_features(state: dict, x_BCHW: torch.Tensor, ids_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """open_clip's two towers written out from its tensors: pre-norm blocks, plain GELU, class token, end-of-text pooling."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def blocks(x_BND: torch.Tensor, prefix: str, mask: torch.Tensor | None) -> torch.Tensor:
        for layer in range(2):
            name = f"{prefix}transformer.resblocks.{layer}"
            attended, _ = F.multi_head_attention_forward(
                *([norm(x_BND, f"{name}.ln_1").transpose(0, 1)] * 3),
                x_BND.shape[-1],
                x_BND.shape[-1] // 64,
                state[f"{name}.attn.in_proj_weight"],
                state[f"{name}.attn.in_proj_bias"],
                None,
                None,
                False,
                0.0,
                state[f"{name}.attn.out_proj.weight"],
                state[f"{name}.attn.out_proj.bias"],
                attn_mask=mask,
            )
            x_BND = x_BND + attended.transpose(0, 1)
            hidden = F.gelu(F.linear(norm(x_BND, f"{name}.ln_2"), state[f"{name}.mlp.c_fc.weight"], state[f"{name}.mlp.c_fc.bias"]))
            x_BND = x_BND + F.linear(hidden, state[f"{name}.mlp.c_proj.weight"], state[f"{name}.mlp.c_proj.bias"])
        return x_BND

    patches = F.conv2d(x_BCHW, state["visual.conv1.weight"], stride=8).flatten(2).mT
    tokens = torch.cat([state["visual.class_embedding"].expand(len(patches), 1, -1), patches], 1) + state["visual.positional_embedding"]
    image_BD = norm(blocks(norm(tokens, "visual.ln_pre"), "visual.", None)[:, 0], "visual.ln_post") @ state["visual.proj"]
    length = ids_BL.shape[1]
    causal = torch.full((length, length), float("-inf")).triu(1)
    text = norm(blocks(state["token_embedding.weight"][ids_BL] + state["positional_embedding"][:length], "", causal), "ln_final")
    text_BD = text[torch.arange(len(ids_BL)), ids_BL.argmax(-1)] @ state["text_projection"]
    return F.normalize(image_BD, dim=-1), F.normalize(text_BD, dim=-1)


def test_hpsv2_reads_the_official_layout(folder: Path, hps_file: Path) -> None:
    scorer = hpsv2.load(hpsv2.Config(weights=str(hps_file), tokenizer=str(folder)))
    ids = scorer.clip.tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    floats = [torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255 for picture in PICTURES]
    square = F.interpolate(floats[0], (32, 32), mode="bicubic", antialias=True)
    wide = F.pad(F.interpolate(floats[1], (19, 32), mode="bicubic", antialias=True), (0, 0, 6, 7))
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    image_BD, text_BD = open_clip_features(open_clip_state(), (torch.cat([square, wide]) - mean) / std, ids)
    torch.testing.assert_close(scorer.text_features(TEXTS), text_BD, atol=1e-5, rtol=0)
    assert scores_of(scorer) == pytest.approx((image_BD * text_BD).sum(-1).tolist(), abs=1e-5)


def test_open_clip_itself_gives_the_same_features(folder: Path, tmp_path: Path) -> None:
    open_clip = pytest.importorskip(
        "open_clip", reason="the extra 'open_clip' carries the reference (it brings torchvision): mmalign[open_clip]"
    )
    vision = open_clip.CLIPVisionCfg(layers=2, width=128, head_width=64, patch_size=8, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=77, vocab_size=514, width=128, heads=2, layers=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(24, vision, text).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "open.pt")
    scorer = hpsv2.load(hpsv2.Config(weights=str(tmp_path / "open.pt"), tokenizer=str(folder)))
    ids = scorer.clip.tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model.encode_image(scorer.clip.preprocess.tensor(pixels), normalize=True), model.encode_text(ids, normalize=True)
    torch.testing.assert_close(scorer.clip.encode_pixels(pixels), expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(scorer.text_features(TEXTS), expected[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_a_checkpoint_that_is_not_whole_is_refused(folder: Path, tmp_path: Path, change: str) -> None:
    state = open_clip_state()
    if change == "missing":
        del state["visual.ln_post.bias"]
    elif change == "surplus":
        state["visual.head.weight"] = torch.zeros(3)
    else:
        state["ln_final.weight"] = torch.zeros(7)
    torch.save({"state_dict": state}, tmp_path / "bad.pt")
    named = {"missing": "post_layernorm.bias", "surplus": "visual.head.weight", "shape": "another shape"}[change]
    with pytest.raises(MmalignError, match=named):
        hpsv2.load(hpsv2.Config(weights=str(tmp_path / "bad.pt"), tokenizer=str(folder)))


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_code_in_a_weight_file_is_not_run(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    torch.save({"state_dict": Payload(target)}, tmp_path / "evil.pt")
    with pytest.raises(MmalignError, match="cannot be read"):
        hpsv2.load(hpsv2.Config(weights=str(tmp_path / "evil.pt"), tokenizer=str(folder)))
    assert not target.exists()


def test_weights_that_are_nowhere_are_named_with_the_option(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MmalignError, match=r"hpsv2\.weights"):
        hpsv2.load(hpsv2.Config(weights=str(tmp_path / "absent.pt"), tokenizer=str(folder)))
    with pytest.raises(MmalignError, match=r"clipscore\.model"):
        clipscore.load(clipscore.Config(str(tmp_path / "absent")))


def test_a_long_prompt_is_cut_as_clip_does_and_says_so(folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    text = "red cats and blue dogs " * 12
    scorer = clipscore.load(clipscore.Config(str(folder)))
    (score,) = scorer.score([sample(0, text, PICTURES[0])])
    words = AutoTokenizer.from_pretrained(folder)
    ids = words(text, verbose=False).input_ids
    cut = torch.tensor([[*ids[:76], ids[-1]]])
    with torch.no_grad():
        expected = F.normalize(CLIPModel.from_pretrained(folder).eval().get_text_features(input_ids=cut).pooler_output, dim=-1)
    torch.testing.assert_close(scorer.text_features([text]), expected, atol=1e-5, rtol=0)
    assert score.detail == f"text cut: {len(ids)} tokens, the first 77 read"
    (short,) = scorer.score([sample(0, TEXTS[0], PICTURES[0])])
    assert short.detail == ""


@pytest.fixture(scope="module")
def scorers(folder: Path, hps_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    head = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save(head_state(8), head)
    return {
        "clipscore": clipscore.load(clipscore.Config(str(folder))),
        "pickscore": pickscore.load(pickscore.Config(str(folder), str(folder))),
        "hpsv2": hpsv2.load(hpsv2.Config(weights=str(hps_file), tokenizer=str(folder))),
        "aesthetic": aesthetic.load(aesthetic.Config(str(folder), str(head))),
    }


NAMES = ("clipscore", "pickscore", "hpsv2", "aesthetic")


@pytest.mark.parametrize("name", NAMES)
def test_pixels_score_as_the_image_does_and_have_gradients(scorers: dict, name: str) -> None:
    scorer = scorers[name]
    pictures = [image(0, 32, 32), image(1, 32, 32)]
    pixels = torch.stack([torch.from_numpy(picture) for picture in pictures]).permute(0, 3, 1, 2).float().div(255).requires_grad_()
    scores = scorer.score_pixels(pixels, TEXTS)
    assert scores.tolist() == pytest.approx(scores_of(scorer, pictures), abs=1e-5)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    step = 0.5 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (scorer.score_pixels(pixels + 0.02 * step, TEXTS) - scorer.score_pixels(pixels - 0.02 * step, TEXTS)).sum() / 0.04
    assert float(slope) == pytest.approx(float((gradient * step).sum()), rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_what_attribution_asks_of_a_scorer(scorers: dict, name: str) -> None:
    scorer = scorers[name]
    assert isinstance(scorer, PixelScorer) and isinstance(scorer, GatedScorer) and isinstance(scorer, ActivationScorer)
    assert isinstance(scorer, FeatureScorer) == (name != "aesthetic"), "aesthetic has no text feature to be a product with"
    pixels = torch.stack([torch.from_numpy(image(i)) for i in range(2)]).permute(0, 3, 1, 2).float() / 255
    index = torch.tensor([1, 0, 1])
    gates = torch.ones(3, 16, dtype=torch.bool)
    with torch.no_grad():
        whole = scorer.score_pixels(pixels, TEXTS)
        torch.testing.assert_close(scorer.score_patches(pixels, TEXTS, gates, index), whole[index], atol=1e-5, rtol=1e-5)
        gates[:, ::2] = False
        assert not torch.allclose(scorer.score_patches(pixels, TEXTS, gates, index), whole[index], atol=1e-5)
        activations = scorer.patch_activations(pixels)
    seen = []
    hook = scorer.patch_embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
    scorer.score_pixels(pixels, TEXTS)
    hook.remove()
    assert scorer.patch_grid() == tuple(activations.shape[-2:]) == (4, 4)
    torch.testing.assert_close(seen[0], activations)


def test_a_thousand_masked_images_cost_one_text_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = clipscore.load(clipscore.Config(str(folder)))
    calls = []
    encode = scorer.clip.model.get_text_features

    def counted(input_ids: torch.Tensor):
        calls.append(len(input_ids))
        return encode(input_ids=input_ids)

    monkeypatch.setattr(scorer.clip.model, "get_text_features", counted)
    for _ in range(5):
        scorer.score_pixels(torch.rand(4, 3, 32, 32), [TEXTS[0]] * 4)
    scorer.score_pixels(torch.rand(2, 3, 32, 32), TEXTS)
    assert calls == [1, 1]


def test_the_processor_file_decides_the_preprocessing(folder: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import CLIPImageProcessorPil

    own = shutil.copytree(folder, tmp_path / "own")
    crop = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(own)
    changed = clipscore.load(clipscore.Config(str(own)))
    assert changed.clip.preprocess.mean == (0.5, 0.5, 0.5)
    assert changed.fingerprint != clipscore.load(clipscore.Config(str(folder))).fingerprint
    CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=crop).save_pretrained(own)
    with pytest.raises(MmalignError, match="short side to 32"):
        clipscore.load(clipscore.Config(str(own)))
