"""The loaded Show-o: what every masked family promises, its rows, its reading and writing, and what is wrong with a checkpoint."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import masked_contract as contract
from helpers.masked_contract import QUESTIONS, TEXTS, picture, request
from helpers.tiny_masked import make_mmada, make_showo

from mmalign import hub
from mmalign.models import showo as family
from mmalign.trajectory import Supervision
from mmalign.types import Failure, MmalignError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_showo(tmp_path_factory.mktemp("showo"), seed=3)


@pytest.fixture(scope="module")
def model(folder):
    return family.load(folder)


@pytest.mark.parametrize("promise", contract.CONTRACT, ids=lambda promise: promise.__name__)
def test_promise(model, promise):
    promise(model)


def test_a_saved_model_is_whole_and_draws_the_same(model, tmp_path):
    contract.saved_and_loaded_again_it_draws_the_same(model, family, tmp_path / "saved")
    assert (tmp_path / "saved" / "pytorch_model.safetensors").is_file()


def test_half_precision(model, folder):
    contract.half_precision_stays_near(model, family, folder, bound=0.15)


def test_lora_that_is_off_is_the_base(folder):
    contract.lora_that_is_off_is_the_base(family.load(folder))


def test_rows_to_draw_are_the_official_ones(model):
    text, layout = model.text, model.layout
    row = text.drawing("a red circle", 16)
    inner = text.tokenizer("a red circle").input_ids
    assert row == [layout.t2i, text.bos, *inner, text.eos, layout.soi, *[layout.mask] * 16, layout.eoi]
    assert text.drawing("", 2) == [layout.t2i, text.bos, text.eos, layout.soi, layout.mask, layout.mask, layout.eoi]
    assert layout.offset == len(text.tokenizer) + 10 and layout.t2i == len(text.tokenizer) + 5


def test_long_texts_are_cut_as_officially_and_say_so(model):
    long = "circle " * 200
    row = model.text.drawing(long, 16)
    assert len(row) == 129 + 18 and row[128] == model.text.eos
    short, cut = model.generate([request("a circle", 1, steps=2), request(long, 2, steps=2)])
    assert not short.extra and cut.extra == {"is_cut": True}


def test_no_text_can_hold_a_special_token(model):
    assert max(model.text.tokenizer("<|soi|><|eoi|>[PAD]").input_ids) < model.layout.pad


def test_only_one_token_is_left_to_the_last_step_and_steps_follow_the_cosine(model):
    _, trajectory = contract.drawn(model, hidden=model.schedule(8))
    counts = torch.stack([(trajectory.step_of > step).sum(1) for step in range(8)], 1)
    assert counts.tolist() == [[15, 14, 13, 11, 8, 6, 3, 0]] * len(TEXTS)


def test_without_noise_the_surest_codes_come_first(model):
    prompts, trajectory = contract.drawn(model, hidden=model.schedule(6), order_noise=0.0)
    first = trajectory.log_prob[trajectory.step_of == 0]
    assert first.numel() == len(TEXTS) and first.exp().mean() > trajectory.log_prob[trajectory.step_of == 4].exp().mean()


# Reading and writing


def test_text_log_probs_are_those_of_the_writer(model):
    pictures = [picture(1), None, picture(2, 40, 16)]
    written = model.generate_text(QUESTIONS, pictures, [1, 2, 3], temperature=1.0, max_tokens=12)
    scored = model.text_tokens_log_prob(QUESTIONS, pictures, written.ids, written.mask)
    assert (scored - written.log_prob).abs().max() < 1e-4 and scored.requires_grad and written.mask.any()


def test_texts_are_bitwise_equal_alone_and_in_company(model):
    pictures = [picture(1), None, picture(2, 40, 16)]
    together = model.generate_text(QUESTIONS, pictures, [1, 2, 3], max_tokens=8)
    for row, question in enumerate(QUESTIONS):
        alone = model.generate_text([question], [pictures[row]], [row + 1], max_tokens=8)
        assert alone.texts[0] == together.texts[row]
        assert torch.equal(alone.log_prob[0][alone.mask[0]], together.log_prob[row][together.mask[row]])


def test_an_answer_counts_its_end_and_depends_on_the_picture(model):
    log_prob, mask = model.text_log_prob(["how many"] * 2, [picture(1), picture(2)], ["two", "two red circles"])
    assert mask.sum(1).tolist() == [len(model.text.answer("two")), len(model.text.answer("two red circles"))]
    assert (log_prob[~mask] == 0).all() and (log_prob[mask] < 0).all()
    other, _ = model.text_log_prob(["how many"] * 2, [picture(3), picture(2)], ["two", "two red circles"])
    assert not torch.allclose(log_prob[0], other[0], atol=1e-3) and torch.allclose(log_prob[1], other[1], atol=1e-5)
    alone, alone_mask = model.text_log_prob(["how many"], [picture(1)], ["two"])
    assert torch.allclose(alone[alone_mask], log_prob[0][mask[0]], atol=1e-5)


def test_text_cannot_look_ahead_and_the_picture_sees_all_of_itself(model):
    row = torch.tensor([model.text.question("how many", list(range(16)))])
    mask = torch.ones_like(row, dtype=torch.bool)
    base = model._read(row, mask)
    late, last_code = row.clone(), row.clone()
    late[0, -1] = 5
    last_code[0, 17] = model.offset + 31  # <|mmu|>, <|soi|>, 16 codes
    assert torch.equal(model._read(late, mask)[:, :-1], base[:, :-1])
    assert (model._read(last_code, mask)[0, 0] - base[0, 0]).abs().max() > 1e-3


def test_embeddings_say_what_is_text_and_what_is_picture(model):
    found = model.embed(QUESTIONS[:2], [picture(1), None])
    assert found.is_image.sum(1).tolist() == [16, 0] and not (found.is_text & found.is_image).any()
    assert found.hidden.shape[:2] == found.mask.shape and (found.is_text.sum(1) > 3).all() and not (found.is_text & ~found.mask).any()


def test_pictures_are_fitted_by_the_short_side(model):
    tall = np.zeros((64, 16, 3), np.uint8)
    tall[24:40] = 255
    assert model.fit([tall]).shape == (1, 3, 16, 16) and model.fit([tall]).min() == 1
    assert model.image_features(model.fit([tall])).shape == (1, 16, 48)
    with pytest.raises(MmalignError, match="16 x 16"):
        model.image_features(torch.zeros(1, 3, 32, 32))


def test_images_answers_and_refusals_in_one_call(model):
    results = model.generate(
        [
            request("a red circle", 1, steps=2),
            request("what colour?", 2, images=[picture(1)], task="answer", max_tokens=4),
            request("a red circle", 3, size=(64, 64), steps=2),
            request("?", 4, images=[picture(1), picture(2)], task="answer"),
        ]
    )
    assert results[0].image.shape == (16, 16, 3) and results[1].answer is not None and set(results[1].extra) == {"tokens", "is_whole"}
    assert all(isinstance(result, Failure) for result in results[2:]) and "16 x 16" in results[2].message


# Visual hints and supervision that is given


def supervised(model, texts, given=None, blank=None):
    pixels = model.fit([picture(number) for number in range(len(texts))])
    return model.token_losses(model.encode_prompts(texts), pixels, list(range(1, len(texts) + 1)), blank, given)


def hints_of(model, number, kept=5):
    return model.image_features(model.fit([picture(seed) for seed in range(number)]))[:, :kept]


def test_the_loss_counts_the_given_tokens_and_hides_the_given_ones(model):
    hidden = torch.arange(16).expand(2, -1) < 9
    scored = torch.arange(16).expand(2, -1) < 3
    whole = supervised(model, TEXTS[:2], Supervision(hidden=hidden))
    part = supervised(model, TEXTS[:2], Supervision(hidden=hidden, scored=scored))
    assert torch.equal(whole.scored, hidden) and torch.equal(part.scored, scored)
    assert torch.allclose(part.loss, whole.loss * scored, atol=1e-5) and (whole.loss[~hidden] == 0).all()
    assert torch.allclose(part.mean, whole.loss[:, :3].mean(1), atol=1e-5)
    own = supervised(model, TEXTS[:2])
    assert own.scored.sum(1).tolist() == model.hidden_number([1, 2]).tolist()
    assert not (whole.right & ~hidden).any()


def test_hints_reach_the_image_and_samples_with_hints_are_alone_what_they_are_in_company(model):
    hints = hints_of(model, 3)
    plain, hinted = supervised(model, TEXTS[:3]), supervised(model, TEXTS[:3], Supervision(hints=hints))
    assert ((plain.mean - hinted.mean).abs() > 1e-4).all()
    pixels = model.fit([picture(1)])
    alone = model.token_losses(model.encode_prompts(TEXTS[1:2]), pixels, [2], given=Supervision(hints=hints[1:2]))
    assert torch.allclose(alone.loss[0], hinted.loss[1], atol=1e-5)
    some = supervised(model, TEXTS[:3], Supervision(hints=hints, hinted=torch.tensor([True, False, True])))
    assert torch.allclose(some.loss[1], plain.loss[1], atol=1e-5) and torch.allclose(some.loss[0], hinted.loss[0], atol=1e-5)


def test_hints_see_themselves_alone_text_sees_them_and_what_is_before_it_and_the_image_sees_everything(model):
    """The layout of SeGroS's figure 6, read off by changing one input after the other."""
    prompts = model.to_width(model.encode_prompts([TEXTS[3], TEXTS[0]]))
    seen = {}

    def remember(module, arguments, named):
        seen.update(named)

    handle = model.trunk.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        model._hidden_after(Supervision(hints=hints_of(model, 2)), prompts.ids, prompts.mask)
    finally:
        handle.remove()
    mask = seen["attention_mask"][:, 0]
    n_hints, length = 5 + 3, prompts.ids.shape[1]
    first_image = length - 18
    for row in range(2):
        real = torch.cat([torch.ones(n_hints, dtype=torch.bool), prompts.mask[row]])
        index = torch.arange(n_hints + length)
        is_image = index >= n_hints + first_image
        expected = (index[None] < n_hints) | (index[None] <= index[:, None]) | is_image[:, None]
        expected[:n_hints] = index < n_hints
        assert torch.equal(mask[row][real], (expected & real[None])[real])
    position = seen["position_ids"]
    assert (position.diff() > 0).all() and position[0, 0] == 0 and position[0, -1] == 8 + 129 + 17


