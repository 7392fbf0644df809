"""What every scorer promises: order, batches, failures in place of numbers, one value for row and reward, an identity of its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.every_scorer import MAKERS, Cases, networks
from helpers.tiny_scorers import image

from mmalign import registry, scoring
from mmalign.executors import Inline
from mmalign.images import encode_png
from mmalign.reward import load_reward
from mmalign.types import Failure, Sample, Score, Scorer, Value

NAMES = tuple(MAKERS)
SIZES = (1, 3, 7)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    with Cases(tmp_path_factory.mktemp("weights")) as found:
        yield found


def numbers(scores: list[Score]) -> list[float]:
    assert all(isinstance(score, Value) for score in scores), scores
    return [score.x for score in scores if isinstance(score, Value)]


def with_text(sample: Sample, text: str) -> Sample:
    return replace(sample, request=replace(sample.request, prompt=replace(sample.request.prompt, text=text)))


def test_no_scorer_of_weights_is_left_out() -> None:
    """A scorer that is a suite's own rule is tested with its suite."""
    suites = registry.entries("evaluators")
    own = {name for name, entry in registry.entries("scorers").items() if "weights" in str(entry.needs) and name not in suites}
    assert own <= set(NAMES), f"tests/helpers/every_scorer.py lacks {sorted(own - set(NAMES))}"


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_1_3_and_7_agree_and_keep_order(cases: Cases, name: str) -> None:
    case = cases[name]
    samples, scorers = case.samples(), {size: case.load(size) for size in SIZES}
    assert isinstance(scorers[1], Scorer) and scorers[1].name == name
    alone = [numbers(scorers[1].score([sample]))[0] for sample in samples]
    assert alone != alone[::-1], "the samples must differ, or order shows nothing"
    for size, scorer in scorers.items():
        parts = [samples[at : at + size] for at in range(0, len(samples), size)]
        assert [number for part in parts for number in numbers(scorer.score(part))] == pytest.approx(alone, abs=1e-5)
        assert numbers(scorer.score(samples[::-1])) == pytest.approx(alone[::-1], abs=1e-5)
        assert scorer.fingerprint == scorers[1].fingerprint, "the batch size is no part of what is measured"
        low, high = scorer.range
        assert all(low <= number <= high for number in alone)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_a_benchmark_is_the_reward_bit_for_bit(cases: Cases, name: str, tmp_path: Path) -> None:
    case = cases[name]
    samples, lines = case.samples(), []
    for number, sample in enumerate(samples):
        (tmp_path / f"{number}.png").write_bytes(encode_png(sample.image))
        prompt = sample.request.prompt
        lines.append(json.dumps({"image": f"{number}.png", "prompt": prompt.text, **prompt.meta}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    scores = scoring.score_folder(tmp_path, tmp_path / "prompts.jsonl", {name: case.recipe}, Inline())
    rows = numbers([row.scores[name] for row in scores.rows])
    reward = load_reward({name: 1.0}, overrides={name: case.options})
    assert rows == reward(samples).parts[name].tolist() == reward(samples).total.tolist()
    assert scores.scorers[name].fingerprint == reward.scorers[name].fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_measured_is_a_failure_and_harms_no_neighbour(cases: Cases, name: str) -> None:
    case = cases[name]
    scorer, good = case.load(8), case.samples()[0]
    of_image = {
        "missing": replace(good, image=None),
        "unreadable": replace(good, image=b"no image at all"),
        "floats": replace(good, image=image(3) / 255.0),
        "1x1": replace(good, image=image(4)[:1, :1].copy()),
    }
    of_text = {"empty prompt": with_text(good, "  "), "endless prompt": with_text(good, 'says "cat" ' * 1000)}
    problems = {**of_image, **of_text}
    scores = dict(zip(["before", *problems, "after"], scorer.score([good, *problems.values(), good]), strict=True))
    assert numbers([scores["before"], scores["after"]]) == pytest.approx(numbers(scorer.score([good])) * 2, abs=1e-5)
    for problem in problems:
        score, is_read = scores[problem], case.reads_image if problem in of_image else case.reads_text
        assert isinstance(score, Failure if is_read else Value), (problem, score)
        if isinstance(score, Failure):
            assert score.stage == "score" and score.kind == ("missing" if problem in ("missing", "empty prompt") else "error"), score
            assert good.request.id in score.message or "holds no image" in score.message


@pytest.mark.parametrize("name", NAMES)
def test_nan_weights_give_failures(cases: Cases, name: str) -> None:
    case = cases[name]
    if not case.has_weights:
        assert "weights" not in str(registry.find("scorers", name).needs), "a scorer of weights must show what it makes of damaged ones"
        return
    scorer = case.load(4)
    found = networks(scorer)
    assert found
    for network in found:
        for parameter in network.parameters():
            parameter.data.fill_(math.nan)
    assert [getattr(score, "kind", score) for score in scorer.score(case.samples()[:3])] == ["nonfinite"] * 3


@pytest.mark.parametrize("name", NAMES)
def test_a_value_is_the_same_when_asked_twice(cases: Cases, name: str) -> None:
    first, second, samples = cases[name].load(3), cases[name].load(3), cases[name].samples()
    assert numbers(first.score(samples)) == numbers(second.score(samples)) == numbers(first.score(samples))


@pytest.mark.parametrize("name", NAMES)
def test_every_scorer_says_what_it_needs(name: str) -> None:
    needs = registry.find("scorers", name).needs
    assert all(need.startswith(("weights: ", "extra: ")) or need == "endpoint" for need in needs)
    in_the_package = {"jpeg_size", "shapes", "shapes_preference", "shapes_safety"}
    assert bool(needs) != (name in in_the_package)
