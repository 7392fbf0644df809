"""What every masked family promises, as functions of a loaded tiny model: ratios, batches, contexts, seeds, losses, adapters."""

import numpy as np
import pytest
import torch

from mmalign.trajectory import Policy
from mmalign.types import Prompt, Request, UsageError

TEXTS = [
    "a red circle",
    "two small blue squares to the left of a large green triangle, and a yellow star above them",
    "x",
    "a photo of a red circle and two small blue squares above the table next to the bench",
]
QUESTIONS = ["what colour is the circle?", "how many", "describe the image in detail: what is above the star and what is below it?"]


def picture(seed, height=20, width=31):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def request(text, seed=0, images=None, size=None, **settings):
    return Request(Prompt(f"p{seed}", text, meta={} if images is None else {"images": images}), 0, seed, size, settings)


def drawn(model, texts=TEXTS, **policy):
    prompts = model.encode_prompts(list(texts))
    return prompts, model.sample(prompts, Policy(**{"guidance": 3.0, **policy}), list(range(1, len(texts) + 1)))


def fresh_ratio_is_one(model):
    for policy in ({}, {"guidance": 1.0, "temperature": 1.3}, {"guidance": 2.5, "temperature": 0.7, "hidden": model.schedule(3)}):
        prompts, trajectory = drawn(model, **policy)
        scored = model.log_prob(prompts, trajectory)
        assert (scored.exp() - trajectory.log_prob.exp()).abs().max() < 1e-5
        assert ((scored - trajectory.log_prob).abs() <= 1e-5 * trajectory.log_prob.abs().clamp(min=1)).all()
        assert scored.requires_grad and not trajectory.log_prob.requires_grad
        assert trajectory.kind == "masked" and len(trajectory.policy.hidden) > int(trajectory.step_of.max()) >= 0


def chosen_steps_are_parts_of_the_whole(model):
    prompts, trajectory = drawn(model)
    whole = model.log_prob(prompts, trajectory).detach()
    steps = sorted(set(trajectory.step_of.flatten().tolist()))
    some = model.log_prob(prompts, trajectory, steps=steps[1:3]).detach()
    is_some = (trajectory.step_of >= steps[1]) & (trajectory.step_of <= steps[2])
    assert torch.allclose(some, whole * is_some, atol=1e-5) and (~is_some).any()


def any_context_can_be_scored(model):
    prompts, trajectory = drawn(model)
    everything = torch.ones_like(trajectory.step_of, dtype=torch.bool)
    first = model.log_prob_given(prompts, trajectory, everything, trajectory.step_of == 0)
    assert torch.allclose(first, model.log_prob(prompts, trajectory, steps=[0]), atol=1e-6)
    half = torch.arange(everything.shape[1]) % 2 == 0
    scored = model.log_prob_given(prompts, trajectory, half.expand_as(everything), which="cond")
    assert (scored[:, ~half] == 0).all() and (scored[:, half] < 0).all()
    with pytest.raises(UsageError, match="hidden"):
        model.log_prob_given(prompts, trajectory, half.expand_as(everything), everything)


def the_hidden_state_is_shared_by_a_prompts_samples(model):
    """One forward for each prompt gives the values and gradients of one for each sample; unscored places cost and say nothing."""
    prompts = model.encode_prompts(TEXTS[:2])
    repeated = prompts.select([0, 0, 0, 1, 1, 1])
    trajectory = model.sample(repeated, Policy(3.0), list(range(6)))
    everything = torch.ones_like(trajectory.step_of, dtype=torch.bool)
    weights = [model.trunk.layers[0].self_attn.v_proj.weight, model.head.weight]
    for scored in (None, trajectory.step_of < 2):
        for which in ("cond", "guided"):
            shared = model.log_prob_blank(prompts, trajectory, scored, which)
            alone = model.log_prob_given(repeated, trajectory, everything, scored, which)
            assert torch.allclose(shared, alone, atol=1e-5)
            pairs = zip(*(torch.autograd.grad(value.mean(), weights) for value in (shared, alone)), strict=True)
            assert all((one - other).abs().max() < 1e-6 and other.abs().max() > 1e-3 for one, other in pairs)
    with pytest.raises(UsageError, match="divided among 2 prompts"):
        model.log_prob_blank(prompts, trajectory.select([0, 1, 2]))
    with pytest.raises(UsageError, match="no log-probability 'both'"):
        model.log_prob_blank(prompts, trajectory, None, "both")


def an_order_of_chance_is_scored_and_independent_like_the_other(model):
    prompts, trajectory = drawn(model, order="random", hidden=model.schedule(5))
    assert (model.log_prob(prompts, trajectory).exp() - trajectory.log_prob.exp()).abs().max() < 1e-5
    alone = model.sample(model.encode_prompts(TEXTS[1:2]), trajectory.policy, [2])
    assert torch.equal(alone.actions[0], trajectory.actions[1]) and torch.equal(alone.step_of[0], trajectory.step_of[1])
    _, colder = drawn(model, order="random", hidden=model.schedule(5), temperature=0.5)
    assert torch.equal(colder.step_of, trajectory.step_of) and not torch.equal(colder.actions, trajectory.actions)


def branches_differ_as_they_say(model):
    prompts, trajectory = drawn(model, TEXTS[:2])
    weight = model.trunk.layers[0].self_attn.v_proj.weight
    whole, detached, cond = (model.log_prob(prompts, trajectory, which) for which in ("guided", "guided_detach_uncond", "cond"))
    assert torch.allclose(whole, detached, atol=1e-5) and not torch.allclose(whole, cond, atol=0.1)
    first, second = (torch.autograd.grad(value.mean(), weight)[0] for value in (whole, detached))
    assert first.abs().max() > 0 and second.abs().max() > 0 and not torch.allclose(first, second)
    _, unguided = drawn(model, TEXTS[:2], guidance=1.0)
    assert torch.allclose(model.log_prob(prompts, unguided, "cond"), unguided.log_prob, atol=1e-5)


