"""Gradient checkpointing keeps gradients and drawings as they are and holds less in memory, in every family of tokens."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_masked import make_dimoo, make_mmada, make_showo

from mmalign import registry
from mmalign.hub import CHECKPOINTS
from mmalign.loop import _checkpoint_activations
from mmalign.trajectory import Policy

MAKERS = {"janus": None, "mmada": make_mmada, "lumina_dimoo": make_dimoo, "showo": make_showo}
TEXTS = ["a red circle", "two blue squares and a green cross"]


def fresh(family: str, folder):
    load = registry.load(registry.find("models", family)).load
    if MAKERS[family] is None:
        return load(CHECKPOINTS / "tiny-janus")
    MAKERS[family](folder, layers=4)
    model = load(folder)
    if family == "lumina_dimoo":
        model.grid = (4, 4)  # the released model's 64 x 64 tokens would be slow here
    return model


def gradients(model, prompts, trajectory):
    """Gradients of the log-probability of a drawing, and how many bytes its graph held."""
    held = []
    model.net.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: held.append(kept.numel() * kept.element_size()) or kept, lambda kept: kept):
        total = model.log_prob(prompts, trajectory).sum()
    total.backward()
    return {name: p.grad for name, p in model.net.named_parameters() if p.grad is not None}, sum(held)


@pytest.mark.parametrize("family", list(MAKERS))
def test_gradients_and_drawings_stay_and_memory_falls(family, tmp_path):
    model = fresh(family, tmp_path)
    prompts = model.encode_prompts(TEXTS)
    trajectory = model.sample(prompts, Policy(2.0, 1.0), [1, 2])
    plain, bytes_plain = gradients(model, prompts, trajectory)
    _checkpoint_activations(model.net)
    again = model.sample(prompts, Policy(2.0, 1.0), [1, 2])
    assert torch.equal(again.actions, trajectory.actions) and torch.equal(again.log_prob, trajectory.log_prob)
    saved, bytes_saved = gradients(model, prompts, trajectory)
    assert plain.keys() == saved.keys() and all(torch.allclose(plain[name], saved[name], atol=1e-6) for name in plain)
    assert bytes_saved < 0.7 * bytes_plain, (bytes_saved, bytes_plain)
