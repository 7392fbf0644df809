"""Show-o against the official implementation: every tensor of the golden fixture, read from the official layout on disk."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.masked_goldens import ShowoNoise, difference, fixture, needs_goldens

from mmalign.models._showo import Showo
from mmalign.models._showo_serve import read_network
from mmalign.models._showo_text import token_layout
from mmalign.models.layers import masked
from mmalign.models.layers.magvit import read_magvit
from mmalign.trajectory import Policy, Prompts

pytestmark = needs_goldens


@pytest.fixture(scope="module")
def golden():
    return fixture("showo")


@pytest.fixture(scope="module")
def showo(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("showo")
    config = golden["config"]
    for name in ("phi-1_5", "magvitv2"):
        (folder / name).mkdir()
    sizes = {name: value for name, value in config["phi"].items() if name not in ("qk_layernorm", "vocab_size")}
    (folder / "phi-1_5" / "config.json").write_text(json.dumps({**sizes, "model_type": "phi", "vocab_size": 51200}))
    names = ("llm_vocab_size", "codebook_size", "num_vq_tokens", "vocab_size")
    content = {"_class_name": "Showo", **{name: config[name] for name in names}}
    (folder / "config.json").write_text(json.dumps(content))
    torch.save(golden["sd"], folder / "pytorch_model.bin")
    parts = {"encoder": golden["vq"]["E"], "decoder": golden["vq"]["D"], "quantize": golden["vq"]["Q"]}
    tokenizer = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    torch.save(tokenizer, folder / "magvitv2" / "pytorch_model.bin")
    layout = token_layout(content, folder)
    net = read_network(folder, folder / "phi-1_5", "float32").eval()
    text = SimpleNamespace(eos=config["ids"]["eos"])
    model = Showo(net, text, layout, read_magvit(folder / "magvitv2"), config["num_vq_tokens"])
    model.text_slots = config["max_seq_length"] + 1
    model.steps, model.order_noise = golden["sample"]["steps"], golden["sample"]["temperature"]
    with torch.no_grad():
        yield model


@pytest.fixture(scope="module")
def prompts(golden, showo):
    ids, blank = golden["ids"], golden["un"]
    return Prompts(("",) * len(ids), ids, ids != showo.pad_id, blank, blank != showo.pad_id)


def policy_of(golden, showo):
    return showo.completed(Policy(1 + golden["sample"]["guidance"]))


def test_golden_ids(golden, showo):
    ids, layout = golden["config"]["ids"], showo.layout
    assert [layout.pad, layout.soi, layout.eoi, layout.t2i, layout.mmu] == [ids[name] for name in ("pad", "soi", "eoi", "t2i", "mmu")]
    assert (layout.offset, layout.mask) == (ids["code_offset"], ids["mask"])


def test_golden_codes_of_pictures(golden, showo):
    assert torch.equal(showo.encode_image((golden["vq"]["x"] + 1) / 2), golden["vq"]["code"])


def test_golden_pixels_of_codes(golden, showo):
    difference(showo.vq.decode(golden["vq"]["code"], showo.grid) * 2 - 1, golden["vq"]["rec"])


@pytest.mark.parametrize("is_cut", [False, True])
def test_golden_logits_of_rows_to_draw(golden, showo, prompts, is_cut):
    """Also when padding that no real token sees is cut off."""
    rows = showo.to_width(prompts) if is_cut else prompts
    ids, mask = torch.cat([rows.ids, rows.uncond_ids]), torch.cat([rows.mask, rows.uncond_mask])
    assert (ids.shape[1] < golden["ids"].shape[1]) or not is_cut
    reference = golden["logits"][:, -ids.shape[1] :]
    difference(showo.head(showo._hidden(ids, mask))[mask], reference[mask])


def test_golden_logits_of_hidden_tokens_come_from_the_vocabularys_slice(golden, showo, prompts):
    codes = torch.full(golden["out"].shape, masked.HIDDEN)
    slots = torch.tensor([[0, 5, 15], [1, 2, 14]])
    found = showo._logits_at(prompts, Policy(1.0), "cond")(codes, slots)
    image = golden["logits"][:2, -1 - codes.shape[1] : -1, showo.offset : showo.offset + showo.codes]
    difference(found, image.gather(1, slots[..., None].expand(-1, -1, showo.codes)))


def test_golden_sampler_is_token_identical(golden, showo, prompts):
    policy = policy_of(golden, showo)
    plan = masked.make_plan(showo.tokens, policy.hidden, policy.order_noise, showo.fades, showo.holds_last)
    noise = ShowoNoise(golden["sample"]["seed"], showo.tokens)
    drawn = masked.decode(showo._logits_at(prompts, policy, "guided"), len(prompts), plan, noise, 1.0, showo.device)
    assert torch.equal(drawn.codes, golden["out"])
    assert drawn.step_of.max() == len(plan) - 1 and [int((drawn.step_of >= step).sum(1).max()) for step in range(len(plan))] == list(
        plan.slots
    )


def test_golden_understanding_logits(golden, showo):
    ids = golden["mm"]
    difference(showo.head(showo._read(ids, torch.ones_like(ids, dtype=torch.bool))), golden["ml"])


@pytest.mark.parametrize("padding", [0, 3])
def test_golden_greedy_answer_through_the_cache(golden, showo, padding):
    ids = torch.nn.functional.pad(golden["mm"], (padding, 0), value=showo.pad_id)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :padding] = False
    written, _, _ = showo._write_text(ids, mask, torch.zeros(1, len(golden["txt"])), temperature=0)
    assert torch.equal(written[0], golden["txt"])
