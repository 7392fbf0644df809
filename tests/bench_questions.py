"""Throughput of the scorers that ask: 32 samples at once against one at a time, same tiny weights, equal values.

Not collected by default; run `python -m pytest tests/bench_questions.py --benchmark-only --benchmark-group-by=param:name`.
Prompts come in groups of eight images, as in training.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import tiny_questions as tiny

from mmalign.reward import load_scorer

SAMPLES = [tiny.sample(f"a red car and {('a cat', 'a dog', 'a green ball', 'two dogs')[at // 8]}", at, size=(48, 48)) for at in range(32)]
OPTIONS = {
    "blip_vqa": lambda root: {"model": str(tiny.blip(root)), "processor": str(root), "resolution": 32, "is_rounded": False},
    "git": lambda root: {"model": str(tiny.git(root))},
    "vqascore": lambda root: (
        dict(zip(("model", "vision"), map(str, tiny.clip_t5(root)), strict=True)) | {"tokenizer": str(root), "dtype": "float32"}
    ),
    "orm": lambda root: {"model": str(tiny.llava_next(root)[0]), "dtype": "float32"},
    "groundingdino": lambda root: {"model": str(tiny.grounding_dino(root)), "resolution": 96},
    "hpsv3": lambda root: (
        dict(zip(("weights", "base"), map(str, tiny.hpsv3(root)[:2]), strict=True)) | {"pixels": 3136, "dtype": "float32"}
    ),
    "rahf": lambda root: {"weights": str(root)} if tiny.rahf(root) else {},
}


def one_at_a_time(scorer) -> list[float]:
    """What the official scripts do: one image, and of it one question, after the other."""
    scorer.config = replace(scorer.config, batch_size=1)
    return [scorer.score([sample])[0].x for sample in SAMPLES]


def in_batches(scorer) -> list[float]:
    scorer.config = replace(scorer.config, batch_size=32)
    return [score.x for score in scorer.score(SAMPLES)]


@pytest.mark.parametrize("way", [one_at_a_time, in_batches], ids=["loop", "batch"])
@pytest.mark.parametrize("name", OPTIONS)
def test_throughput(name: str, way, benchmark, tmp_path) -> None:
    scorer = load_scorer(name, OPTIONS[name](tmp_path / name))
    values = benchmark.pedantic(way, (scorer,), rounds=5, warmup_rounds=1)
    assert values == pytest.approx(one_at_a_time(scorer), abs=1e-5)
