"""Lumina-DiMOO against the official implementation: every tensor of the golden fixture, read from the official layout on disk."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.masked_goldens import DimooNoise, difference, fixture, needs_goldens

from mmalign.models._dimoo import Dimoo, TokenLayout
from mmalign.models._llada import read_llada
from mmalign.models.layers import masked
from mmalign.trajectory import Policy, Prompts

pytestmark = needs_goldens


@pytest.fixture(scope="module")
def golden():
    return fixture("dimoo")


@pytest.fixture(scope="module")
def dimoo(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dimoo")
    config, ids = golden["config"], golden["config"]["ids"]
    content = {**config["llada"], "model_type": "llada"}
    (folder / "config.json").write_text(json.dumps(content))
    torch.save(golden["sd"], folder / "pytorch_model.bin")
    layout = TokenLayout(ids["boi"], ids["eoi"], ids["boa"], ids["eoa"], ids["newline"], ids["code_offset"], ids["mask"])
    vq = SimpleNamespace(codes=config["codebook_size"], scale=16)
    prompt = golden["x"][0, : config["code_start"] - 2].tolist()
    text = SimpleNamespace(eos=1, encode=lambda text: golden["un"][0].tolist() if "<uncondition>" in text else prompt)
    grid = (config["grid_h"], config["grid_w"])
    with torch.no_grad():
        yield Dimoo(read_llada(folder, content, "float32").eval(), text, layout, vq, grid)


@pytest.fixture(scope="module")
def prompts(golden, dimoo):
    ids, start = golden["x"], golden["config"]["code_start"] - 2
    blank = torch.cat([golden["un"], ids[:, start:]], 1)
    return Prompts(("",), ids, torch.ones_like(ids, dtype=torch.bool), blank, torch.ones_like(blank, dtype=torch.bool))


def test_golden_rows(golden, dimoo, prompts):
    """The image part of a row is the fixture's; the unconditional row differs from the conditional one in its prompt alone."""
    made = dimoo.encode_prompts(["anything"])
    assert torch.equal(made.ids, golden["x"]) and torch.equal(made.uncond_ids, prompts.uncond_ids)


@pytest.mark.parametrize("padding", [0, 5])
def test_golden_logits(golden, dimoo, padding):
    """Also beside padding at the right, which no one sees."""
    ids = F.pad(golden["x"], (0, padding), value=3)
    mask = torch.arange(ids.shape[1])[None] < golden["x"].shape[1]
    difference(dimoo.head(dimoo._hidden(ids, mask))[mask][None], golden["lg"])


@pytest.mark.parametrize("copies", [1, 3])
def test_golden_sampler_is_token_identical(golden, dimoo, prompts, copies):
    """Also with other prompts in the batch, which the official code cannot have."""
    sample = golden["sample"]
    plan = masked.make_plan(dimoo.tokens, dimoo.schedule(sample["steps"]), sample["temperature"], dimoo.fades, dimoo.holds_last)
    logits_at = dimoo._logits_at(dimoo.to_width(prompts.select([0] * copies)), Policy(1 + sample["guidance"]), "guided")
    others = [DimooNoise(sample["seed"] + copy) for copy in range(copies)]

    class Together:
        def codes(self, log_prob, step, slots, is_hidden):
            parts = zip(others, log_prob, slots, is_hidden, strict=True)
            return torch.cat([noise.codes(row[None], step, place[None], hidden[None]) for noise, row, place, hidden in parts])

        def gumbel(self, step, slots):
            return torch.cat([noise.gumbel(step, row[None]) for noise, row in zip(others, slots, strict=True)])

    drawn = masked.decode(logits_at, copies, plan, Together(), sample["temperature"], dimoo.device)
    assert torch.equal(drawn.codes[:1] + dimoo.offset, golden["out"])
