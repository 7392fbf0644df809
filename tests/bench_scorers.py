"""Throughput of every local scorer: batches of 32 against one image at a time as the official scripts go, same tiny weights, equal values.

Not collected by default; run `python -m pytest tests/bench_scorers.py --benchmark-only --benchmark-group-by=param:name`. Time is the
process's own, so that a busy machine moves it little. The loop does for each image what the official script does: preprocess, tokenise and
encode the text, run the network, read the number; scorers that ask of each noun encode the image anew for each, as T2I-R1's GIT reward and
T2I-CompBench's BLIP-VQA do. Groups of eight images share a prompt, as in training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from helpers.every_scorer import MAKERS, Cases
from helpers.tiny_scorers import image, sample

from mmalign.scorers import _phrases
from mmalign.types import Sample, Scorer, Value

REMOTE = {"deqa", "remote", "unifiedreward", "unipercept"}
OWN_WORLD = {"geneval", "self_understanding", "shapes", "shapes_preference", "shapes_safety"}  # these score prompts with facts of their own
NAMES = sorted(set(MAKERS) - REMOTE - {"ocr"})
FOLDS: dict[str, Callable[[list[float]], float]] = {"git": lambda found: sum(found) / len(found), "blip_vqa": math.prod}
ENDINGS = ("a cat", "a dog", "a green ball", "two dogs")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    torch.set_num_threads(1)
    with Cases(tmp_path_factory.mktemp("weights")) as found:
        yield found


def samples_of(cases: Cases, name: str) -> list[Sample]:
    if name in OWN_WORLD:
        few = cases[name].samples()
        return [few[number // 8] for number in range(32)]
    return [sample(number, f"a red car and {ENDINGS[number // 8]}", image(number, 64, 64)) for number in range(32)]


def forget(scorer: object) -> None:
    """Drop what the scorer remembers of prompts, as a script that scores one image does."""
    for held in (scorer, getattr(scorer, "clip", None)):
        for memory in ("_texts", "_tokens"):
            getattr(held, memory, {}).clear()


def value(scorer: Scorer, item: Sample) -> float:
    forget(scorer)
    (score,) = scorer.score([item])
    assert isinstance(score, Value), score
    return score.x


def one_at_a_time(name: str, scorer: Scorer, samples: list[Sample]) -> list[float]:
    if name not in FOLDS:
        return [value(scorer, item) for item in samples]
    found = []
    for item in samples:
        prompt = item.request.prompt
        asked = [replace(prompt, meta={"nouns": [noun]}) for noun in _phrases.phrases(prompt, "rule", ())]
        found.append(FOLDS[name]([value(scorer, replace(item, request=replace(item.request, prompt=one))) for one in asked]))
    return found


def in_batches(name: str, scorer: Scorer, samples: list[Sample]) -> list[float]:
    forget(scorer)
    return [score.x for score in scorer.score(samples) if isinstance(score, Value)]


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("way", [one_at_a_time, in_batches], ids=["loop", "batch"])
@pytest.mark.parametrize("name", NAMES)
def test_throughput(cases: Cases, name: str, way: Callable[..., list[float]], benchmark) -> None:
    scorer, samples = cases[name].load(32), samples_of(cases, name)
    values = benchmark.pedantic(way, (name, scorer, samples), rounds=5, warmup_rounds=1)
    assert values == pytest.approx(one_at_a_time(name, scorer, samples), abs=1e-5)
