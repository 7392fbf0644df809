"""Harmon against the official implementation: every tensor of the golden fixture, read from the official layouts on disk."""

import json

import pytest
import torch
from helpers.masked_goldens import difference, fixture, needs_goldens
from helpers.tiny_harmon import qwen_tokenizer

from mmalign.models import _harmon_layout
from mmalign.models._harmon import Harmon
from mmalign.models._harmon_draw import Condition, cosine, denoise
from mmalign.models._harmon_text import HarmonText
from mmalign.models.layers import token_diffusion
from mmalign.models.layers.mar import Seen
from mmalign.models.layers.token_diffusion import Schedule
from mmalign.trajectory import Policy, Prompts

pytestmark = needs_goldens


class OfficialNoise:
    """The original's numbers: orders from NumPy's global generator, half a batch from torch's at the start, a whole batch at each step."""

    def __init__(self, seed, samples):
        import numpy as np

        self.samples, self.shuffles, self.torch = samples, np.random.RandomState(seed), torch.Generator().manual_seed(seed)

    def order(self, tokens):
        rows = [self.shuffles.permutation(tokens).tolist() for _ in range(2 * self.samples)]
        return torch.tensor(rows[: self.samples])

    def start(self, count, channels):
        return torch.randn(self.samples * count, channels, generator=self.torch).view(self.samples, count, channels)

    def step(self, count, channels):
        whole = torch.randn(2 * self.samples * count, channels, generator=self.torch)
        return whole[: self.samples * count].view(self.samples, count, channels)


@pytest.fixture(scope="module")
def golden():
    return fixture("harmon")


def write(golden, folder):
    config = golden["config"]
    qwen_tokenizer().save_pretrained(folder)
    llm = {**config["llm"], "model_type": "qwen2"}
    (folder / "config.json").write_text(json.dumps({"model_type": "harmon", "llm": llm, "mar": config["mar"]}))
    return folder


@pytest.fixture(scope="module", params=["hugging face", "original"])
def harmon(request, golden, tmp_path_factory):
    folder = write(golden, tmp_path_factory.mktemp("harmon"))
    if request.param == "hugging face":
        torch.save(golden["sd"], folder / "pytorch_model.bin")
        found = _harmon_layout.find(folder, {})
    else:
        config = golden["config"]
        (folder / "config.json").unlink()
        (folder / "qwen2.5").mkdir()
        (folder / "qwen2.5" / "config.json").write_text(json.dumps({**config["llm"], "model_type": "qwen2"}))
        coder = {name.removeprefix("vae."): value for name, value in golden["sd"].items() if name.startswith("vae.")}
        torch.save({"model": coder}, folder / "kl16.ckpt")
        rest = {name: value for name, value in golden["sd"].items() if not name.startswith("vae.")}
        torch.save(rest, folder / "harmon_0.5b.pth")
        _harmon_layout.HEADS_OF_WIDTH[config["mar"]["encoder_embed_dim"]] = config["mar"]["encoder_num_heads"]
        found = _harmon_layout.find(folder, {})
    net, vae = _harmon_layout.build(found, folder, "float32")
    side = golden["config"]["mar"]["img_size"]
    steps = golden["config"]["mar"]["num_sampling_steps"]
    with torch.no_grad():
        yield Harmon(net.eval(), HarmonText(folder), vae, golden["config"]["vae"]["scale"], (side, side), steps)
    _harmon_layout.HEADS_OF_WIDTH.pop(golden["config"]["mar"]["encoder_embed_dim"], None)


@pytest.fixture(scope="module")
def latents(golden):
    return golden["lat"].flatten(1, 2)


def grid_of(golden):
    return tuple(golden["lat"].shape[1:3])


def test_golden_latents_of_pictures(golden, harmon, latents):
    difference(harmon.encode_image((golden["x"] + 1) / 2), latents)


def test_golden_pixels_of_latents(golden, harmon, latents):
    difference(harmon.vae.decode(golden["lat"].permute(0, 3, 1, 2) / harmon.scale) * 2 - 1, golden["rec"])
    assert torch.equal(harmon.decode(latents), ((golden["rec"] + 1) / 2).clamp(0, 1)) or harmon.decode(latents).max() <= 1


