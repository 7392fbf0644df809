"""BAGEL against the official implementation: guided sampling with renorm, decoded pixels, a greedy answer and its logits."""

import json
import os
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file

from mmalign.models import _diffusion
from mmalign.models._bagel import Bagel, Guidance, GuidedPolicy
from mmalign.models._bagel_serve import _read_config, read_network
from mmalign.models._bagel_text import Fitting
from mmalign.models.layers.kl import kl_autoencoder

SHARED = os.environ.get("MMALIGN_SHARED")
pytestmark = pytest.mark.skipif(not SHARED, reason="$MMALIGN_SHARED, the folder with goldens/bagel_fixture.pt, is not set")


class Turns:
    """The fixture's ids in place of a tokenizer: a text is a list of ids."""

    def __init__(self, ids, patch):
        self.bos, self.eos, self.start, self.end = (ids[name] for name in ("bos", "eos", "start_of_image", "end_of_image"))
        self.pad, self.patch = 0, patch

    def row(self, text, limit=None):
        return list(text)

    def question(self, text, patches):
        return [self.start, *[self.patch] * patches, self.end, *text, self.bos]

    def decode(self, ids):
        return ""


@pytest.fixture(scope="module")
def golden():
    return torch.load(Path(str(SHARED)) / "goldens" / "bagel_fixture.pt", weights_only=True)


@pytest.fixture(scope="module")
def bagel(golden, tmp_path_factory):
    """The fixture's weights as a checkpoint on disk, read as any other."""
    folder, config = tmp_path_factory.mktemp("bagel"), golden["config"]
    (folder / "llm_config.json").write_text(json.dumps(config["llm"]))
    vision = {**config["vit"], "num_hidden_layers": config["vit"]["num_hidden_layers"] + 1}
    (folder / "vit_config.json").write_text(json.dumps(vision))
    save_file(golden["sd"], folder / "ema.safetensors")
    net = read_network(folder, *(_read_config(folder / name) for name in ("llm_config.json", "vit_config.json")), "float32").eval()
    vae = kl_autoencoder(golden["vae"], "the fixture", projects=False)
    text, sample = Turns(config["ids"], config["llm"]["vocab_size"]), golden["sample"]
    rule = Guidance(sample["cfg_lo"], sample["cfg_hi"], sample["renorm_min"])
    with torch.no_grad():
        yield Bagel(net, text, vae, Fitting(), tokens=len(golden["prompt"]) + 3, rule=rule)


def close(found, reference, bound=1e-5):
    assert found.shape == reference.shape
    difference = float((found - reference).abs().max())
    assert difference <= bound * max(1.0, float(reference.abs().max()))


def unpacked(tokens, sample, stride=16, p=2):
    return rearrange(tokens, "(h w) (p q c) -> 1 c (h p) (w q)", h=sample["image_h"] // stride, p=p, q=p)


def test_golden_guided_sampler_run(bagel, golden, monkeypatch):
    sample = golden["sample"]
    start, latents = unpacked(golden["noise"], sample), unpacked(golden["latent"], sample)
    monkeypatch.setattr(_diffusion, "normals", lambda sources, *shape: start.expand(len(sources), *shape).clone())
    prompts = bagel.encode_prompts([golden["prompt"].tolist()], negative=[])
    policy = GuidedPolicy(sample["guidance"], levels=(0.0,) * sample["steps"], rule=bagel.rule)
    found = bagel.draw(prompts, policy, [0], (sample["image_h"], sample["image_w"]))
    close(found, latents)
    plain = bagel.draw(prompts, GuidedPolicy(1.0, levels=policy.levels), [0], (sample["image_h"], sample["image_w"]))
    assert (plain - latents).abs().max() > 0.01


def test_golden_pixels(bagel, golden):
    latents = unpacked(golden["latent"], golden["sample"])
    found = bagel.vae.decode(latents / 0.3611 + 0.1159) * 2 - 1
    close(found, golden["img"])
    assert (bagel.decode(latents) - ((golden["img"] + 1) / 2).clamp(0, 1)).abs().max() <= 1e-5 * max(1.0, float(golden["img"].abs().max()))


def test_golden_answer_and_its_logits(bagel, golden):
    picture, question = (golden["x"] + 1) / 2, golden["und_prompt"].tolist()
    number = golden["text"]["max_new_tokens"]
    written = bagel.generate_text([question], [picture], [0], temperature=0.0, max_tokens=number)
    answer = golden["txt"][:, 0].tolist()  # begins with the token that opens the turn
    assert answer[0] == bagel.chat.bos and written.ids[0, : number - 1].tolist() == answer[1:]
    (row,), pictures = bagel.questions([question], [picture])
    tail = torch.tensor([answer[1:]])
    hidden = bagel.states(torch.tensor([row]), torch.ones(1, len(row) + number - 1, dtype=torch.bool), pictures, tail)
    logits = bagel.net.lm_head(hidden[0, len(row) - 1 :])
    close(logits, golden["txt_logits"])
    expected = golden["txt_logits"].log_softmax(-1)[:-1].gather(-1, tail[0][:, None])[:, 0]
    close(written.log_prob[0, : number - 1], expected)
    whole = torch.ones_like(tail, dtype=torch.bool)
    close(bagel.text_tokens_log_prob([question], [picture], tail, whole)[0], expected)
