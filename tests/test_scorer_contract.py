"""What every local scorer promises: order, batches, failures in place of numbers, and an identity that follows its weights."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers.tiny_scorers import image, loaders, sample

from mmalign.types import Failure, Scorer, Value

NAMES = ("clipscore", "pickscore", "hpsv2", "aesthetic", "imagereward", "toxicity", "nsfw", "safety", "ocr", "jpeg_size")
TEXT_ONLY = {"toxicity"}
IMAGE_ONLY = {"aesthetic", "nsfw", "jpeg_size"}
WITH_WEIGHTS = tuple(name for name in NAMES if name not in ("ocr", "jpeg_size"))
PROMPTS = ('a red cat that says "hello"', 'a blue dog on the mat that says "you"', 'you idiot says "cat"')


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    return loaders(tmp_path_factory.mktemp("weights"))


def samples(count: int = 7) -> list:
    return [sample(number, PROMPTS[number % 3]) for number in range(count)]


def numbers(scores: list) -> list[float]:
    assert all(isinstance(score, Value) for score in scores), scores
    return [score.x for score in scores]


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_1_3_and_7_agree_and_keep_order(load, name: str) -> None:
    scorers = {size: load[name](size) for size in (1, 3, 7)}
    assert isinstance(scorers[1], Scorer)
    alone = [numbers(scorers[1].score([item]))[0] for item in samples()]
    assert len(set(alone)) >= 3, "the samples must differ, or order shows nothing"
    for scorer in scorers.values():
        assert numbers(scorer.score(samples())) == pytest.approx(alone, abs=1e-5)
        assert numbers(scorer.score(samples()[::-1])) == pytest.approx(alone[::-1], abs=1e-5)
        assert scorer.fingerprint == scorers[1].fingerprint, "the batch size is no part of what is measured"
        low, high = scorer.range
        assert all(low <= number <= high for number in alone)


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_measured_is_a_failure_and_harms_no_neighbour(load, name: str) -> None:
    scorer = load[name](7)
    bad = {
        "missing": sample(1, picture=None),
        "unreadable": sample(2, picture=b"no image at all"),
        "floats": sample(3, picture=image(3) / 255.0),
        "1x1": sample(4, picture=image(4)[:1, :1].copy()),
        "empty prompt": sample(5, "  "),
        "endless prompt": sample(6, 'says "cat" ' * 1000),
    }
    good = sample(0)
    scores = dict(zip(["before", *bad, "after"], scorer.score([good, *bad.values(), good]), strict=True))
    assert numbers([scores["before"], scores["after"]]) == pytest.approx(numbers(scorer.score([good])) * 2, abs=1e-5)
    of_images = {"missing", "unreadable", "floats", "1x1"}
    for problem in bad:
        indifferent = name in (TEXT_ONLY if problem in of_images else IMAGE_ONLY)
        score = scores[problem]
        assert isinstance(score, Value if indifferent else Failure), (problem, score)
        if isinstance(score, Failure):
            assert score.stage == "score" and score.kind == ("missing" if problem in ("missing", "empty prompt") else "error")
            assert bad[problem].request.id in score.message


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_nan_weights_give_failures(load, name: str) -> None:
    scorer = load[name](4)
    for module in modules(scorer):
        for parameter in module.parameters():
            parameter.data.fill_(math.nan)
    assert [score.kind for score in scorer.score(samples(3))] == ["nonfinite"] * 3


@pytest.mark.parametrize("name", NAMES)
def test_a_value_is_the_same_when_asked_twice(load, name: str) -> None:
    assert numbers(load[name](3).score(samples())) == numbers(load[name](3).score(samples()))


def modules(scorer: object) -> list[torch.nn.Module]:
    """Every network in a scorer's fields and in those of what it holds."""
    held = [getattr(scorer, item.name) for item in fields(scorer)]
    networks = [value for value in held if isinstance(value, torch.nn.Module)]
    for value in held:
        if hasattr(value, "__dataclass_fields__"):
            networks += modules(value)
    return networks


def test_every_scorer_says_what_it_needs() -> None:
    from mmalign import registry

    found = registry.entries("scorers")
    assert set(NAMES) <= set(found)
    for name in WITH_WEIGHTS:
        assert all(need.startswith("weights: ") for need in found[name].needs) and found[name].needs, name
    assert found["ocr"].needs == ("extra: ocr",) and Path(found["ocr"].path).name == "ocr.py"