def test_families_without_a_place_for_hints_say_so(tmp_path):
    from mmalign.models import mmada

    other = mmada.load(make_mmada(tmp_path / "mmada"))
    with pytest.raises(UsageError, match="no place for visual hints"):
        supervised(other, TEXTS[:1], Supervision(hints=torch.zeros(1, 2, 48)))


def test_a_texts_tokens_are_those_of_its_row_without_special_ones(model):
    short, empty, long = model.text_features(["a red circle", "", "circle " * 200])
    assert "".join(short.words) == "a red circle" and short.features.shape == (len(short.words), 48)
    assert empty.features.shape == (0, 48) and len(long.words) == 126
    embed = model.net.get_input_embeddings()
    row = torch.tensor(model.text.drawing("circle " * 200, 0))
    assert torch.equal(long.features, embed(row[2:128]))


# The checkpoint


def test_the_parts_beside_it_may_lie_elsewhere(folder, model, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    for name in ("phi-1_5", "magvitv2"):
        (alone / name).rename(tmp_path / name)
    with pytest.raises(UsageError, match=r"'phi-1_5'.*--model-extra phi-1_5=FOLDER"):
        family.load(alone)
    with pytest.raises(UsageError, match="'magvitv2'"):
        family.load(alone, extra={"phi-1_5": tmp_path / "phi-1_5"})
    with pytest.raises(UsageError, match="'vq'|vq="):
        family.load(alone, extra={"vq": tmp_path})
    again = family.load(alone, extra={name: tmp_path / name for name in ("phi-1_5", "magvitv2")})
    one, other = (made.generate([request("a star", 1, steps=3)])[0].image for made in (model, again))
    assert np.array_equal(one, other)


def test_it_is_recognised_by_its_config_alone(folder, tmp_path):
    spec = hub.resolve_model(str(folder))
    assert spec.family == "showo"
    assert not family.recognises(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_clip_vit": True}, "CLIP"),
        ({"vocab_size": 400}, "does not add up"),
        ({"codebook_size": 16, "vocab_size": -16}, "has 32 codes|sizes of its config"),
    ],
)
def test_what_does_not_fit_is_told(folder, tmp_path, change, message):
    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    content = json.loads((wrong / "config.json").read_text())
    change = {**change, **({"vocab_size": content["vocab_size"] - 16} if change.get("vocab_size") == -16 else {})}
    (wrong / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(MmalignError, match=message):
        family.load(wrong)


def test_missing_and_left_over_parameters_are_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    tensors = load_file(wrong / "pytorch_model.safetensors")
    tensors["mm_projector.0.weight"] = tensors.pop("showo.lm_head.bias")
    save_file(tensors, wrong / "pytorch_model.safetensors")
    with pytest.raises(MmalignError, match=r"lm_head\.bias.*mm_projector"):
        family.load(wrong)


def test_a_model_that_is_no_image_tokenizer_is_told(folder, tmp_path):
    with pytest.raises(MmalignError, match="MAGVIT"):
        family.load(folder, extra={"magvitv2": folder, "phi-1_5": folder / "phi-1_5"})
