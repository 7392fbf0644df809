"""The report: run directories in, a folder of static HTML out that opens from disk.

`index.html` holds the headline table and, per suite, a figure, the failures, the deviations and where the numbers come from; under
`gallery/` is one page per run with every image, and one page per pair of models on the same prompts and seeds. Style, script and data are
in the pages; the content security policy admits only that style and script (by hash), images from disk, and nothing from a network.
The same input gives the same bytes: no date appears but those in the results.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmalign import figures, gallery, pages, results, stats
from mmalign.figures import format_number, format_signed
from mmalign.store import disk_errors, slug, write_atomic
from mmalign.training_report import is_training_run, write_training_report
from mmalign.types import KINDS, Metric, Result, Row, UsageError, digest

PAGE_SIZE = 200  # images that a gallery shows at once
STRIP = 8  # images of a run that the front page shows
GALLERY = "gallery"
THUMBNAILS = "thumbnails"


@dataclass(frozen=True)
class Run:
    """One run as the pages see it. `label` names it among the runs of its suite, `slug` among all of the report."""

    directory: Path
    result: Result
    rows: list[Row]
    items: list[gallery.Item]
    label: str
    slug: str
    is_cut: bool = False  # the words of an unsafe suite are cut short

    @property
    def suite(self) -> str:
        return str(self.result.suite["name"])

    @property
    def title(self) -> str:
        return str(self.result.suite.get("title", self.suite))

    @property
    def metric(self) -> Metric:
        return self.result.metrics[self.result.headline]

    @property
    def protocol(self) -> str:
        """`official`, or what differs from the protocol card."""
        if not self.result.deviations:
            return "official"
        return "official except " + ", ".join(f"{item.field}={item.used} (card: {item.official})" for item in self.result.deviations)

    @property
    def failed(self) -> int:
        return sum(self.result.counts.failed.values())

    @property
    def status(self) -> str:
        return "partial (limit)" if self.result.status == "partial" else self.result.status

    @property
    def is_unsafe(self) -> bool:
        return bool(self.result.suite.get("unsafe"))

    @property
    def page(self) -> str:
        return f"{GALLERY}/{self.slug}.html"

    @property
    def lower_is_better(self) -> list[str]:
        """The scorers whose smaller values are better; a scorer that does not say follows the headline."""
        better = self.metric.higher_is_better
        return [name for name, facts in self.result.scorers.items() if not facts.get("higher_is_better", better)]


def write_report(run_dirs: Sequence[Path], out: Path | None = None, show_unsafe: bool = False) -> Path:
    """Write the pages of these runs (or the page of one training run) into `out` and return the path of index.html.

    The prompts and answers of unsafe suites are cut short unless `show_unsafe`; their images are blurred until the page is told otherwise.
    Without `out` one run's report goes into its own directory, that of several into `report/` beside them. UsageError for a directory
    without a result; MmalignError for rows or results that cannot be read and for a folder that cannot be written.
    """
    if any(map(is_training_run, run_dirs)):
        if len(run_dirs) > 1:
            raise UsageError("A training run has a page of its own: give its folder alone. Results of `mmalign eval` share a report.")
        return write_training_report(run_dirs[0], out, show_unsafe)
    runs = read_runs(run_dirs, show_unsafe)
    if out is None:
        folders = [str(run.directory.resolve()) for run in runs]
        out = runs[0].directory if len(runs) == 1 else Path(os.path.commonpath(folders)) / "report"
    with disk_errors(out):
        for run in runs:
            gallery.write_thumbnails(run.items, run.directory, out / GALLERY / THUMBNAILS)
            write_atomic(out / run.page, _gallery_page(run, out).encode())
        by_suite: dict[str, list[Run]] = {}
        for run in runs:
            by_suite.setdefault(run.suite, []).append(run)
        suites = [_suite(members, out) for members in by_suite.values()]
        write_atomic(out / "index.html", _front_page(runs, suites).encode())
    return out / "index.html"


def read_runs(run_dirs: Sequence[Path], show_unsafe: bool = False) -> list[Run]:
    """The runs at these places, with labels that tell them apart. A place is a result's JSON file, a run directory (its newest
    result), or a folder of run directories. UsageError when one of them has no result."""
    if not run_dirs:
        raise UsageError("No run was given. Name one or more run directories: mmalign report results/<model>/<suite>")
    files = list(dict.fromkeys(file for place in run_dirs for file in _result_files(place)))
    found = [(file, results.read(file)) for file in files]
    names = [(str(result.model["name"]), str(result.suite["name"])) for _, result in found]
    runs: list[Run] = []
    for (file, result), (model, suite) in zip(found, names, strict=True):
        is_alone = names.count((model, suite)) == 1
        label, own = model, f"{slug(model)}--{slug(suite)}"
        if not is_alone:
            label, own = f"{model} ({result.run[:8]})", f"{own}--{slug(result.run)}"
        if own in {run.slug for run in runs}:  # one command's result in two folders
            label, own = f"{model} ({file.parent})", f"{own}--{digest(str(file.resolve()))[:8]}"
        rows = results.read_rows(results.rows_path(file))
        items = [gallery.item_of(row) for row in rows]
        is_cut = bool(result.suite.get("unsafe")) and not show_unsafe
        items = [gallery.hide_words(item) for item in items] if is_cut else items
        gallery.mark_disagreement(items, list(result.scorers))
        runs.append(Run(file.parent, result, rows, items, label, own, is_cut))
    return runs


def _result_files(place: Path) -> list[Path]:
    """The newest result file of every run directory at or below a place."""
    if place.suffix == ".json":
        return [place]
    newest: dict[Path, tuple[str, Path]] = {}
    for file in results.find(place):
        ended = str(results.read(file).provenance.get("ended", ""))
        newest[file.parent] = max(newest.get(file.parent, ("", file)), (ended, file))
    if not newest:
        raise UsageError(f"There is no result in {place}: expected <run>.json with <run>.rows.parquet. Make one with `mmalign eval`.")
    return [file for _, file in newest.values()]


def _front_page(runs: Sequence[Run], suites: Sequence[Mapping[str, Any]]) -> str:
    models = list(dict.fromkeys(run.label for run in runs))
    scored, failed = sum(run.result.counts.scored for run in runs), sum(run.failed for run in runs)
    return pages.render(
        "report.html.j2",
        script="copy.js",
        title=f"{', '.join(models)}: evaluation report",
        heading=", ".join(models),
        lead=f"{len(suites)} {'suite' if len(suites) == 1 else 'suites'}, {scored:,} images scored, {failed:,} failed.",
        body_class="",
        is_partial=all(run.result.status == "partial" for run in runs),
        suites=suites,
        has_models=len(models) > 1,
        has_bounds=any(pages.open_bounds(run.metric) for run in runs),
    )


def _suite(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """What the front page shows of one suite; its comparisons are written on the way."""
    from markupsafe import Markup

    first = runs[0]
    lines = [
        figures.Line(
            name + ("" if all(run.result.metrics[name].higher_is_better for run in runs if name in run.result.metrics) else " ↓"),
            tuple(_dot(run.result.metrics.get(name)) for run in runs),
            is_headline=name == first.result.headline,
        )
        for name in dict.fromkeys([first.result.headline, *(name for run in runs for name in run.result.metrics)])
    ]
    labels = [run.label for run in runs]
    first_failed = next((run for run in runs if run.failed), None)
    return {
        "anchor": slug(first.suite),
        "title": first.title,
        "plots": [Markup(figures.dot_plot(panel, labels, f"{first.title}: metrics")) for panel in figures.panels(lines)],
        "keys": [Markup(figures.series_key(index)) for index in range(len(runs))],
        "has_bounds": any(dot and dot.bounds for line in lines for dot in line.dots),
        "comparisons": [_comparison(first, run, out) for run in runs[1:]],
        "runs": [_run(run, run is first_failed) for run in runs],
    }


def _run(run: Run, is_first_failed: bool) -> dict[str, Any]:
    """What the front page shows of one run."""
    counts = run.result.counts.failed
    kinds = [kind for kind in KINDS if any(key.endswith(f"/{kind}") for key in counts)]
    stages = dict.fromkeys(key.split("/")[0] for key in counts)
    provenance = {name: value for name, value in run.result.provenance.items() if name not in ("command", "warnings")}
    strip, rule = _strip(run)
    sources = (
        ("Model", run.result.model),
        ("Suite", run.result.suite),
        ("Sampling", run.result.sampling),
        ("Scorers", run.result.scorers),
        ("Run", {"run": run.result.run, **provenance, "rows_digest": run.result.rows_digest, "schema": run.result.schema}),
    )
    return {
        "run": run,
        "rewards": results.reward_overlap(run.result),
        "line": results.paste_line(run.result),
        "command": run.result.provenance.get("command", ""),
        "continue_line": results.continue_line(run.result),
        "warnings": run.result.provenance.get("warnings", ()),
        "strip": strip,
        "strip_rule": rule,
        "is_first_failed": is_first_failed,
        "kinds": kinds,
        "stages": [(stage, [counts.get(f"{stage}/{kind}", 0) for kind in kinds]) for stage in stages],
        "provenance": [(title, facts) for title, content in sources if (facts := _flatten(content))],
    }


def _strip(run: Run) -> tuple[list[dict[str, Any]], str]:
    """A few images for the front page: the first of each tag, or of each prompt where there is one tag; and the rule in words."""
    both = zip(run.rows, run.items, strict=True)
    shown = [(row, item) for row, item in both if item["cells"][0]["sha"] and "lost" not in item["cells"][0]]
    is_by_tag = len({row.tag for row, _ in shown}) > 1
    first: dict[str, dict[str, Any]] = {}
    for row, item in shown:
        cell = {
            "href": f"{run.page}#{quote(item['id'], safe='')}",
            "source": f"{GALLERY}/{_thumbnail(item['cells'][0]['sha'])}",
            "prompt": item["prompt"],
            "caption": row.tag if is_by_tag else "",
            "tiny": item["cells"][0].get("tiny", False),
        }
        first.setdefault(row.tag if is_by_tag else row.request.prompt.id, cell)
    return list(first.values())[:STRIP], "the first image of each tag" if is_by_tag else "the first image of each of the first prompts"


def _gallery_page(run: Run, out: Path) -> str:
    failed = sum(bool(item["cells"][0]["failures"]) for item in run.items)
    orders = [("suite", "in suite order"), ("worst", "worst first"), ("best", "best first")]
    if any("spread" in item for item in run.items):
        orders.append(("spread", "scorers disagree most"))
    return _items_page(
        runs=[run],
        items=run.items,
        scorers=list(run.result.scorers),
        out=out,
        title=f"{run.title}, {run.label}: gallery",
        heading=f"{run.title}, {run.label}",
        lead=f"{run.result.headline} {format_number(run.metric.value)}, protocol {run.protocol}.{gallery.CUT if run.is_cut else ''}",
        views=[("all", f"All {len(run.items):,}"), ("failed", f"Failed {failed:,}"), ("worst", "Worst tenth")],
        orders=orders,
        outcome=None,
    )


def _comparison(first: Run, second: Run, out: Path) -> dict[str, Any]:
    """Write the page of two models' pairs; what the front page shows of it. Larger is better here, whatever the scorer's direction."""
    from markupsafe import Markup

    scorers = [name for name in first.result.scorers if name in second.result.scorers]
    pairs = gallery.pair(first.items, second.items)
    outcome = None
    if scorers:
        gains = _gains(pairs, scorers[0], -1 if scorers[0] in first.lower_is_better else 1)
        wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        counted = (f"{second.label} better", wins), ("equal", len(gains) - wins - losses), (f"{first.label} better", losses)
        parts = [(style, *one) for style, one in zip(("series-1", "tie", "series-0"), counted, strict=True)]
        shares = ", ".join(f"{label} in {number:,}" for label, number in counted)
        caption = f"{scorers[0]} on {len(gains):,} pairs of one prompt and one seed: {shares}. {_difference(first, second, scorers[0])}"
        bar = Markup(figures.outcome_bar(parts, f"{second.label} against {first.label}"))
        outcome = {"bar": bar, "caption": caption}
    better = [("wins", f"{second.label} better"), ("ties", "Equal"), ("losses", f"{first.label} better")] if scorers else []
    page = _items_page(
        runs=[first, second],
        items=pairs,
        scorers=scorers,
        out=out,
        title=f"{first.title}: {second.label} against {first.label}",
        heading=f"{second.label} against {first.label}",
        lead=f"{first.title}, {len(pairs):,} pairs of images with one prompt and one seed.",
        views=[("all", f"All {len(pairs):,}"), *better, ("failed", "One failed")],
        orders=[("suite", "in suite order"), ("best", "largest gain first"), ("worst", "largest loss first")],
        outcome=outcome,
    )
    path = f"{GALLERY}/{second.slug}--against--{first.slug}.html"
    write_atomic(out / path, page.encode())
    return {"first": first.label, "second": second.label, "outcome": outcome, "page": path}


def _gains(pairs: Sequence[gallery.Item], scorer: str, sign: int) -> list[float]:
    """Second minus first of each pair in which both models have a value, times `sign`."""
    values = ([cell["scores"].get(scorer, {}).get("value") for cell in item["cells"]] for item in pairs)
    return [sign * (after - before) for before, after in values if before is not None and after is not None]


def _difference(first: Run, second: Run, scorer: str) -> str:
    """The paired difference of the scorer's mean in a sentence, over the rows that have the same prompt and seed."""

    def mean(rows: Sequence[Row]) -> dict[str, float | None]:
        return {scorer: sum(row.value(scorer).x for row in rows) / len(rows) if rows else None}

    asked = {(row.request.id, row.request.prompt.text, row.request.seed) for row in first.rows}
    same = [row for row in second.rows if (row.request.id, row.request.prompt.text, row.request.seed) in asked]
    found = stats.paired_difference(same, first.rows, mean, scorer)
    if found.value is None:
        return "No pair has both values."
    text = f"Mean difference {format_signed(found.value)}"
    if found.ci is None or found.detectable is None:
        return f"{text}; too few prompts for an interval."
    verdict = "" if found.is_significant else ", so it may be noise"
    interval = f"[{format_signed(found.ci[0])}, {format_signed(found.ci[1])}]"
    return f"{text}, 95% interval {interval}{verdict}; such data reveal differences of {format_number(found.detectable)} and more."


