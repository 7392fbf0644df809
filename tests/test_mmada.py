"""The loaded MMaDA: what every masked family promises of pictures and of text, its rows, and what is wrong with a checkpoint."""

import json
import shutil

import pytest
from helpers import masked_contract as contract
from helpers.masked_contract import picture, request
from helpers.masked_text_contract import TEXT_CONTRACT
from helpers.tiny_masked import make_mmada

from mmalign import hub
from mmalign.models import mmada as family
from mmalign.types import MmalignError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_mmada(tmp_path_factory.mktemp("mmada"), seed=3)


@pytest.fixture(scope="module")
def model(folder):
    return family.load(folder)


@pytest.mark.parametrize("promise", [*contract.CONTRACT, *TEXT_CONTRACT], ids=lambda promise: promise.__name__)
def test_promise(model, promise):
    promise(model)


def test_a_saved_model_is_whole_and_draws_the_same(model, tmp_path):
    contract.saved_and_loaded_again_it_draws_the_same(model, family, tmp_path / "saved")


def test_half_precision(model, folder):
    contract.half_precision_stays_near(model, family, folder, bound=0.15)


def test_lora_that_is_off_is_the_base(folder):
    contract.lora_that_is_off_is_the_base(family.load(folder))


def test_rows_are_the_official_ones(model):
    text, layout = model.text, model.layout
    tokenizer = text.tokenizer
    assert layout.offset == len(tokenizer) and layout.soi == tokenizer.convert_tokens_to_ids("<|reserved_token_0|>")
    row = model.drawing_row("a red circle")
    inner = tokenizer("a red circle").input_ids
    assert row == [layout.t2i, text.bos, *inner, text.eos, layout.soi, *[layout.mask] * 16, layout.eoi]
    turn = "<|start_header_id|>user<|end_header_id|>\nhow many<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"
    asked = model.question_row("how many", [3, 31])
    assert asked == [layout.mmu, layout.soi, layout.offset + 3, layout.offset + 31, layout.eoi, text.bos, *tokenizer(turn).input_ids]


def test_a_prompt_cannot_smuggle_in_the_mask_or_a_frame(model):
    assert model.drawing_row("a <|mdm_mask|><|reserved_token_0|>star").count(model.layout.mask) == model.tokens


def test_image_codes_see_the_prompt_from_both_sides(model):
    prompts = model.encode_prompts(["a red circle"])
    base = model._hidden(prompts.ids, prompts.mask)
    changed = prompts.ids.clone()
    changed[0, -2] = model.offset
    assert (model._hidden(changed, prompts.mask)[0, 1] - base[0, 1]).abs().max() > 1e-4


def test_images_and_answers_in_one_call(model):
    settings = {"task": "answer", "max_tokens": 8, "answer_steps": 4, "answer_block": 4}
    results = model.generate([request("a red circle", 1, steps=2), request("what colour?", 2, images=[picture(1)], **settings)])
    assert results[0].image.shape == (16, 16, 3) and set(results[1].extra) == {"tokens", "is_whole"}
    with pytest.raises(UsageError, match="answer_steps"):
        model.generate([request("what colour?", 2, **{**settings, "answer_steps": 3})])


def test_the_image_tokenizer_may_lie_elsewhere(folder, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    (alone / "magvitv2").rename(tmp_path / "vq")
    with pytest.raises(UsageError, match=r"--model-extra magvitv2=FOLDER"):
        family.load(alone)
    assert family.load(alone, extra={"magvitv2": tmp_path / "vq"}).codes == 32
    assert hub.resolve_model(str(folder)).family == "mmada"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"block_type": "sequential"}, "another build"), ({"n_layers": 3}, "missing"), ({"mlp_hidden_size": 64}, "sizes of its config")],
)
def test_what_does_not_fit_is_told(folder, tmp_path, change, message):
    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    content = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(MmalignError, match=message):
        family.load(wrong)


def test_too_few_embeddings_for_the_codes_are_told(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    tensors = load_file(wrong / "model.safetensors")
    for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
        tensors[name] = tensors[name][:-10].contiguous()
    save_file(tensors, wrong / "model.safetensors")
    with pytest.raises(MmalignError, match="too few"):
        family.load(wrong)