def samples_are_alone_what_they_are_in_company(model):
    _, together = drawn(model)
    for row, text in enumerate(TEXTS):
        prompts = model.encode_prompts([text])
        alone = model.sample(prompts, Policy(3.0), [row + 1])
        for name in ("actions", "step_of", "log_prob"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), name
        assert torch.allclose(model.log_prob(prompts, together.select([row]))[0], together.log_prob[row], atol=1e-5)


def a_sample_is_its_seed(model):
    prompts = model.encode_prompts([TEXTS[0]] * 3)
    codes = model.sample(prompts, Policy(2.0), [5, 6, 5]).actions
    assert torch.equal(codes[0], codes[2]) and not torch.equal(codes[0], codes[1])


def the_loss_is_the_masked_cross_entropy(model):
    """Of guidance 1 in the context that the seed hides; blanked rows are those of the empty prompt."""
    from mmalign.models.layers.masked import random_masks
    from mmalign.models.layers.noise import uniforms
    from mmalign.trajectory import Trajectory

    prompts, seeds = model.encode_prompts(TEXTS), [1, 2, 3, 4]
    pixels = model.fit([picture(seed) for seed in seeds])
    loss = model.supervised_loss(prompts, pixels, seeds)
    codes = model.encode_image(pixels)
    hidden = random_masks(uniforms(seeds, codes.shape[1] + 1), codes.shape[1])
    trajectory = Trajectory("masked", codes, torch.zeros(codes.shape), Policy(1.0), tuple(seeds))
    assert torch.allclose(loss, -model.log_prob_given(prompts, trajectory, hidden).sum(1) / hidden.sum(1), atol=1e-5)
    assert torch.equal(model.supervised_loss(prompts, pixels, seeds)[0], loss[0])
    blank = model.supervised_loss(prompts, pixels, seeds, torch.tensor([True, False, False, True]))
    assert torch.allclose(blank[1:3], loss[1:3], atol=1e-5) and (blank[[0, 3]] - loss[[0, 3]]).abs().min() > 1e-4


def new_weights_and_adapters_count_at_once(model):
    prompts, before = drawn(model, TEXTS[:2])
    handles = [
        model.trunk.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 0.5),
        model.head.register_forward_hook(lambda module, inputs, output: output * 1.5),
    ]
    try:
        _, after = drawn(model, TEXTS[:2])
        assert (model.log_prob(prompts, after) - after.log_prob).abs().max() < 1e-4
    finally:
        for handle in handles:
            handle.remove()
    assert not torch.equal(before.log_prob, after.log_prob)


def lora_that_is_off_is_the_base(model):
    """Last in its module: the adapters stay."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    prompts, trajectory = drawn(model, TEXTS[:2])
    base = model.log_prob(prompts, trajectory).detach()
    with torch.random.fork_rng(devices=[]):
        names = [name for name, layer in model.net.named_modules() if isinstance(layer, torch.nn.Linear)]
        inject_adapter_in_model(LoraConfig(r=2, target_modules=names, init_lora_weights=False), model.net)
    for name, parameter in model.net.named_parameters():
        parameter.requires_grad_("lora_" in name)
    assert not torch.allclose(model.log_prob(prompts, trajectory), base, atol=1e-2)
    model.log_prob(prompts, trajectory).mean().backward()
    assert {"lora_" in name for name, parameter in model.net.named_parameters() if parameter.grad is not None} == {True}
    for layer in model.net.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(False)
    assert torch.allclose(model.log_prob(prompts, trajectory), base, atol=1e-6)


def saved_and_loaded_again_it_draws_the_same(model, family, folder):
    model.save(folder)
    again = family.load(folder)
    assert family.recognises(folder)
    asked = [request(text, seed, steps=3) for seed, text in enumerate(TEXTS[:2])]
    for one, other in zip(model.generate(asked), again.generate(asked), strict=True):
        assert np.array_equal(one.image, other.image)


def images_are_bitwise_equal_at_any_batch_size(model):
    asked = [request(TEXTS[number % len(TEXTS)], number, steps=4) for number in range(7)]
    whole = model.generate(asked)
    for size in (1, 3):
        parts = [sample for start in range(0, 7, size) for sample in model.generate(asked[start : start + size])]
        assert all(np.array_equal(one.image, other.image) for one, other in zip(parts, whole, strict=True)), size


def half_precision_stays_near(model, family, folder, bound):
    """A fresh trajectory's log-probs in bfloat16, by the same model's training forward."""
    low = family.load(folder, dtype="bfloat16")
    prompts, trajectory = drawn(low)
    assert (low.log_prob(prompts, trajectory).detach() - trajectory.log_prob).abs().max() < bound


CONTRACT = [
    fresh_ratio_is_one,
    chosen_steps_are_parts_of_the_whole,
    any_context_can_be_scored,
    the_hidden_state_is_shared_by_a_prompts_samples,
    an_order_of_chance_is_scored_and_independent_like_the_other,
    branches_differ_as_they_say,
    samples_are_alone_what_they_are_in_company,
    a_sample_is_its_seed,
    the_loss_is_the_masked_cross_entropy,
    new_weights_and_adapters_count_at_once,
    images_are_bitwise_equal_at_any_batch_size,
]
