"""X-Omni against the official implementation: every tensor of the golden fixture, and one whole guided, min-p sampler run."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from mmalign.models import _causal_codes
from mmalign.models._xomni import GRID, CutPolicy, XOmni
from mmalign.models._xomni_flux import SemanticFlux, read_transformer
from mmalign.models._xomni_net import XOmniCachedTrunk
from mmalign.models._xomni_serve import read_network
from mmalign.models._xomni_text import Fitting
from mmalign.models.layers.cached import Cache
from mmalign.models.layers.siglip_vq import read_siglip_tokenizer
from mmalign.trajectory import Prompts, Trajectory

SHARED = os.environ.get("MMALIGN_SHARED")
pytestmark = pytest.mark.skipif(not SHARED, reason="$MMALIGN_SHARED, the folder with goldens/xomni_fixture.pt, is not set")


@pytest.fixture(scope="module")
def golden():
    return torch.load(Path(str(SHARED)) / "goldens" / "xomni_fixture.pt", weights_only=True)


@pytest.fixture(scope="module")
def xomni(golden, tmp_path_factory):
    """The fixture's weights as a checkpoint on disk, read as any other."""
    folder, config = tmp_path_factory.mktemp("xomni"), golden["config"]
    save_file(golden["sd"], folder / "model.safetensors")
    for name in ("vit", "vq"):
        torch.save(golden[name], folder / f"{name}.pt")
    layers = {name: config[name] for name in ("num_mm_adap_layers", "num_mm_head_layers", "mm_vocab_size")}
    net = read_network(folder, {**config["lm"], **layers}, "float32").eval()
    vq = read_siglip_tokenizer(folder / "vit.pt", folder / "vq.pt", config["vit"]["num_heads"], torch.float32)
    with torch.no_grad():
        yield XOmni(net, SimpleNamespace(pad=0), vq, Fitting(long_size=config["vit"]["img_size"]), None)


def close(found, reference):
    """The fixture's tolerance: 1e-5 times the largest reference value, or 1."""
    assert found.shape == reference.shape
    assert (found - reference).abs().max() <= 1e-5 * max(1.0, float(reference.abs().max()))


def test_golden_logits_of_both_vocabularies(xomni, golden):
    ids, text = golden["ids"], golden["config"]["lm"]["vocab_size"]
    hidden = xomni.trunk(ids, torch.ones_like(ids, dtype=torch.bool))
    codes = golden["config"]["image_vocab_size"]
    close(xomni.net.mm_head(hidden)[..., :codes], golden["li"][..., text : text + codes])
    close(xomni.net.lm_head(hidden), golden["lt"][..., :text])


@pytest.mark.parametrize("padding", [0, 3])
def test_golden_logits_of_each_token_after_a_cached_prompt(xomni, golden, padding):
    """Each token in turn, code or word, goes through the cache behind those before it; padding in front changes nothing."""
    start, codes = golden["config"]["lm"]["vocab_size"], golden["config"]["image_vocab_size"]
    for row, whole in enumerate(golden["ids"]):
        for at in range(1, len(whole)):
            ids = torch.nn.functional.pad(whole[None, :at], (padding, 0))
            trunk = XOmniCachedTrunk(xomni.trunk, 1, writes_codes=bool(whole[at] >= start))
            prefix = trunk.read(ids, torch.arange(ids.shape[1])[None] >= padding)
            cache = Cache(prefix, 1, 1, block=1)
            states = cache.begin(prefix, torch.zeros(1, dtype=torch.long)), trunk.step(xomni.trunk.embed(whole[None, at]), cache)
            for position, hidden in zip((at - 1, at), states, strict=True):
                close(xomni.net.mm_head(hidden)[0, :codes], golden["li"][row, position, start : start + codes])
                close(xomni.net.lm_head(hidden)[0], golden["lt"][row, position, :start])


def test_golden_sampler_run(xomni, golden, monkeypatch):
    """Guided and truncated by min-p, with the original's random numbers: one multinomial over both vocabularies for each token."""
    settings, config = golden["sample"], golden["config"]
    start, ids = config["lm"]["vocab_size"], golden["ids"][:1, : golden["sample"]["prompt_len"]]
    torch.manual_seed(settings["seed"])

    def multinomial(log_prob_BV, _):
        joint = torch.zeros(len(log_prob_BV), start + config["mm_vocab_size"])
        joint[:, start : start + config["image_vocab_size"]] = log_prob_BV.exp()
        return torch.multinomial(joint[:1], 1)[:, 0].expand(len(joint)) - start

    monkeypatch.setattr(_causal_codes, "draw", multinomial)
    blank, number = ids[:, settings["negative_from"] :], settings["max_new_tokens"]
    whole = [torch.ones_like(tensor, dtype=torch.bool) for tensor in (ids, blank)]
    prompts = Prompts(("",), ids, whole[0], blank, whole[1], {GRID: torch.tensor([[1, number]])})
    policy = CutPolicy(settings["guidance"], settings["temperature"], min_p=settings["min_p"])
    drawn = xomni.sample(prompts, policy, [0])
    assert (drawn.actions[0] + start).tolist() == golden["gen"][0, ids.shape[1] :].tolist()
    scored = xomni.log_prob(prompts, Trajectory("ar", drawn.actions, drawn.log_prob, policy, (0,)))
    assert (scored - drawn.log_prob).abs().max() < 1e-5


def test_golden_codes_and_features_of_pictures(xomni, golden):
    features = xomni.vq.vit(golden["x"])
    close(features.flatten(2).mT, golden["f"])
    assert xomni.vq.encode((golden["x"] + 1) / 2).tolist() == golden["tk"].tolist()
    assert xomni.encode_image((golden["x"] + 1) / 2).tolist() == golden["tk"].flatten(1).tolist()
    close(xomni.vq.projector.features_of(golden["tk"]), golden["z"])


def test_golden_decoder_with_semantic_features(golden, tmp_path):
    data, config = golden["flux"], golden["config"]["flux"]
    save_file(data["sd"], tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    layout = SemanticFlux(SimpleNamespace(transformer=read_transformer(tmp_path).eval()))
    layout.features = data["siglip_tensor"]
    inputs = {name: value for name, value in data.items() if name not in ("sd", "out", "siglip_tensor")}
    with torch.no_grad():
        close(layout.net(**inputs, return_dict=False)[0], data["out"])
        layout.features = None
        assert not torch.allclose(layout.net(**inputs, return_dict=False)[0], data["out"], atol=1e-2)
