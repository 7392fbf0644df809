"""The supervision of pairs beside public code: golden numbers always, Show-o's own functions where $MMALIGN_ORACLES holds a checkout.

The checkout is `Show-o` (showlab/Show-o 45a5a2d): its masks of training (training/utils.py) and its attention
(training/prompting_utils.py), of which SeGroS keeps everything but that its hints see themselves alone.
"""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from helpers.suites import official, oracle
from helpers.tiny_masked import make_showo

from mmalign.models import showo
from mmalign.models.layers.masked import random_masks, random_number
from mmalign.models.layers.noise import uniforms
from mmalign.trajectory import Supervision

pytestmark = pytest.mark.usefixtures("one_thread")


def test_golden_numbers_of_hidden_tokens():
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.999], dtype=torch.float64)
    assert random_number(shares, 256).tolist() == [256, 237, 181, 98, 1] and random_number(shares, 1024).tolist() == [
        1024,
        946,
        724,
        392,
        2,
    ]
    many = random_number(uniforms(range(4000), 1)[:, 0], 256).double() / 256
    assert float(many.mean()) == pytest.approx(2 / math.pi, abs=0.015)  # the mean of a cosine over a quarter turn


def test_masks_of_training_are_show_os():
    folder = oracle("Show-o", "training/utils.py", "models/sampling.py")
    number, tokens = 200, 64
    uniform = uniforms(range(number), tokens + 1)
    # The official code takes the order of its random numbers for ranks, so it is given the order of ours.
    given = iter([uniform[:, 0].float(), uniform[:, 1:].argsort(1).float()])
    stub = SimpleNamespace(
        **{name: getattr(torch, name) for name in ("where", "tensor", "bool")}, rand=lambda *shape, device=None: next(given)
    )
    mask = official(folder / "training/utils.py", "mask_or_random_replace_tokens", torch=stub, random=random, math=math)
    schedule = official(folder / "models/sampling.py", "cosine_schedule", torch=torch, math=math)
    settings = SimpleNamespace(training=type("Settings", (dict,), {"min_masking_rate": 0.0})({"noise_type": "mask"}))
    codes = torch.arange(tokens).expand(number, -1)
    ids, labels, weight, _ = mask(codes, 999, settings, schedule)
    hidden = random_masks(uniform, tokens)
    assert torch.equal(ids == 999, hidden) and torch.equal(labels != -100, hidden) and weight is None
    assert torch.equal(random_number(uniform[:, 0], tokens), hidden.sum(1))


def test_attention_is_show_os_where_the_paper_does_not_change_it(tmp_path):
    folder = oracle("Show-o", "training/prompting_utils.py")
    attention = official(folder / "training/prompting_utils.py", "create_attention_mask_predict_next", torch=torch)
    model = showo.load(make_showo(tmp_path / "showo"))
    layout, n_hints = model.layout, 5
    prompts = model.to_width(model.encode_prompts(["a red circle above two blue squares", "a star"]))
    seen = {}
    handle = model.trunk.register_forward_pre_hook(lambda module, given, named: seen.update(named), with_kwargs=True)
    model._hidden_after(Supervision(hints=torch.zeros(2, n_hints, 48)), prompts.ids, prompts.mask)
    handle.remove()
    ours = seen["attention_mask"][:, 0]
    before = torch.tensor([layout.mmu, layout.soi, *[layout.offset] * n_hints, layout.eoi]).expand(2, -1)
    rows = torch.cat([before, prompts.ids], 1)
    theirs = attention(rows, layout.pad, layout.soi, layout.eoi, return_inverse_mask=False)[:, 0].bool()
    for row in range(2):
        real = rows[row] != layout.pad
        is_hint = torch.arange(rows.shape[1]) < before.shape[1]
        columns = real[None].expand(rows.shape[1], -1)
        assert torch.equal((ours[row] & columns)[real & ~is_hint], (theirs[row] & columns)[real & ~is_hint])
        picture = is_hint.clone()
        picture[0] = False  # the task token before the hints is text to Show-o, causal; here it belongs to them
        assert torch.equal(ours[row][picture], theirs[row][picture] & is_hint[None])
