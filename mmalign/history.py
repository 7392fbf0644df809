"""What a training run leaves to look at: its figures step by step, its pictures, and what the figures say in words.

    metrics.jsonl               one JSON object a line: {"step": n, figure: number, ...}; written by the loop, always
    <kind>/step-000010/         pictures of a step: 00.png, 01.png, ... and album.json {"title", "captions"}, written last
    gains/step-000010.json      {"title", "gains"}: a group's reward gains, by sample and denoising step
    evaluations.json            base and trained checkpoint beside each other, when they were evaluated

Kinds of pictures: `samples` are the same prompts and seeds each time; `rollouts` is a group of the step's own samples; `grounding` shows
pairs of the step with what their tokens were used for.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.types import MmalignError

METRICS, ALBUM, EVALUATIONS = "metrics.jsonl", "album.json", "evaluations.json"
Line = dict[str, float]


@dataclass(frozen=True)
class Album:
    """The pictures of one step: a file and a caption each, and what they have in common."""

    step: int
    title: str
    files: tuple[Path, ...]
    captions: tuple[str, ...]


def read_metrics(run: Path) -> list[Line]:
    """The lines of a run's metrics log; a last line that was cut off by a crash is left out."""
    file = run / METRICS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    try:
        return [json.loads(line) for number, line in enumerate(lines, 1) if number < len(lines) or line.endswith("}")]
    except ValueError as error:
        raise MmalignError(f"{file} holds a line that is no JSON ({error}). Remove that line, or train into another --run-dir.") from error


def append_metrics(run: Path, line: Line) -> None:
    with (run / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def truncate_metrics(run: Path, step: int) -> None:
    """Drops log lines of later steps, which will be done again."""
    if (run / METRICS).exists():
        aside = run / f"{METRICS}.tmp"
        aside.write_text("".join(json.dumps(line) + "\n" for line in read_metrics(run) if line["step"] <= step), encoding="utf-8")
        os.replace(aside, run / METRICS)


def write_album(run: Path, kind: str, step: int, pictures: Sequence[tuple[Any, str]], title: str = "") -> Path:
    """Keeps pictures (uint8 [H, W, 3]) with their captions and returns the folder; a folder without album.json is unfinished."""
    from mmalign.images import encode_png

    folder = run / kind / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ALBUM).unlink(missing_ok=True)
    for number, (image, _) in enumerate(pictures):
        (folder / f"{number:02d}.png").write_bytes(encode_png(image))
    content = {"title": title, "captions": [caption for _, caption in pictures]}
    (folder / ALBUM).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def read_albums(run: Path, kind: str) -> list[Album]:
    """The finished albums of a kind, by step."""
    found = []
    for file in sorted((run / kind).glob(f"step-*/{ALBUM}")):
        content = json.loads(file.read_text(encoding="utf-8"))
        captions = tuple(content["captions"])
        pictures = tuple(file.parent / f"{number:02d}.png" for number in range(len(captions)))
        found.append(Album(int(file.parent.name.removeprefix("step-")), content["title"], pictures, captions))
    return found


@dataclass(frozen=True)
class Gains:
    """The reward gains of one group: `rows` by sample, each by denoising step, the noisiest first. None where a reward is missing."""

    step: int
    title: str
    rows: tuple[tuple[float | None, ...], ...]


def write_gains(run: Path, step: int, title: str, rows: Sequence[Sequence[float]]) -> None:
    """Keeps a group's gains; what is no number is kept as None."""
    content = {"title": title, "gains": [[value if math.isfinite(value) else None for value in row] for row in rows]}
    file = run / "gains" / f"step-{step:06d}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, file)


def read_gains(run: Path) -> list[Gains]:
    """The groups whose gains were kept, by step."""
    found = []
    for file in sorted((run / "gains").glob("step-*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        found.append(Gains(int(file.stem.removeprefix("step-")), content["title"], tuple(tuple(row) for row in content["gains"])))
    return found


def trend(values: Sequence[float]) -> float | None:
    """The change from the first to the last third's mean; 0 where it is within twice its standard error, None under six values."""
    third = len(values) // 3
    if third < 2:
        return None
    first, last = values[:third], values[-third:]
    means = [sum(part) / third for part in (first, last)]
    variance = sum(sum((v - m) ** 2 for v in part) / (third - 1) / third for part, m in zip((first, last), means, strict=True))
    change = means[1] - means[0]
    return change if abs(change) > 2 * math.sqrt(variance) else 0.0


def panel_headline(metrics: Sequence[Line]) -> str | None:
    """The panel's first figure: its suite's headline. The others are its parts, too noisy on so few prompts to be judged one by one."""
    return next((name for line in metrics for name in line if name.startswith("panel/")), None)


def hacking_note(metrics: Sequence[Line], reward: str = "reward") -> str | None:
    """A sentence when the training reward rises while the held-out headline falls, by `trend`; None otherwise."""
    name = panel_headline(metrics)
    if name is None or (_trend_of(metrics, reward) or 0) <= 0 or (_trend_of(metrics, name) or 0) >= 0:
        return None
    return (
        f"The training reward rises while {name.removeprefix('panel/')} on held-out prompts falls: the model may be exploiting its reward."
    )


def verdict(metrics: Sequence[Line], reward: str = "reward") -> str:
    """What reward (the loss, without one) and panel say together, always a sentence: exploited, both named, or why it cannot be told."""
    name = panel_headline(metrics)
    has_reward = any(reward in line for line in metrics) or not any("loss" in line for line in metrics)
    if not has_reward:
        return _loss_verdict(metrics, name)
    if name is None:
        return "No held-out panel was measured, so an exploited reward could not be seen: train with --panel SUITE --panel-every N."
    changes = _trend_of(metrics, reward), _trend_of(metrics, name)
    if None in changes:
        number = sum(name in line for line in metrics)
        return f"The panel was measured {number} times; from six on, the trends of reward and held-out prompts can be compared."
    words = ["rises" if change > 0 else "falls" if change < 0 else "shows no trend" for change in changes if change is not None]
    calm = f"The training reward {words[0]}; {name.removeprefix('panel/')} on held-out prompts {words[1]}."
    return hacking_note(metrics, reward) or f"{calm} No sign of an exploited reward."


def _loss_verdict(metrics: Sequence[Line], panel: str | None) -> str:
    """What the loss of a run without a reward and the panel say, as far as they can be judged."""
    names = [("The training loss", "loss"), *([] if panel is None else [(f"{panel.removeprefix('panel/')} on held-out prompts", panel)])]
    told = []
    for words, name in names:
        change = _trend_of(metrics, name)
        if change is None:
            told.append(f"{words} has been measured {sum(name in line for line in metrics)} times; its trend can be told from six on")
        else:
            told.append(f"{words} {'rises' if change > 0 else 'falls' if change < 0 else 'shows no trend'}")
    missing = "" if panel else " No held-out panel was measured: train with --panel SUITE --panel-every N."
    return "; ".join(told) + "." + missing


def _trend_of(metrics: Sequence[Line], name: str) -> float | None:
    return trend([line[name] for line in metrics if name in line])