def test_golden_encoder_and_what_the_language_model_reads(golden, harmon, latents):
    seen = Seen.where(torch.ones(latents.shape[:2], dtype=torch.bool), grid_of(golden))
    difference(harmon.mar("encode", latents, seen), golden["xe"])
    difference(harmon._reading((golden["x"] + 1) / 2), golden["ze"])


def test_golden_refinement_and_decoder(golden, harmon, latents):
    seen = Seen.where(golden["mask"] == 0, grid_of(golden))
    encoded = harmon.mar("encode", latents, seen)
    difference(harmon._refined(golden["ids"], golden["att"], encoded, seen), golden["full"])
    difference(harmon.mar("decode", golden["full"], seen), golden["z"])
    difference(harmon._conditions(golden["ids"], golden["att"], latents, golden["mask"] == 1, grid_of(golden)), golden["z"])


def test_golden_refinement_with_padding_on_the_other_side(golden, harmon, latents):
    ids, mask = torch.zeros_like(golden["ids"]), torch.zeros_like(golden["att"])
    for row, real in enumerate(golden["att"]):
        ids[row, len(real) - int(real.sum()) :] = golden["ids"][row, real]
        mask[row, len(real) - int(real.sum()) :] = True
    difference(harmon._conditions(ids, mask, latents, golden["mask"] == 1, grid_of(golden)), golden["z"])


def test_golden_rows_that_see_different_numbers_of_tokens_are_alone_what_they_are_together(golden, harmon, latents):
    hidden = golden["mask"] == 1
    hidden[0] = torch.arange(hidden.shape[1]) > 2
    together = harmon._conditions(golden["ids"], golden["att"], latents, hidden, grid_of(golden))
    difference(together[1], golden["z"][1])
    alone = harmon._conditions(golden["ids"][:1], golden["att"][:1], latents[:1], hidden[:1], grid_of(golden))
    difference(together[:1], alone)


def test_golden_denoiser(golden, harmon):
    difference(harmon.mar.diffloss["net"](golden["xx"], golden["t"], golden["zz"]), golden["eps"])


def test_golden_loss(golden, harmon):
    loss = golden["loss"]
    each = token_diffusion.loss(harmon.mar.diffloss["net"], Schedule(), loss["target"], golden["zz"], loss["t"], loss["noise"])
    difference((each * loss["mask"]).sum() / loss["mask"].sum(), loss["out"])


def test_golden_guided_denoising(golden, harmon):
    cond, uncond = golden["zz"].chunk(2)
    noise = OfficialNoise(golden["sample"]["seed"], 1)
    shape, levels = (1, len(cond), golden["s"].shape[-1]), [golden["sample"]["temperature"]] * harmon.inner_steps
    condition = Condition(cond, uncond, golden["sample"]["guidance"])
    states, log_prob = denoise(harmon.mar.diffloss["net"], Schedule(harmon.inner_steps), condition, noise, shape, levels)
    difference(states[0, :, -1], golden["s"][: len(cond)])
    assert states.shape[2] == harmon.inner_steps + 1 and log_prob.isfinite().all()


def test_golden_sampler(golden, harmon):
    """From prompt rows to pixels with the original's random numbers; the fixture's own tolerance is ten times wider."""
    settings = golden["sample"]
    ids, mask = golden["ids"], golden["att"]
    prompts = Prompts(("",), ids[:1], mask[:1], ids[1:], mask[1:])
    policy = harmon.completed(Policy(settings["guidance"], settings["temperature"], hidden=cosine(settings["num_iter"])))
    step_of, states, _ = harmon.draw(prompts, policy, OfficialNoise(settings["seed"], 1), grid_of(golden))
    assert step_of.max() == settings["num_iter"] - 1
    z = (states[:, :, -1] / harmon.scale).mT.unflatten(2, grid_of(golden))
    difference(harmon.vae.decode(z) * 2 - 1, golden["img"])
