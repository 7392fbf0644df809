"""Runs made by hand, written by the real writers: small coloured images, scores and holes that are functions of the seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmalign import images, results, stats
from mmalign.store import image_path, slug, write_atomic
from mmalign.types import Counts, Deviation, Failure, Prompt, Request, Result, Row, Sample, Status, Value, request_seed

TAGS = ("single object", "two objects", "counting", "colors", "position", "colour attribution")
COLOURS = {"red": (190, 60, 50), "blue": (60, 90, 170), "green": (70, 140, 80), "yellow": (220, 180, 70), "purple": (120, 80, 150)}


def make_prompts(count: int) -> list[Prompt]:
    """Prompts over six tags, in blocks as benchmarks have them."""
    names = list(COLOURS)
    return [
        Prompt(
            f"{number:05d}", f"a photo of a {names[number % 5]} square and {number % 7} small things", (TAGS[number * len(TAGS) // count],)
        )
        for number in range(count)
    ]


def picture(prompt: Prompt, seed: int, side: int) -> np.ndarray:
    """A square of the prompt's first colour on a light ground, placed by the seed; uint8 [side, side, 3]."""
    generator = random.Random(seed)
    image_HWC = np.full((side, side, 3), [generator.randrange(225, 250) for _ in range(3)], np.uint8)
    colour = next((rgb for name, rgb in COLOURS.items() if name in prompt.text), (80, 80, 80))
    length = side // 3
    top, left = generator.randrange(side - length), generator.randrange(side - length)
    image_HWC[top : top + length, left : left + length] = colour
    return image_HWC


def make_run(
    results_folder: Path,
    prompts: Sequence[Prompt],
    *,
    model: str = "tiny-janus",
    suite: str = "shapes",
    images_per_prompt: int = 1,
    side: int = 32,
    skill: float = 0.6,
    failures: Sequence[str] = (),
    scorers: Sequence[str] = ("shapes",),
    status: Status | None = None,
    deviations: Sequence[Deviation] = (),
    **facts: object,
) -> Path:
    """Write one run and return its directory. `failures` are "stage/kind" of the first rows; `facts` replace entries of `suite`."""
    directory = results_folder / slug(model) / slug(suite)
    rows = []
    for prompt in prompts:
        for index in range(images_per_prompt):
            request = Request(prompt, index, request_seed(42, prompt.id, index))
            hole = failures[len(rows)] if len(rows) < len(failures) else None
            rows.append(_row(directory, request, model, side, skill, scorers, hole))
    write_atomic(directory / "store" / "lock", b"{}")
    scored = [row for row in rows if row.failure is None]
    metrics = stats.metrics(scored, _aggregate(scorers[0]))
    if failures:
        spans = stats.bounds(rows, _aggregate(scorers[0]), {name: (0.0, 1.0) for name in scorers})
        metrics = {name: replace(metric, bounds=spans.get(name)) for name, metric in metrics.items()}
    counted = {hole: list(failures).count(hole) for hole in failures}
    generated = sum(isinstance(row.sample, Sample) for row in rows)
    result = Result(
        run=hashlib.sha256(f"{model} {suite} {len(rows)}".encode()).hexdigest()[:12],
        model={
            "name": model,
            "spec": model,
            "family": "janus",
            "fingerprint": "0f" * 16,
            **({"trained_on_rewards": facts.pop("rewards")} if "rewards" in facts else {}),
        },
        suite={
            "name": suite,
            "title": suite.capitalize(),
            "split": "test",
            "prompts": len(prompts),
            "images_per_prompt": images_per_prompt,
            **facts,
        },
        sampling={"settings": {"guidance": 5.0, "temperature": 1.0}, "size": None, "seed": 42},
        scorers={name: {"fingerprint": "ab" * 16, "options": {}, "range": [0.0, 1.0]} for name in scorers},
        counts=Counts(len(rows), generated, len(scored), counted, 0),
        metrics=metrics,
        headline="overall",
        status=status or ("incomplete" if failures else "complete"),
        deviations=tuple(deviations),
        rows_digest=results.rows_digest(rows),
        provenance={
            "command": f"mmalign eval --model {model} --suite {suite}",
            "version": "0.1.0",
            "git": "39f38b0",
            "started": "2026-02-03T10:00:00+00:00",
            "ended": "2026-02-03T10:04:00+00:00",
            "warnings": [],
        },
    )
    results.write(directory, result, rows)
    return directory


def _row(directory: Path, request: Request, model: str, side: int, skill: float, scorers: Sequence[str], hole: str | None) -> Row:
    if hole and hole.startswith("generate"):
        failure = Failure("generate", hole.split("/")[1], "The worker ended while it drew this image.")  # type: ignore[arg-type]
        return Row(request, failure, dict.fromkeys(scorers, failure))
    png = images.encode_png(picture(request.prompt, request.seed, side))
    sha = images.content_sha(png)
    path = image_path(directory, sha)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png)
    sample = Sample(request, image_sha=sha, seconds=0.25)
    if hole:
        return Row(request, sample, dict.fromkeys(scorers, Failure("score", hole.split("/")[1], "The reply holds no number.")))  # type: ignore[arg-type]
    scores = {}
    for position, name in enumerate(scorers):
        generator = random.Random(f"{model} {request.seed} {position}")
        facts = [float(generator.random() < skill) for _ in range(4)]
        parts = dict(zip(("shape", "colour", "count", "place"), facts, strict=True))
        scores[name] = Value(sum(facts) / 4, parts, detail=f"{int(sum(facts))} of 4 facts hold")
    return Row(request, sample, scores)


def _aggregate(scorer: str):
    def aggregate(rows: Sequence[Row]) -> dict[str, float | None]:
        def mean(some: Sequence[Row]) -> float | None:
            return sum(row.value(scorer).x for row in some) / len(some) if some else None

        tags = dict.fromkeys(row.tag for row in rows)
        return {"overall": mean(rows), **{tag: mean([row for row in rows if row.tag == tag]) for tag in tags}}

    return aggregate
