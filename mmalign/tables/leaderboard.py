"""The leaderboard: one static page over all published rows and all our results, and a page per model of ours.

`index.html` has a table per suite with a bar and interval for the headline, filters by suite, family, size, method and origin, and sorts
by any column; without a script it shows everything but the deviating rows. `models/<model>/index.html` is that model's report: every suite,
samples, galleries, provenance, and whether a metric was a training reward. The same input gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from mmalign import pages, registry, report
from mmalign.config import load_yaml
from mmalign.figures import format_number
from mmalign.leaderboards import published
from mmalign.leaderboards.published import Published, by_metric
from mmalign.store import disk_errors, slug, write_atomic
from mmalign.tables import ours
from mmalign.tables.build import suite_places
from mmalign.tables.ours import Ours

NO_METHOD = "none"
UNKNOWN = "other"
BAR_WIDTH, BAR_HEIGHT = 150, 14


@dataclass(frozen=True)
class Number:
    """A value with its 95% interval, if it has one, and what to say of it (a disagreement with its own columns)."""

    value: float
    text: str
    interval: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """One row of one suite. `origin` is published, own, ours or deviating; `page` is the model's page, for ours."""

    model: str
    source: str
    family: str
    size: str
    method: str
    origin: str
    numbers: Mapping[str, Number]
    page: str = ""
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Board:
    """One suite: its metrics, headline first, with the direction of each, and its entries, best headline first."""

    suite: str
    title: str
    metrics: tuple[str, ...]
    better: Mapping[str, str]
    entries: tuple[Entry, ...]

    @property
    def headline(self) -> str:
        return self.metrics[0]


def write(found: Sequence[Ours], out: Path) -> Path:
    """Write the leaderboard and the pages of our models into `out`; the path of its index.html."""
    shown = boards(found)
    with disk_errors(out):
        for model in dict.fromkeys(one.label for one in found):
            report.write_report([one.path for one in found if one.label == model], out / "models" / slug(model))
        write_atomic(out / "index.html", _page(shown).encode())
    return out / "index.html"


def boards(found: Sequence[Ours]) -> list[Board]:
    """A board per suite that a paper or a result has, by the number of entries."""
    tables = [table for table in published.load_all() if table.best_within is not None]
    kept = [one for by_suite in ours.usable(found).values() for one in by_suite.values()] + ours.deviating(found)
    suites = dict.fromkeys([*(suite for table in tables for suite in table.suites()), *(one.suite for one in kept)])
    shown = [_board(suite, tables, [one for one in kept if one.suite == suite]) for suite in suites]
    return sorted((board for board in shown if board.entries), key=lambda board: -len(board.entries))


def _board(suite: str, tables: Sequence[Published], found: Sequence[Ours]) -> Board:
    sources = by_metric(tables, suite)
    better = {name: column.better for _, columns in sources for name, column in columns.items()}
    for one in found:
        better |= {
            name: "higher" if metric.higher_is_better else "lower" for name, metric in one.result.metrics.items() if name not in better
        }
    headline, title = _headline(suite, better, found)
    reported = dict.fromkeys(name for _, columns in sources for name in columns) or better
    metrics = (headline, *(name for name in reported if name != headline))
    entries = [entry for table, columns in sources for entry in _published(table, columns)] + [_own(one, metrics) for one in found]
    sign = 1 if better.get(headline) == "lower" else -1
    worst = float("inf")
    entries.sort(
        key=lambda entry: (sign * entry.numbers[headline].value if headline in entry.numbers else worst, entry.model, entry.source)
    )
    return Board(suite, title, metrics, better, tuple(entries))


def _headline(suite: str, better: Mapping[str, str], found: Sequence[Ours]) -> tuple[str, str]:
    """The metric that a suite is ranked by, and the suite's title: as its results or its card say, else the overall, else the first."""
    if found:
        return found[0].result.headline, str(found[0].result.suite.get("title", suite))
    suites = registry.entries("evaluators")
    if suite in suites:
        card = registry.card(suites[suite])
        return (card.headline if card.headline in better else next(iter(better))), card.title
    return ("overall" if "overall" in better else next(iter(better))), suite


