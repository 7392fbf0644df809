"""The loaded Lumina-DiMOO: what every masked family promises, rows with newlines, images of any shape, what is wrong with a checkpoint."""

import shutil

import numpy as np
import pytest
import torch
from helpers import masked_contract as contract
from helpers.masked_contract import TEXTS, picture, request
from helpers.masked_text_contract import TEXT_CONTRACT
from helpers.tiny_masked import make_dimoo

from mmalign import hub
from mmalign.models import lumina_dimoo as family
from mmalign.trajectory import Policy
from mmalign.types import Failure, MmalignError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_dimoo(tmp_path_factory.mktemp("dimoo"), seed=3)


def opened(folder):
    """The model with 4 x 4 image tokens by default: 64 x 64, the released model's, would be slow here."""
    model = family.load(folder)
    model.grid = (4, 4)
    return model


@pytest.fixture(scope="module")
def model(folder):
    return opened(folder)


@pytest.mark.parametrize("promise", [*contract.CONTRACT, *TEXT_CONTRACT], ids=lambda promise: promise.__name__)
def test_promise(model, promise):
    promise(model)


def test_a_saved_model_is_whole_and_draws_the_same(model, tmp_path):
    model.save(tmp_path / "saved")
    assert family.recognises(tmp_path / "saved") and hub.resolve_model(str(tmp_path / "saved")).family == "lumina_dimoo"
    asked = [request(TEXTS[1], 1, size=(16, 8), steps=3)]
    one, other = (made.generate(asked)[0].image for made in (model, family.load(tmp_path / "saved")))
    assert one.shape == (16, 8, 3) and np.array_equal(one, other)


def test_lora_that_is_off_is_the_base(folder):
    contract.lora_that_is_off_is_the_base(opened(folder))


def test_rows_end_their_lines(model):
    layout, tokenizer = model.layout, model.text.tokenizer
    row = model.drawing_row("a star", (2, 3))
    lines = [*[layout.mask] * 3, layout.newline] * 2
    assert row[-12:] == [layout.boa, layout.boi, *lines, layout.eoi, layout.eoa]
    assert layout.boi == tokenizer.convert_tokens_to_ids("<Image>") and layout.eoa == tokenizer.convert_tokens_to_ids("</answer>")
    assert tokenizer.convert_tokens_to_ids("<uncondition>") in model.drawing_row("<uncondition>", (1, 1))


def test_a_picture_stands_before_the_last_token_of_its_question(model):
    codes = model.picture_codes([picture(1, 16, 16)])[0]
    row = model.question_row("how many", codes)
    layout = model.layout
    assert row[-2:] == [model.text.tokenizer.convert_tokens_to_ids("</user>"), layout.boa]
    assert row[-3] == layout.eoi and row[-4 - len(codes)] == layout.boi and codes.count(layout.newline) == 4


@pytest.mark.parametrize(
    ("shape", "crop"), [((16, 16), (16, 16)), ((10, 40), (8, 32)), ((40, 10), (32, 8)), ((5, 90), (8, 32)), ((100, 90), (16, 16))]
)
def test_pictures_are_cropped_to_the_nearest_shape(model, shape, crop):
    assert model.crop_size(shape) == crop
    codes = model.picture_codes([picture(1, *shape)])[0]
    assert len(codes) == crop[0] // 4 * (crop[1] // 4 + 1)


def test_images_of_several_shapes_and_refusals_in_one_call(model):
    sizes = [(16, 16), None, (8, 24), (10, 16)]
    results = model.generate([request(TEXTS[0], number, size=size, steps=2) for number, size in enumerate(sizes)])
    assert [result.image.shape for result in results[:3]] == [(16, 16, 3), (16, 16, 3), (8, 24, 3)]
    assert isinstance(results[3], Failure) and "multiples of 4" in results[3].message
    with pytest.raises(UsageError, match="multiples of 4"):
        model.encode_prompts(TEXTS, size=(10, 16))


def test_the_noise_of_the_order_stays_as_it_is(model):
    """Lumina-DiMOO's does not fade, and its last token does not wait for the last step."""
    prompts = model.encode_prompts(TEXTS[:1], size=(8, 8))
    trajectory = model.sample(prompts, Policy(1.0, hidden=model.schedule(20)), [1])
    assert trajectory.step_of.max() < 19


def test_pixels_come_back_near_what_the_tokenizer_says(model):
    pixels = model.fit([picture(1)])
    codes = model.encode_image(pixels)
    assert codes.shape == (1, 16) and codes.unique().numel() > 3 and model.decode(codes).shape == pixels.shape
    wanted = model.vq.net.decode(model.vq.net.encode(pixels).latents).sample.clip(0, 1)
    assert torch.allclose(model.decode(codes), wanted, atol=1e-5)


def test_what_does_not_belong_together_is_told(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    tensors = load_file(wrong / "model.safetensors")
    for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, wrong / "model.safetensors")
    with pytest.raises(MmalignError, match="do not belong together"):
        family.load(wrong)
    shutil.rmtree(wrong / "vqvae")
    with pytest.raises(UsageError, match="--model-extra vqvae=FOLDER"):
        family.load(wrong)
