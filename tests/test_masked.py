"""Masked decoding: how many tokens a step decides, in which order, with whose noise; text and its estimates; the cut output layer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.models.layers import masked, masked_text
from mmalign.models.layers.linear import head_slice
from mmalign.models.layers.masked import HIDDEN, Streams, cosine, decode, emerge, first_slots, make_plan, random_masks
from mmalign.models.layers.noise import uniforms
from mmalign.models.layers.rows import pad_left, pad_right, prompt_row
from mmalign.types import UsageError

CPU = torch.device("cpu")


def filled(plan, seeds, logits=None, temperature=1.0, noise=None):
    """Decoded samples of a model whose logits do not depend on what is visible."""
    tokens = plan.slots[0]
    table = torch.zeros(len(seeds), tokens, 4) if logits is None else logits

    def logits_at(codes, slots):
        return table.gather(1, slots[..., None].expand(-1, -1, table.shape[-1]))

    return decode(logits_at, len(seeds), plan, noise or Streams(seeds, len(plan), tokens, CPU), temperature, CPU)


def test_the_released_models_steps():
    """MMaDA at 15 steps of 1024 tokens (specified counts), Lumina-DiMOO's last ones at 64 of 4096."""
    plan = make_plan(1024, cosine(15), 1.0, fades=True, holds_last=True)
    counts = [before - after for before, after in zip(plan.slots, plan.hidden, strict=True)]
    assert counts == [6, 17, 28, 38, 49, 58, 68, 75, 84, 90, 95, 100, 104, 105, 107]
    assert plan.noise[:4] == pytest.approx([0.9333, 0.8089, 0.6471, 0.4745], abs=1e-4) and plan.noise[-1] == 0
    plan = make_plan(4096, cosine(64), 1.0, fades=False, holds_last=False)
    counts = [before - after for before, after in zip(plan.slots, plan.hidden, strict=True)]
    assert counts[:5] == [2, 3, 7, 8, 11] and counts[-5:] == [100, 100, 101, 100, 100] and set(plan.noise) == {1.0}


def test_the_share_is_rounded_as_in_the_originals():
    """cos(pi / 3) of 16 tokens is 8 exactly; single precision decides on which side of it the floor falls."""
    wanted = math.floor(16 * torch.cos(torch.tensor(4 / 6) * math.pi * 0.5))
    assert make_plan(16, cosine(6), 1.0, fades=True, holds_last=True).hidden[3] == wanted


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.booleans(), st.integers(0, 2**63))
def test_every_token_is_decided_once_and_as_planned(tokens, steps, holds_last, seed):
    plan = make_plan(tokens, cosine(steps), 1.0, fades=holds_last, holds_last=holds_last)
    logits = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(seed % 2**31))
    drawn = filled(plan, [seed, seed + 1], logits)
    assert torch.allclose(drawn.log_prob, logits.log_softmax(-1).gather(-1, drawn.codes[..., None])[..., 0])
    for step in range(steps):
        assert (drawn.step_of > step).sum(1).tolist() == [plan.hidden[step]] * 2
    if holds_last:
        assert (drawn.step_of == steps - 1).any(1).all()


class Fixed:
    """The most probable codes, in the order of their probability."""

    def codes(self, log_prob, step, slots, is_hidden):
        return log_prob.argmax(-1)

    def gumbel(self, step, slots):
        return torch.zeros(slots.shape)


@pytest.mark.parametrize(("holds_last", "last"), [(True, 9), (False, 1)])
def test_a_token_alone_waits_for_the_last_step_or_not(holds_last, last):
    drawn = filled(make_plan(2, cosine(10), 1.0, fades=False, holds_last=holds_last), [1])
    assert sorted(drawn.step_of[0].tolist()) == [0, last]


def test_without_noise_the_surest_comes_first():
    logits = torch.zeros(1, 6, 4)
    logits[0, :, 2] = torch.tensor([1.0, 5.0, 3.0, 8.0, 7.0, 6.0])
    plan = make_plan(6, (5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0), 1.0, fades=False, holds_last=False)
    drawn = filled(plan, [3], logits, noise=Fixed())
    assert drawn.step_of[0].tolist() == [5, 3, 4, 0, 1, 2] and (drawn.codes == 2).all()


def test_ties_decide_together_and_nothing_is_lost():
    """Certain codes all have log-probability 0: without noise every token is as sure as the next."""
    logits = torch.zeros(2, 9, 4)
    logits[:, :, 1] = 200.0
    drawn = filled(make_plan(9, cosine(5), 0.0, fades=True, holds_last=True), [1, 2], logits)
    assert (drawn.codes == 1).all() and (drawn.step_of == 0).all()


def test_the_temperature_bends_the_codes_and_not_the_order():
    logits = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(1))

    plan = make_plan(12, cosine(6), 1.0, fades=True, holds_last=True)
    cold, warm = (filled(plan, [1], logits, temperature, Fixed()) for temperature in (1.0, 2.0))
    assert torch.equal(cold.step_of, warm.step_of) and (warm.log_prob > math.log(0.25) - 1e-6).all()
    assert torch.allclose(warm.log_prob, (logits / 2).log_softmax(-1).max(-1).values, atol=1e-6)


