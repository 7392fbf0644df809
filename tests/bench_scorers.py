"""Throughput of the local scorers: batches of 32 against one image at a time, same tiny weights, equal values.

Not collected by default; run `python -m pytest tests/bench_scorers.py --benchmark-only --benchmark-group-by=param:name`.
The loop does what the official scripts do for each image: preprocess, tokenise and encode the prompt, run both towers, read the number.
Groups of eight images share a prompt, as in training.
"""

from __future__ import annotations

import pytest
from helpers.tiny_scorers import image, loaders, sample

NAMES = ("clipscore", "pickscore", "hpsv2", "aesthetic", "imagereward", "toxicity", "nsfw", "safety")
SAMPLES = [sample(number, f"a red cat on mat {number // 8}", image(number, 64, 64)) for number in range(32)]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    return loaders(tmp_path_factory.mktemp("weights"))


def forget(scorer: object) -> None:
    """Drop what the scorer remembers of prompts, as a script that scores one image does."""
    for held in (scorer, getattr(scorer, "clip", None)):
        for name in ("_texts", "_tokens"):
            getattr(held, name, {}).clear()


def one_at_a_time(scorer) -> list[float]:
    values = []
    for item in SAMPLES:
        forget(scorer)
        values += [score.x for score in scorer.score([item])]
    return values


def in_batches(scorer) -> list[float]:
    forget(scorer)
    return [score.x for score in scorer.score(SAMPLES)]


@pytest.mark.parametrize("way", [one_at_a_time, in_batches], ids=["loop", "batch"])
@pytest.mark.parametrize("name", NAMES)
def test_throughput(load, name: str, way, benchmark) -> None:
    scorer = load[name](32)
    values = benchmark.pedantic(way, (scorer,), rounds=5, warmup_rounds=1)
    assert values == pytest.approx(one_at_a_time(scorer), abs=1e-5)
