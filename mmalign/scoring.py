"""Score a folder of images: `mmalign score --images DIR --prompts FILE --scorers hpsv2,ocr` as functions.

The prompts of images come from a file of one of three forms, by its ending:

    .txt     one prompt a line, for the images in the order of their names (4 lines and 8 images: two images for each line)
    .json    {"image name": "prompt", ...}
    .jsonl   one {"image": name, "prompt": text, ...} a line; every further field is metadata of the prompt (nouns, task_type, ...)

Without a file every prompt is empty, which suits scorers that look at the image alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.executors import Executor
from mmalign.types import Failure, MmalignError, Prompt, Request, Sample, Score, UsageError, Value
from mmalign.worker import Description, Picture, Recipe

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FOLDER = ".report"  # how a folder ends that holds the page and maps of an earlier run: no images to score
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Scored:
    """One image with what every scorer said of it. `name` is its path in the folder."""

    name: str
    path: Path
    sample: Sample
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class Scores:
    """All images in order, and what each scorer says of itself."""

    rows: Sequence[Scored]
    scorers: Mapping[str, Description]

    @property
    def failures(self) -> int:
        return sum(isinstance(score, Failure) for row in self.rows for score in row.scores.values())

    def summary(self) -> list[dict[str, Any]]:
        """One line per scorer: mean (None where nothing was measured), least, greatest, images, failures by kind."""
        lines = []
        for name in self.scorers:
            scores = [row.scores[name] for row in self.rows]
            values = [score.x for score in scores if isinstance(score, Value)]
            kinds = [score.kind for score in scores if isinstance(score, Failure)]
            lines.append(
                {
                    "scorer": name,
                    "mean": sum(values) / len(values) if values else None,
                    "least": min(values, default=None),
                    "greatest": max(values, default=None),
                    "images": len(values),
                    "failed": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
                }
            )
        return lines


def score_folder(
    images: Path, prompts: Path | None, recipes: Mapping[str, Recipe], executor: Executor, batch: int = 16, report: Report = lambda *_: None
) -> Scores:
    """Score every image of the folder with every scorer; `report(scorer, done, total)` is called as it goes."""
    pictures = list(read_folder(images, prompts))
    found: list[dict[str, Score]] = [{} for _ in pictures]
    described = {}
    for name, recipe in recipes.items():
        with executor.open(recipe) as session:
            described[name], done = session.description, 0
            for outcomes in session.run(pictures, batch):
                for position, outcome in outcomes:
                    found[position][name] = outcome.result  # type: ignore[assignment]
                done += len(outcomes)
                report(name, done, len(pictures))
    paths = [picture.path or images for picture in pictures]
    rows = [
        Scored(path.relative_to(images).as_posix(), path, picture.sample, scores)
        for path, picture, scores in zip(paths, pictures, found, strict=True)
    ]
    return Scores(rows, described)


def read_folder(images: Path, prompts: Path | None) -> Iterator[Picture]:
    """The images in the order of their names (numbers as numbers), each with its prompt."""
    if not images.is_dir():
        raise UsageError(f"--images {images}: there is no such folder.")
    found = (path for path in images.rglob("*") if path.suffix.lower() in ENDINGS)
    kept = [path for path in found if not any(part.endswith(FOLDER) for part in path.relative_to(images).parts[:-1])]
    paths = sorted(kept, key=lambda path: natural(str(path.relative_to(images))))
    if not paths:
        raise UsageError(f"--images {images}: there is no image in it ({', '.join(ENDINGS)}).")
    names = [path.relative_to(images).as_posix() for path in paths]
    for index, (path, prompt) in enumerate(zip(paths, prompts_of(names, prompts), strict=True)):
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        yield Picture(Sample(Request(prompt, index, index), image_sha=sha), path)


def prompts_of(names: Sequence[str], file: Path | None) -> list[Prompt]:
    """A prompt for each image name; UsageError when the file and the folder do not fit."""
    if file is None:
        return [Prompt(name, "") for name in names]
    if not file.is_file():
        raise UsageError(f"--prompts {file}: there is no such file.")
    try:
        if file.suffix == ".txt":
            return _by_line(names, file)
        by_name = _by_name(file)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"--prompts {file} is not of its form ({type(error).__name__}: {error}). The forms: {__doc__}") from error
    absent = [name for name in names if name not in by_name and Path(name).name not in by_name]
    if absent:
        raise UsageError(f"--prompts {file} has no prompt for {len(absent)} of {len(names)} images, first {absent[0]}.")
    return [by_name.get(name) or by_name[Path(name).name] for name in names]


def _by_line(names: Sequence[str], file: Path) -> list[Prompt]:
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or len(names) % len(lines):
        raise UsageError(f"--prompts {file} has {len(lines)} lines for {len(names)} images; expected as many, or a whole share of them.")
    each = len(names) // len(lines)
    return [Prompt(name, lines[position // each]) for position, name in enumerate(names)]


def _by_name(file: Path) -> dict[str, Prompt]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return {name: Prompt(name, str(prompt)) for name, prompt in json.loads(text).items()}
    if file.suffix != ".jsonl":
        raise UsageError(f"--prompts {file}: expected a .txt, .json or .jsonl file.")
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    return {
        line["image"]: Prompt(
            line["image"], line["prompt"], meta={key: value for key, value in line.items() if key not in ("image", "prompt")}
        )
        for line in lines
    }


def cell(value: Any) -> str:
    """A table's cell: numbers to four digits, a dash for nothing, failures as "2 oom, 1 error"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{number} {kind}" for kind, number in value.items()) or "-"
    return "-" if value is None else f"{value + 0:.4g}" if isinstance(value, float) else str(value)  # + 0: no minus before a zero


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key in which 2.png comes before 10.png."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def write_parquet(scores: Scores, path: Path) -> None:
    """One row per image and scorer: image, prompt, scorer, its fingerprint, value (null for a hole), parts, detail, failure."""
    import pandas as pd

    rows = []
    for row in scores.rows:
        for name, score in row.scores.items():
            value, failure = (score, None) if isinstance(score, Value) else (None, score)
            rows.append(
                {
                    "image": str(row.path),
                    "image_sha": row.sample.image_sha,
                    "prompt": row.sample.request.prompt.text,
                    "scorer": name,
                    "fingerprint": scores.scorers[name].fingerprint,
                    "value": value.x if value else None,
                    "parts": json.dumps(dict(value.parts)) if value else None,
                    "detail": value.detail if value else None,
                    "failure_kind": failure.kind if isinstance(failure, Failure) else None,
                    "failure_message": failure.message if isinstance(failure, Failure) else None,
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        pd.DataFrame(rows).astype({"value": "float64"}).to_parquet(path, index=False)
    except OSError as error:
        raise MmalignError(f"The scores cannot be written to {path}: {error}. Name another file with --out.") from error


def self_test(recipes: Mapping[str, Recipe], executor: Executor) -> dict[str, str]:
    """Load each scorer and let it judge one picture: "ready: 0.42 in 1.3 s", or the sentence that says what is missing."""
    report = {}
    for name, recipe in recipes.items():
        try:
            report[name] = _judged(recipe, executor)
        except MmalignError as error:
            report[name] = f"not ready: {error}"
    return report


def _judged(recipe: Recipe, executor: Executor) -> str:
    with executor.open(recipe) as session:
        for outcomes in session.run([Picture(self_test_sample(), None)], 1):
            for _, (result, seconds) in outcomes:
                return f"ready: {result.x:.4g} in {seconds:.1f} s" if isinstance(result, Value) else f"loaded, but: {result}"
    return "loaded, but it gave no score"


def self_test_sample() -> Sample:
    """A red disc beside a blue square on white, with the metadata that the scorers of prompts with parts need."""
    import numpy as np

    rows, columns = np.mgrid[:256, :256]
    picture = np.full((256, 256, 3), 255, np.uint8)
    picture[(rows - 128) ** 2 + (columns - 72) ** 2 < 48**2] = (220, 30, 30)
    picture[88:168, 144:224] = (30, 60, 220)
    nouns = {"nouns": ["red disc", "blue square"], "attr_nouns": ["a red disc", "a blue square"], "task_type": "object"}
    things = [{"class": "frisbee", "count": 1}]
    facts = {"tag": "single_object", "include": things, "exclude": []}
    return Sample(Request(Prompt("self-test", 'a red disc and a blue square with the text "OK"', meta={**nouns, **facts}), 0, 0), picture)


def write_maps(
    scores: Scores, recipes: Mapping[str, Recipe], tool: str, device: str, folder: Path, batch: int = 16
) -> dict[tuple[str, str], Path]:
    """Writes each measured image under the map of what earned its score, <folder>/<image>.<scorer>.<tool>.png, by (image, scorer).

    Images that a scorer could not measure have no map. Images of one size are explained together.
    """
    from itertools import groupby
    from typing import cast

    import torch

    from mmalign import config, registry
    from mmalign.attribution import Attribution, attribute
    from mmalign.attribution.maps import overlay
    from mmalign.images import decode_image, encode_png
    from mmalign.store import write_atomic

    options = config.build(Attribution, {"tool": tool}, "--attribution")
    written = {}
    for name, recipe in recipes.items():
        module = registry.load(recipe.entry)
        scorer = module.load(config.build(module.Config, recipe.overrides, name), device)
        rows = [(row, decode_image(row.path)) for row in scores.rows if isinstance(row.scores[name], Value)]
        rows.sort(key=lambda pair: pair[1].shape)
        for _, alike in groupby(rows, key=lambda pair: pair[1].shape):
            same = list(alike)
            for part in (same[at : at + batch] for at in range(0, len(same), batch)):
                pixels = torch.stack([torch.from_numpy(image.copy()) for _, image in part]).permute(0, 3, 1, 2).float() / 255
                maps = attribute(options, scorer, pixels.to(device), [row.sample.request.prompt for row, _ in part])
                for (row, image), weights in zip(part, maps.weights, strict=True):
                    written[row.name, name] = path = folder / f"{row.name}.{name}.{tool}.png"
                    write_atomic(path, encode_png(cast(Any, overlay(image, weights))))
    return written
