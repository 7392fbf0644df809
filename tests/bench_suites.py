"""Throughput of GenEval and DPG-Bench: 200 images in batches against one at a time as the official scripts go; equal weights and values.

Not collected by default; run `python -m pytest tests/bench_suites.py --benchmark-only --benchmark-group-by=param:name`. Time is the
process's own, so that a busy machine moves it little. The loop of GenEval gives the detector one image and the colour classifier one
image's crops; that of DPG-Bench asks the VQA model one question of one image, so that an image is read anew for each. What a script keeps
between images (the colours' text embeddings) the loop keeps too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_geneval, tiny_questions
from helpers.tiny_scorers import image

from mmalign.scorers import _question_graph, dpg, geneval
from mmalign.types import Failure, Prompt, Request, Sample, Value

IMAGES = 200
BATCH = 32
SIDE = 64
THINGS = ("giraffe", "bird", "scissors")
QUESTIONS = ("Is there a cat?", "Is the cat red?", "Is there a dog?", "Is there a ball?", "Is the ball green?", "Is the dog blue?")

Scored = tuple[Any, list[Sample]]


def geneval_case(folder: Path) -> Scored:
    """Six kinds of prompts on things that the random detector finds."""
    detector, clip = tiny_geneval.make_detector(folder / "detector"), tiny_geneval.make_clip(folder / "clip")
    config = geneval.Config(detector=str(detector), clip=str(clip), resolution=SIDE, counting_threshold=0.4, batch_size=BATCH)
    prompts = []
    for number, thing in enumerate(THINGS):
        one, red = {"class": thing, "count": 1}, {"class": thing, "count": 1, "color": "red"}
        other = {"class": THINGS[number - 1], "count": 1}
        kinds = {
            "single_object": [one],
            "two_object": [one, other],
            "counting": [{"class": thing, "count": 2}],
            "colors": [red],
            "position": [one, {**other, "position": ["above", 0]}],
            "color_attr": [red, {**other, "color": "blue"}],
        }
        prompts += [Prompt(f"{thing}-{tag}", "?", (tag,), {"tag": tag, "include": include}) for tag, include in kinds.items()]
    return geneval.load(config), [drawn(prompts[at % len(prompts)], at) for at in range(IMAGES)]


def dpg_case(folder: Path) -> Scored:
    """Prompts of six questions, each but the first depending on the one before."""
    blip = str(tiny_questions.blip(folder))
    asked = [{"number": at, "text": text, "parents": [at - 1] if at > 1 else []} for at, text in enumerate(QUESTIONS, start=1)]
    prompts = [Prompt(f"p{at}", "?", (), {"questions": asked}) for at in range(IMAGES // 4)]
    scorer = dpg.load(dpg.Config(vqa="blip", blip=blip, processor=blip, resolution=32, batch_size=BATCH))
    return scorer, [drawn(prompts[at // 4], at) for at in range(IMAGES)]


def drawn(prompt: Prompt, at: int) -> Sample:
    return Sample(Request(prompt, 0, at), image(at, SIDE, SIDE))


def values(scores: list[Any]) -> list[float]:
    assert all(isinstance(score, Value) for score in scores), scores
    return [score.x for score in scores]


def in_batches(name: str, scorer: Any, samples: list[Sample]) -> list[float]:
    return values(scorer.score(samples))


def one_at_a_time(name: str, scorer: Any, samples: list[Sample]) -> list[float]:
    if name == "geneval":
        return [values(scorer.score([sample]))[0] for sample in samples]
    return [by_question(scorer, sample) for sample in samples]


def by_question(scorer: Any, sample: Sample) -> float:
    questions = _question_graph.questions_of(sample)
    assert not isinstance(questions, Failure), questions
    answers: dict[int, float] = {}
    for question in questions:
        prompt = replace(sample.request.prompt, meta={"questions": [{"number": 1, "text": question.text, "parents": []}]})
        answers[question.number] = in_batches("dpg", scorer, [replace(sample, request=replace(sample.request, prompt=prompt))])[0]
    return _question_graph.score(questions, answers)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scored]:
    torch.set_num_threads(1)
    return {name: case(tmp_path_factory.mktemp(name)) for name, case in (("geneval", geneval_case), ("dpg", dpg_case))}


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("way", [one_at_a_time, in_batches], ids=["loop", "batch"])
@pytest.mark.parametrize("name", ["geneval", "dpg"])
def test_throughput(cases: dict[str, Scored], name: str, way: Callable[..., list[float]], benchmark: Any) -> None:
    scorer, samples = cases[name]
    expected = in_batches(name, scorer, samples)
    found = benchmark.pedantic(way, (name, scorer, samples), rounds=3)
    assert found == expected and len(set(found)) > 1, "values that are all equal would show nothing"