def test_codes_follow_the_distribution():
    """All at once: with several steps the sure ones are kept and the others drawn again."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(1, 2000, 4)
    drawn = filled(make_plan(2000, (0.0,), 1.0, fades=True, holds_last=True), [7], logits)
    share = torch.bincount(drawn.codes[0], minlength=4) / 2000
    assert (share - torch.tensor([0.1, 0.2, 0.3, 0.4])).abs().max() < 0.04


def test_an_order_of_chance_decides_binomial_numbers():
    """MaskGRPO's sampler at 12 steps of 1024 tokens: 9 +- 3 in the first, 134 +- 11 in the last; each token alone, whatever its code."""
    schedule = cosine(12)
    logits = torch.zeros(400, 1024, 2)

    def logits_at(codes, slots):
        return logits.gather(1, slots[..., None].expand(-1, -1, 2))

    drawn = emerge(logits_at, schedule, Streams(range(400), 12, 1024, CPU), 1.0, is_fixed=False)
    counts = torch.stack([(drawn.step_of == step).sum(1) for step in range(12)], 1).double()
    shares = [before - after for before, after in zip((1.0, *schedule), schedule, strict=False)]
    for step, share in enumerate(shares):
        spread = (1024 * share * (1 - share)) ** 0.5
        assert counts[:, step].mean() == pytest.approx(1024 * share, abs=4 * spread / 20) and counts[:, step].std() == pytest.approx(
            spread, rel=0.2
        )
    assert [round(1024 * shares[step]) for step in (0, -1)] == [9, 134] and (drawn.codes >= 0).all() and (drawn.log_prob < 0).all()
    whole = emerge(logits_at, schedule, Streams(range(400), 12, 1024, CPU), 1.0, is_fixed=True)
    assert torch.equal(whole.codes, drawn.codes) and torch.equal(whole.step_of, drawn.step_of)


def test_a_stream_is_its_seeds():
    slots = torch.arange(5)[None].repeat(3, 1)
    numbers = Streams([5, 6, 5], 2, 5, CPU).gumbel(1, slots)
    assert torch.equal(numbers[0], numbers[2]) and not torch.equal(numbers[0], numbers[1]) and numbers.isfinite().all()
    sample = Streams(range(200), 1, 50, CPU).gumbel(0, torch.arange(50)[None].repeat(200, 1))
    assert sample.mean() == pytest.approx(0.5772, abs=0.05) and sample.std() == pytest.approx(math.pi / 6**0.5, abs=0.05)


def test_slots_are_the_first_wanted_ones():
    wanted = torch.tensor([[False, True, False, True], [True, False, False, False]])
    assert first_slots(wanted, 2).tolist() == [[1, 3], [0, 1]]


def test_training_masks_are_the_seeds_and_two_thirds_on_average():
    masks = random_masks(uniforms(range(2000), 65), 64)
    assert masks.float().mean() == pytest.approx(2 / math.pi, abs=0.02) and masks.any(1).all()
    assert torch.equal(random_masks(uniforms([7], 65), 64)[0], masks[7])
    assert masks.float().mean(0).std() < 0.03  # no place is preferred


# Text


def test_blocks_are_written_in_order_and_the_surest_first():
    """Logits say how sure each token is; the model says what it was shown."""
    sure = torch.tensor([1.0, 3.0, 2.0, 4.0, 9.0, 8.0, 7.0, 6.0])
    shown = []

    def logits_at(ids, slots):
        shown.append((ids == HIDDEN)[0].tolist())
        return torch.stack([torch.zeros(8), sure], -1)[None].gather(1, slots[..., None].expand(-1, -1, 2))

    written = masked_text.write(logits_at, 1, 8, 4, 6, 0.0, torch.zeros(1, 24), CPU)
    assert (written.ids == 1).all() and torch.allclose(written.log_prob[0], torch.nn.functional.logsigmoid(sure), atol=1e-6)
    decided = [sorted(set(range(8)) - {place for place, hidden in enumerate(row) if hidden}) for row in shown]
    assert decided == [[], [1, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize(("tokens", "block", "steps"), [(6, 4, 2), (8, 4, 3), (0, 4, 4), (8, 0, 8)])
def test_blocks_must_divide(tokens, block, steps):
    with pytest.raises(UsageError, match="blocks of"):
        masked_text.rounds_of(tokens, block, steps)


def test_random_contexts_estimate_the_bound_without_bias():
    """When a token's log-probability depends on the number of visible ones alone, the bound is known."""
    mask = torch.arange(6)[None].repeat(400, 1) < 5
    total = torch.zeros(400, 6)
    for hidden, weight in masked_text.contexts(mask, "mc", range(400), 5):
        assert not (hidden & ~mask).any() and hidden.any(1).all()
        total += weight * -hidden.sum(1, keepdim=True).float() * hidden
    bound = -sum(number * 5.0 for number in range(1, 6)) / 5
    assert total.sum(1).mean() == pytest.approx(bound, rel=0.03)


# Rows, and the output layer


def test_padding():
    ids, mask = pad_left([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[True] * 3, [False, False, True]]
    ids, mask = pad_right([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and mask.tolist() == [[True] * 3, [True, False, False]]
    assert pad_left([[1]], 0, 3)[0].tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(("text", "row"), [([1, 2], [7, 1, 2, 8]), ([1, 2, 3], [7, 1, 2, 3, 8]), ([1, 2, 3, 4], [7, 1, 2, 3, 8])])
def test_a_prompt_is_cut_and_still_ends(text, row):
    assert prompt_row(7, text, 8, 5) == row


@pytest.mark.parametrize("bias", [True, False])
def test_a_slice_of_the_output_layer_is_its_outputs(bias):
    layer = torch.nn.Linear(8, 50, bias=bias)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(head_slice(layer, 10, 20)(x), layer(x)[:, 10:20], atol=1e-6)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    assert torch.equal(head_slice(layer, 10, 20)(x), layer(x)[:, 10:20])


def test_fading_noise_compounds():
    assert masked.make_plan(9, cosine(4), 2.0, fades=True, holds_last=True).noise == pytest.approx([1.5, 0.75, 0.1875, 0.0])
