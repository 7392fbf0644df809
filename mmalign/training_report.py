"""The report of a training run: one static page in the run's folder that opens from disk, of a run that goes on or has ended.

Curves of its figures, pictures of the same prompts over time, groups of samples with their rewards (in dense runs with their token weights
too), the base and the trained checkpoint beside each other, and in words whether the reward was exploited. Pictures stay where they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmalign import curves, gain_report, history, pages
from mmalign.curves import Curve
from mmalign.gallery import CUT, TINY, cut_short
from mmalign.history import Album, Line
from mmalign.store import disk_errors, write_atomic
from mmalign.types import MmalignError

RUN = "run.json"
COLUMNS = 8  # steps that the pictures over time show
GROUPS = 4  # groups of samples that the page shows
# Title, figures by prefix, and what the reader should know of them. A chart without a figure is left out.
CHARTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("Loss", ("loss", "loss/drawing", "loss/answers"), "Mean over the step's pairs: hidden image tokens, and tokens of the answers."),
    ("Reward", ("reward", "reward/", "watched/"), "Mean over the step's samples."),
    (
        "Right tokens",
        ("copy_rate", "fill_rate"),
        "How often the most probable code of a hidden token is right: where a hint showed it, and where none did.",
    ),
    ("Hidden tokens", ("hidden",), "Share of the image tokens that the loss counts."),
    ("Pairs that could not be read", ("skipped",), "In the step; skipped.json names them."),
    ("Spread within a group", ("spread",), "Mean standard deviation of a prompt's rewards: what there is to learn from."),
    ("KL to the starting model", ("kl",), "Per decision."),
    ("Ratio before the first update", ("ratio_deviation",), "Largest difference from 1; 0 where sampling and scoring agree."),
    ("Clipped decisions", ("clipped",), "Share of decisions whose gradient the clip removed."),
    ("Gradient norm", ("grad_norm",), "Before clipping."),
    ("Samples without a reward, groups without a difference", ("failed", "flat_groups"), "Share of samples; number of groups."),
    ("Token weights", ("weight_mean", "map_top_mass"), "Mean weight; share of a map that its greatest tenth holds."),
    ("Seconds a step", ("seconds/",), "By part of the step."),
)
AIMS = 2  # the first charts: what the run learns by


def is_training_run(place: Path) -> bool:
    return (place / RUN).is_file()


def write_training_report(run: Path, out: Path | None = None, show_unsafe: bool = False) -> Path:
    """Write `index.html` of a run's folder (into `out` if given) and return its path. MmalignError for a log that cannot be read.

    Where a prompt comes from an unsafe suite all prompts are cut short and the pictures blurred, unless `show_unsafe`.
    """
    try:
        facts = json.loads((run / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MmalignError(f"{run / RUN} cannot be read ({error}). Name the folder of a run that `mmalign train` made.") from error
    folder = out or run
    with disk_errors(folder):
        write_atomic(folder / "index.html", _page(run, facts, folder, bool(facts.get("unsafe")) and not show_unsafe).encode())
    return folder / "index.html"


def _page(run: Path, facts: Mapping[str, Any], folder: Path, is_cut: bool) -> str:
    metrics = history.read_metrics(run)
    done, steps = int(metrics[-1]["step"]) if metrics else 0, facts["config"]["steps"]
    samples, groups, gains = history.read_albums(run, "samples"), history.read_albums(run, "rollouts"), history.read_gains(run)
    if is_cut:
        samples = [replace(album, captions=tuple(map(cut_short, album.captions))) for album in samples]
        groups = [replace(album, title=cut_short(album.title)) for album in groups]
        gains = [replace(group, title=cut_short(group.title)) for group in gains]
    return pages.render(
        "training.html.j2",
        script="copy.js",
        title=f"{run.resolve().name}: training report",
        heading=run.resolve().name,
        lead=f"{facts['trainer']} from {facts['model']['name']}, {_taught(facts)}; step {done} of {steps}.{CUT if is_cut else ''}",
        body_class="unsafe" if is_cut else "",
        is_partial=False,
        verdict=history.verdict(metrics),
        is_exploited=history.hacking_note(metrics) is not None,
        evaluations=_evaluations(run, folder),
        charts=_charts(metrics, (0, done)),
        panel_parts=_panel_charts(metrics, (0, done))[1:],
        denoising=[_chart(one.title, one.curves, one.note, (0, one.last)) for one in gain_report.step_charts(run, metrics, gains)],
        times=_times(metrics),
        samples=_over_time(_spread(samples, COLUMNS), folder),
        grounding=[_group(album, folder) for album in _spread(history.read_albums(run, "grounding"), GROUPS)],
        groups=[_group(album, folder) for album in _spread(groups, GROUPS)],
        is_dense=any(name.startswith("map_") for line in metrics for name in line),
        options=_options(facts),
    )


def _taught(facts: Mapping[str, Any]) -> str:
    """What the run learned from, in words."""
    if facts.get("data"):
        return f"{facts['pairs']['number']} pairs of {facts['data']}"
    rewards = " + ".join(f"{weight:g} {name}" for name, weight in facts["reward"].items()) or "the model's own understanding"
    return f"reward {rewards}, prompts {facts['prompts']}"


def _charts(metrics: Sequence[Line], span: tuple[int, int]) -> list[dict[str, Any]]:
    """The charts of the page: the panel's headline after the aims, the others as CHARTS lists them."""
    found = [_chart(title, _curves(metrics, prefixes), note, span) for title, prefixes, note in CHARTS]
    return [chart for chart in (*found[:AIMS], *_panel_charts(metrics, span)[:1], *found[AIMS:]) if chart]


