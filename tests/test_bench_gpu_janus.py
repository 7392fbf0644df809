"""The GPU bench at tiny size on the CPU: every part is measured, and what it calls the least work is the work that is done."""

from __future__ import annotations

import json

import bench_gpu_janus as bench
import pytest
import torch


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return bench.build("tiny", "cpu", torch.float32, tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("more", [(), ("--lora-rank", "2")])
def test_every_part_is_measured(more, tmp_path, capsys):
    file = tmp_path / "figures.json"
    words = ["--size", "tiny", "--device", "cpu", "--samples", "3", "--micro-batch", "2", "--rounds", "1"]
    assert bench.main([*words, "--json", str(file), *more]) == 0
    found = json.loads(file.read_text())
    assert list(found["parts"]) == ["rollout", "log-prob", "update"] and found["chip"] == "CPU" and found["dtype"] == "float32"
    assert all(part["seconds"] > 0 and part["gib"] > 0 and part["limit"] is None for part in found["parts"].values())
    shown = capsys.readouterr().out
    assert "| rollout |" in shown and "Janus tiny, 3 pictures a step, CPU, float32" in shown


def test_the_counted_operations_are_those_of_a_forward(tiny):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from mmalign.trajectory import Policy

    prompts = tiny.encode_prompts([bench.TEXT, bench.TEXT])
    drawn = tiny.sample(prompts, Policy(1.0), [1, 2])
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not see into the fused one of a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        tiny.log_prob(prompts, drawn, "cond")
    counted = bench.forward_operations(tiny, 2, prompts.ids.shape[1])
    assert counted < counter.get_total_flops() < 1.25 * counted  # it does the whole square of attention


def test_the_limit_of_drawing_is_reading_the_weights_for_every_token(tiny):
    read = sum(
        parameter.numel() * 4
        for module in (tiny.trunk.layers, tiny.net.model.generation_head, tiny.net.model.generation_aligner)
        for parameter in module.parameters()
        if parameter.ndim == 2
    )
    few, many = bench.rollout_work(tiny, 1, 8, False), bench.rollout_work(tiny, 64, 8, True)
    assert few.bytes > tiny.tokens * read and few.bytes - tiny.tokens * read < many.bytes - tiny.tokens * read
    assert few.seconds((1e30, 1e3)) == few.bytes / 1e3 and many.seconds((1e3, 1e30)) == many.operations / 1e3
    assert few.seconds(None) is None
    keys_and_values = 2 * 2 * 48 * 4  # layers, keys and values, width, bytes
    assert few.bytes - tiny.tokens * read == keys_and_values * sum(8 + n for n in range(tiny.tokens))
