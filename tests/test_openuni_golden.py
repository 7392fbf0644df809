"""OpenUni against the official implementation: every tensor of the golden fixture, read from the official layout on disk."""

import json

import pytest
import torch
from helpers.masked_goldens import difference, fixture, needs_goldens
from helpers.tiny_harmon import qwen_tokenizer
from safetensors.torch import save_file

from mmalign.models import _openuni_layout
from mmalign.models._diffusion import UNCOND
from mmalign.models._openuni import OpenUni, OpenUniText, Sana
from mmalign.trajectory import Prompts

pytestmark = needs_goldens


@pytest.fixture(scope="module")
def golden():
    return fixture("openuni")


def below(golden, part):
    return {name.removeprefix(f"{part}."): value for name, value in golden["sd"].items() if name.startswith(f"{part}.")}


@pytest.fixture(scope="module", params=["overlay alone", "overlay with all"])
def openuni(request, golden, tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("openuni"), golden["config"]
    for name in ("internvl3", "sana/transformer", "sana/scheduler", "dc-ae"):
        (folder / name).mkdir(parents=True)
    qwen_tokenizer(("<img>", "</img>", "<IMG_CONTEXT>")).save_pretrained(folder / "internvl3")
    vision = config["vision"]
    content = {"model_type": "internvl_chat", "vision_config": vision, "llm_config": config["text"]}
    content |= {name: vision[name] for name in ("downsample_ratio", "select_layer", "ps_version")}
    (folder / "internvl3" / "config.json").write_text(json.dumps(content))
    (folder / "sana" / "transformer" / "config.json").write_text(
        json.dumps({"_class_name": "SanaTransformer2DModel", **config["transformer"]})
    )
    (folder / "sana" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config["test_scheduler"]))
    (folder / "dc-ae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderDC", **config["vae"]}))
    save_file(below(golden, "lmm"), folder / "internvl3" / "model.safetensors")
    save_file(below(golden, "transformer"), folder / "sana" / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(below(golden, "vae"), folder / "dc-ae" / "diffusion_pytorch_model.safetensors")
    is_whole = request.param == "overlay with all"
    overlay = {name: value for name, value in golden["sd"].items() if is_whole or name.split(".")[0] not in ("lmm", "vae")}
    torch.save({"state_dict": overlay}, folder / "openuni.pth")
    found = _openuni_layout.find(folder, {})
    found.options["connector"] = config["connector"]
    net, vae = _openuni_layout.build(found, folder, "float32")
    layout = Sana(net.eval(), vae.eval(), config["test_scheduler"])
    with torch.no_grad():
        yield OpenUni(net, OpenUniText(folder / "internvl3", 1), layout, config["train_shift"])


def test_golden_vision_features(golden, openuni):
    from mmalign.models._openuni import IMAGENET

    mean, deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    difference(openuni.image_features(golden["x"] * deviation + mean), golden["vit"])


def test_golden_query_states_connector_and_condition(golden, openuni):
    difference(openuni.query_states(golden["ids"], golden["att"]), golden["h"])
    difference(openuni.net.connector(inputs_embeds=golden["h"]).last_hidden_state, golden["conn"])
    difference(openuni.condition(golden["ids"], golden["att"]), golden["cond"])


def test_golden_condition_with_padding_on_the_other_side(golden, openuni):
    ids, mask = torch.zeros_like(golden["ids"]), torch.zeros_like(golden["att"])
    for row, real in enumerate(golden["att"]):
        ids[row, len(real) - int(real.sum()) :] = golden["ids"][row, real]
        mask[row, len(real) - int(real.sum()) :] = True
    difference(openuni.condition(ids, mask), golden["cond"])


def test_golden_velocity(golden, openuni):
    difference(openuni.layout.predict(golden["lat"], golden["tstep"] / 1000, {"prompt": golden["cond"]}, 1.0), golden["v"])


def test_golden_loss(golden, openuni):
    sigma = golden["loss"]["t"] / 1000
    at = sigma.view(-1, 1, 1, 1)
    noise = (golden["loss"]["xt"] - (1 - at) * golden["lat"]) / at
    difference(openuni.flow_loss(golden["lat"], noise, sigma, golden["cond"]).mean(), golden["loss"]["out"])


def test_golden_sampler(golden, openuni):
    """From prompt rows and start noise to latents; the fixture's own tolerance is ten times wider."""
    settings, gen = golden["sample"], golden["gen"]
    cond, uncond = golden["cond"].chunk(2)
    none = torch.zeros(1, 0, dtype=torch.long)
    prompts = Prompts(("",), none, none.bool(), none, none.bool(), {"prompt": cond, UNCOND + "prompt": uncond})
    difference(openuni.solve(gen["lat0"], prompts, settings["steps"], settings["guidance"]), gen["latents"])
    times = openuni.layout.times(settings["steps"], (0, 0, 0))
    assert torch.equal((times[:, 0] * 1000).floor(), gen["tsteps"].double()) and times[-1, 1] == 0


def test_golden_pixels(golden, openuni):
    latents = golden["gen"]["latents"]
    made = openuni.layout.vae.decode(latents / openuni.layout.vae.config.scaling_factor, return_dict=False)[0]
    difference(made, golden["gen"]["img"])
    difference(openuni.decode(latents), (golden["gen"]["img"] / 2 + 0.5).clamp(0, 1))