def _published(table: Published, columns: Mapping[str, published.Column]) -> list[Entry]:
    entries = []
    disagree = {(check.row, check.column): check for check in table.disagreements()}
    for row in table.rows:
        key = table.key(row)
        numbers = {}
        for name, column in columns.items():
            value = table.number(row, column.name)
            if value is None:
                continue
            check = disagree.get((key, column.name))
            note = f"published {check.published}; its own columns give {check.recomputed:.4g}" if check else ""
            text = f"{value / column.scale:.{suite_places(row[column.name], column)}f}"
            numbers[name] = Number(value / column.scale, text, note=note)
        labels = " ".join(row[name] for name, column in table.columns.items() if column.role == "label")
        if numbers:
            family, size, method = kind_of(f"{key} {labels}", table.title)
            method = table.paper.method if table.is_own(row) and method == NO_METHOD else method
            entries.append(Entry(key, table.id, family, size, method, "own" if table.is_own(row) else "published", numbers))
    return entries


def _own(one: Ours, metrics: Sequence[str]) -> Entry:
    model = one.result.model
    numbers = {}
    for name in metrics:
        metric = one.metric(name)
        if metric is not None and metric.value is not None:
            numbers[name] = Number(metric.value, format_number(metric.value), metric.ci)
    flags = [*one.reasons, *(f"{name} was a training reward" for name in one.rewards)]
    size = _size(f"{one.label} {model.get('name', '')} {model.get('source', '')}")
    method = str(model.get("trainer") or NO_METHOD)
    page = f"models/{slug(one.label)}/index.html"
    origin = "ours" if one.is_usable else "deviating"
    return Entry(one.label, "ours", str(model.get("family", UNKNOWN)), size, method, origin, numbers, page, tuple(flags))


def kind_of(labels: str, title: str) -> tuple[str, str, str]:
    """(family, size, method) of a published row by its labels, else its table's title. A size is what a name states, never a guess."""
    kinds = _kinds()
    families = [(name, family) for text in (labels, title) for name, family in kinds["families"].items() if name in text]
    method = next((name for name in kinds["methods"] if name in labels), NO_METHOD)
    method = NO_METHOD if method in kinds["untrained"] else kinds["same"].get(method, method)
    return families[0][1] if families else UNKNOWN, _size(labels) or _size(title), method


@cache
def _kinds() -> dict[str, Any]:
    return load_yaml(published.ROOT / "kinds.yaml")


def _size(text: str) -> str:
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?B)(?![\w])", text.replace("-", " "))
    return found[1] if found else ""


def _page(shown: Sequence[Board]) -> str:
    from markupsafe import Markup

    entries = [entry for board in shown for entry in board.entries]
    choices = {name: sorted({getattr(entry, name) for entry in entries} - {""}, key=_natural) for name in ("family", "size", "method")}
    counts = {origin: sum(entry.origin == origin for entry in entries) for origin in ("published", "own", "ours", "deviating")}
    return pages.render(
        "leaderboard.html.j2",
        script="leaderboard.js",
        title="mmalign leaderboard",
        body_class="wide",
        is_partial=False,
        boards=shown,
        choices=choices,
        counts=counts,
        papers=len(published.papers()),
        bar=lambda board, entry: Markup(_bar(board, entry)),
    )


def _natural(text: str) -> tuple[float, str]:
    found = re.match(r"[\d.]+", text)
    return (float(found[0]) if found else 0.0, text.lower())


def _bar(board: Board, entry: Entry) -> str:
    """The headline as a bar with its interval, on the scale that all bars of the board share."""
    numbers = [e.numbers[board.headline] for e in board.entries if board.headline in e.numbers]
    number = entry.numbers.get(board.headline)
    if number is None:
        return ""
    ends = [end for n in numbers for end in (n.value, *(n.interval or ()))]
    low, high = min(0.0, *ends), max(1.0 if all(0 <= end <= 1 for end in ends) else 0.0, *ends)

    def x_of(value: float) -> float:
        return BAR_WIDTH * (value - low) / ((high - low) or 1.0)

    start, end = sorted((x_of(0.0), x_of(number.value)))
    parts = [f'<rect class="bar" x="{start:.1f}" y="3" width="{max(end - start, 0.5):.1f}" height="8" rx="1.5"/>']
    label = f"{board.headline} {number.text}"
    if number.interval:
        left, right = map(x_of, number.interval)
        parts.append(f'<path class="whisker" d="M{left:.1f} 2v10M{left:.1f} 7H{right:.1f}M{right:.1f} 2v10"/>')
        label += f", 95% interval {format_number(number.interval[0])} to {format_number(number.interval[1])}"
    opening = f'<svg class="measure" viewBox="0 0 {BAR_WIDTH} {BAR_HEIGHT}" width="{BAR_WIDTH}" height="{BAR_HEIGHT}" role="img"'
    return f'{opening} aria-label="{escape(label)}"><title>{escape(label)}</title>{"".join(parts)}</svg>'