def _items_page(*, runs: Sequence[Run], items: Sequence[gallery.Item], scorers: Sequence[str], out: Path, **content: Any) -> str:
    """A page over embedded items; the script shows PAGE_SIZE of them at a time."""
    from markupsafe import Markup

    is_unsafe = any(run.is_unsafe for run in runs)
    folder = (out / GALLERY).resolve()
    data = {
        "items": items,
        "models": [run.label for run in runs],
        "originals": [quote(os.path.relpath(run.directory.resolve() / "store" / "images", folder)) for run in runs],
        "scorers": scorers,
        "lower": runs[0].lower_is_better,
        "pageSize": PAGE_SIZE,
    }
    return pages.render(
        "gallery.html.j2",
        script="gallery.js",
        body_class=" ".join(["wide", *(["pairs"] if len(runs) == 2 else []), *(["unsafe"] if is_unsafe else [])]),
        is_partial=any(run.result.status == "partial" for run in runs),
        is_unsafe=is_unsafe,
        tags=list(dict.fromkeys(tag for item in items for tag in item["tags"])),
        scorers=scorers,
        data=Markup(gallery.embed_json(data)),
        **content,
    )


def _dot(metric: Metric | None) -> figures.Dot | None:
    return None if metric is None else figures.Dot(metric.value, metric.ci, pages.open_bounds(metric))


def _thumbnail(sha: str) -> str:
    return f"{THUMBNAILS}/{sha[:2]}/{sha}.webp"


def _flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted name, text) pairs in the order of the file; empty values are left out."""
    facts: list[tuple[str, str]] = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            facts.extend(_flatten(value, f"{prefix}{name}."))
        elif value not in (None, "", [], ()):
            facts.append((f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)))
    return facts