def _panel_charts(metrics: Sequence[Line], span: tuple[int, int]) -> list[dict[str, Any]]:
    """The held-out panel: its headline alone, then its parts in charts of as many curves as can be told apart."""
    headline = history.panel_headline(metrics)
    if headline is None:
        return []
    every = _curves(metrics, ("panel/",))
    first = [curve for curve in every if f"panel/{curve.name}" == headline]
    rest = [curve for curve in every if curve not in first]
    batches = [rest[at : at + curves.MOST] for at in range(0, len(rest), curves.MOST)]
    whole = _chart("Held-out prompts", first, "Measured on prompts that the training does not see.", span)
    return [chart for chart in (whole, *(_chart("Held-out prompts, parts", batch, "", span) for batch in batches)) if chart]


def _chart(title: str, shown: Sequence[Curve], note: str, span: tuple[int, int]) -> dict[str, Any] | None:
    from markupsafe import Markup

    if not shown:
        return None
    legend = [(Markup(curves.key(number)), curve.name, curve.last) for number, curve in enumerate(shown)]
    return {"title": title, "svg": Markup(curves.chart(shown, title, span)), "legend": legend, "note": note}


def _curves(metrics: Sequence[Line], prefixes: Sequence[str]) -> list[Curve]:
    """Curves of the named figures, and of all below a name that ends in '/'. A lone part equals its sum and is left out."""
    names = dict.fromkeys(
        name
        for prefix in prefixes
        for line in metrics
        for name in line
        if (name.startswith(prefix) if prefix.endswith("/") else name == prefix)
    )
    parts = [name for name in names if name.startswith("reward/")]
    if len(parts) == 1 and [line.get(parts[0]) for line in metrics] == [line.get("reward") for line in metrics]:
        del names[parts[0]]
    found = []
    for name in list(names)[: curves.MOST] if "panel/" not in prefixes else names:
        points = tuple((line["step"], line[name]) for line in metrics if name in line)
        found.append(Curve(name.removeprefix("panel/").removeprefix("seconds/"), points))
    return found


def _times(metrics: Sequence[Line]) -> list[tuple[str, float, float | None]]:
    """(part, seconds, share of the step) over the run. Panel and pictures come beside the steps and have no share."""
    totals: dict[str, float] = {}
    for line in metrics:
        for name, value in line.items():
            if name.startswith("seconds/"):
                totals[name.removeprefix("seconds/")] = totals.get(name.removeprefix("seconds/"), 0.0) + value
    step = totals.get("step")
    if not step:
        return []
    beside = ("panel", "pictures")
    number = sum("seconds/step" in line for line in metrics)
    return [(name, value / number, None if name in beside else value / step) for name, value in totals.items()]


def _evaluations(run: Path, folder: Path) -> list[dict[str, Any]]:
    """Base and trained checkpoint by suite, with a link to the suite's own report when it lies in the run's folder."""
    file = run / history.EVALUATIONS
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    for item in found:
        page = run / f"report-{item['suite']}" / "index.html"
        item["page"] = _link(page, folder) if page.is_file() else ""
    return found


def _over_time(albums: Sequence[Album], folder: Path) -> dict[str, Any]:
    """A row per prompt, a column per step. A picture that was not drawn at a step is a gap."""
    prompts = list(dict.fromkeys(caption for album in albums for caption in album.captions))
    cells = [dict(zip(album.captions, album.files, strict=True)) for album in albums]
    rows = [(prompt, [_picture(cell[prompt], folder) if prompt in cell else None for cell in cells]) for prompt in prompts]
    return {"steps": [album.step for album in albums], "rows": rows}


def _group(album: Album, folder: Path) -> dict[str, Any]:
    pictures = [(_picture(file, folder), caption) for file, caption in zip(album.files, album.captions, strict=True)]
    return {"step": album.step, "prompt": album.title, "pictures": pictures}


def _picture(file: Path, folder: Path) -> dict[str, Any]:
    from PIL import Image

    with Image.open(file) as image:
        return {"source": _link(file, folder), "tiny": image.height < TINY}


def _link(file: Path, folder: Path) -> str:
    return quote(os.path.relpath(file.resolve(), folder.resolve()))


def _spread(albums: Sequence[Album], number: int) -> list[Album]:
    """At most so many albums, evenly over the run, the first and the last among them."""
    if len(albums) <= number:
        return list(albums)
    return [albums[round(at * (len(albums) - 1) / (number - 1))] for at in range(number)]


def _options(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    chosen = {name: value for name, value in facts.items() if name != "config"}
    return [(name, json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value))
            for name, value in {**chosen, **facts["config"]}.items() if value not in (None, "", {})]  # fmt: skip
