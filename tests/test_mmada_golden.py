"""MMaDA against the official implementation: every tensor of the golden fixture, read from the official layout on disk."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.masked_goldens import ShowoNoise, difference, fixture, needs_goldens

from mmalign.models._llada import read_llada, renamed
from mmalign.models._mmada import Mmada, TokenLayout
from mmalign.models.layers import masked, masked_text
from mmalign.trajectory import Policy, Prompts

pytestmark = needs_goldens


@pytest.fixture(scope="module")
def golden():
    return fixture("mmada")


@pytest.fixture(scope="module")
def mmada(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmada")
    config, ids = golden["config"], golden["config"]["ids"]
    content = {**config["llada"], "model_type": "mmada"}
    (folder / "config.json").write_text(json.dumps(content))
    torch.save(golden["sd"], folder / "pytorch_model.bin")
    layout = TokenLayout(ids["pad"], ids["soi"], ids["eoi"], ids["t2i"], ids["mmu"], ids["code_offset"], ids["mask"])
    text = SimpleNamespace(eos=ids["eos"], end=ids["eos"])
    vq = SimpleNamespace(codes=config["codebook_size"], scale=16)
    with torch.no_grad():
        yield Mmada(read_llada(folder, content, "float32").eval(), text, layout, vq, config["num_vq_tokens"])


@pytest.fixture(scope="module")
def prompts(golden):
    return Prompts(("",) * len(golden["ids"]), golden["ids"], golden["att"].bool(), golden["un"], golden["uat"].bool())


def test_golden_names_go_both_ways(golden):
    back = renamed(renamed(golden["sd"]), to_llama=False)
    assert set(back) == set(golden["sd"]) and all(torch.equal(back[name], tensor) for name, tensor in golden["sd"].items())
    assert not set(renamed(golden["sd"])) & set(golden["sd"])


@pytest.mark.parametrize("is_cut", [False, True])
def test_golden_logits_of_rows_to_draw(golden, mmada, prompts, is_cut):
    """Also when padding that no real token sees is cut off."""
    rows = mmada.to_width(prompts) if is_cut else prompts
    ids, mask = torch.cat([rows.ids, rows.uncond_ids]), torch.cat([rows.mask, rows.uncond_mask])
    assert (ids.shape[1] < golden["ids"].shape[1]) or not is_cut
    difference(mmada.head(mmada._hidden(ids, mask))[mask], golden["lg"][:, -ids.shape[1] :][mask])


def test_golden_logits_that_see_padding_too(golden, mmada):
    difference(mmada.head(mmada._hidden(golden["ids"], torch.ones_like(golden["ids"], dtype=torch.bool))), golden["full"])


def test_golden_sampler_is_token_identical(golden, mmada, prompts):
    sample = golden["sample"]
    plan = masked.make_plan(mmada.tokens, mmada.schedule(sample["steps"]), sample["temperature"], mmada.fades, mmada.holds_last)
    logits_at = mmada._logits_at(prompts, Policy(1 + sample["guidance"]), "guided")
    drawn = masked.decode(logits_at, len(prompts), plan, ShowoNoise(sample["seed"], mmada.tokens), 1.0, mmada.device)
    assert torch.equal(drawn.codes, golden["out"])


@pytest.mark.parametrize("padding", [0, 5])
def test_golden_answer_is_token_identical(golden, mmada, padding):
    text, question = golden["text"], golden["mm"]
    assert text["temperature"] == 0
    width = question.shape[1] + padding
    logits_at = mmada._answer_logits(question.tolist(), text["max_new_tokens"], width)
    noise = torch.zeros(1, text["steps"] * text["block_length"])
    written = masked_text.write(logits_at, 1, text["max_new_tokens"], text["block_length"], text["steps"], 0.0, noise, mmada.device)
    assert torch.equal(torch.cat([question, written.ids], 1), golden["ans"])
