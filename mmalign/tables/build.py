"""Published rows and our own in one table: as a paper prints it, or over all papers for one suite.

A published cell is printed as it was published, with a footnote where its own columns give another number. Our rows carry 95% intervals and
stand unmarked only when the result is complete and deviates from its card in nothing; with `everything` the others follow with a dagger and
the deviation. A metric that was also a training reward has a double dagger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mmalign.leaderboards.published import Column, Published, by_metric, decimals
from mmalign.registry import suggest
from mmalign.tables import ours
from mmalign.tables.layout import DAGGER, DOUBLE_DAGGER, Cell, Header, Line, Table, letter, ranked
from mmalign.tables.ours import Ours
from mmalign.types import Metric, UsageError

OURS = "ours"


class Footnotes:
    """Collects footnotes in the order in which their cells are met; one sentence has one symbol."""

    def __init__(self) -> None:
        self.items: list[tuple[str, str]] = []

    def add(self, sentence: str) -> str:
        """The letter of a sentence."""
        known = {text: symbol for symbol, text in self.items}
        if sentence not in known:
            self.items.append((letter(sum(symbol not in (DAGGER, DOUBLE_DAGGER) for symbol, _ in self.items)), sentence))
            return self.items[-1][0]
        return known[sentence]

    def mark(self, symbol: str, sentence: str) -> str:
        """A dagger: one symbol for many sentences, each of which names its row."""
        if (symbol, sentence) not in self.items:
            self.items.append((symbol, sentence))
        return symbol


def paper_table(published: Published, found: Sequence[Ours] = (), everything: bool = False) -> Table:
    """A paper's table with our rows below its own."""
    footnotes = Footnotes()
    columns = list(published.columns.values())
    lines = [_published_line(published, row, columns, footnotes) for row in published.rows]
    own = [(label, by_suite, "") for label, by_suite in ours.usable(found).items()]
    own += [(one.label, {one.suite: one}, "; ".join(one.reasons)) for one in ours.deviating(found) if everything]
    for part in published.parts():
        lines += [line for one in own if (line := _our_line(part, *one, footnotes))]
    headers = tuple(Header(c.name, _direction(c, published), c.role == "number", c.unit) for c in columns)
    source = f"{published.paper.title}. {published.source['place']} ({published.source['status']}), {published.source['address']}"
    return Table(published.id, published.title, source, headers, ranked(headers, lines), tuple(footnotes.items), published.notes)


def suite_table(suite: str, tables: Sequence[Published], found: Sequence[Ours], everything: bool = False) -> Table:
    """All that is known of a suite: one row per published row of every paper, and ours. Values are in the suite's own units.

    Equal names of different papers stay different rows, each with its table. UsageError when neither papers nor results have the suite.
    """
    footnotes = Footnotes()
    sources = [(table, columns) for table, columns in by_metric(tables, suite) if table.best_within is not None]
    own = [by_suite[suite] for by_suite in ours.usable(found).values() if suite in by_suite]
    own += [one for one in ours.deviating(found) if everything and one.suite == suite]
    metrics = list(dict.fromkeys(name for _, columns in sources for name in columns))
    if not metrics and own:
        metrics = list(own[0].result.metrics)
    if not sources and not own:
        known = {name for table in tables for name in table.suites()} | {one.suite for one in found}
        raise UsageError(f"Neither the papers nor the results have the suite '{suite}'{suggest(suite, known)}")
    better = {name: column.better for _, columns in sources for name, column in columns.items()}
    for one in own:
        for name, metric in one.result.metrics.items():
            better.setdefault(name, "higher" if metric.higher_is_better else "lower")
    widest = {
        name: max((suite_places(row[c.name], c) for table, columns in sources if (c := columns.get(name)) for row in table.rows), default=3)
        for name in metrics
    }
    lines = [line for table, columns in sources for line in _suite_lines(table, columns, metrics, footnotes)]
    for one in own:
        cells = [_metric_cell(one.metric(name), 1.0, widest[name]) for name in metrics]
        label = _label(one.label, {suite: one}, footnotes, "; ".join(one.reasons))
        origin = "ours" if one.is_usable else "deviating"
        lines.append(Line((Cell(label), Cell(OURS), *cells), origin))  # type: ignore[arg-type]
    headers = (Header("model"), Header("table"), *(Header(name, better.get(name, ""), True) for name in metrics))
    papers = "".join(f"{name}, " for name in dict.fromkeys(table.paper.name for table, _ in sources))
    return Table(suite, f"{suite}: {papers}our results", "", headers, ranked(headers, lines), tuple(footnotes.items))


def _suite_lines(table: Published, columns: Mapping[str, Column], metrics: Sequence[str], footnotes: Footnotes) -> list[Line]:
    lines = []
    for row in table.rows:
        cells = []
        for name in metrics:
            column = columns.get(name)
            if column is None or not row[column.name]:
                cells.append(Cell(""))
                continue
            value = float(row[column.name]) / column.scale
            text = f"{value:.{suite_places(row[column.name], column)}f}"
            cells.append(Cell(text, float(text), notes=_disagreement(table, row, column, footnotes)))
        if any(cell.text for cell in cells):
            lines.append(Line((Cell(table.key(row)), Cell(table.id), *cells), "own" if table.is_own(row) else "published"))
    return lines


def _published_line(table: Published, row: Mapping[str, str], columns: Sequence[Column], footnotes: Footnotes) -> Line:
    cells = [
        Cell(row[c.name], table.number(row, c.name), notes=_disagreement(table, row, c, footnotes))
        if c.role == "number" and row[c.name]
        else Cell(row[c.name])
        for c in columns
    ]
    group = " / ".join(row[name] for name in table.best_within or ())
    return Line(tuple(cells), "own" if table.is_own(row) else "published", group)


def _our_line(table: Published, label: str, by_suite: Mapping[str, Ours], reason: str, footnotes: Footnotes) -> Line | None:
    """Our row of a table with the rows of one suite (`Published.parts`), or None when it would have no number."""
    place = "model" if "model" in table.columns else table.keys[0]
    cells = []
    for column in table.columns.values():
        suite, _, name = column.metric.partition("/")
        metric = ours.best_known(by_suite, suite, name) if column.metric else None
        places = max((decimals(row[column.name]) for row in table.rows if row[column.name]), default=2) if column.role == "number" else 0
        cells.append(_metric_cell(metric, column.scale, places))
    if not any(cell.value is not None for cell in cells):
        return None
    used = {suite: one for suite, one in by_suite.items() if suite in table.suites()}
    names = list(table.columns)
    cells[names.index(place)] = Cell(_label(label, used, footnotes, reason))
    task = table.rows[0][table.suite_column] if table.suite_column else ""
    if task:
        cells[names.index(table.suite_column)] = Cell(task)
    # A table that ranks inside groups has no group of ours: ours is ranked among our own rows.
    return Line(tuple(cells), "deviating" if reason else "ours", f"{OURS} {task}".rstrip() if table.best_within else "")


def _label(label: str, by_suite: Mapping[str, Ours], footnotes: Footnotes, reason: str) -> str:
    """The name of our row with its daggers."""
    marks = footnotes.mark(DAGGER, f"{label}: {reason}.") if reason else ""
    rewards = [f"{', '.join(one.rewards)} (suite {suite})" for suite, one in by_suite.items() if one.rewards]
    if rewards:
        marks += footnotes.mark(DOUBLE_DAGGER, f"{label}: the metric was a training reward: {'; '.join(rewards)}.")
    return f"{label} {marks}".rstrip()


def _metric_cell(metric: Metric | None, scale: float, places: int) -> Cell:
    if metric is None or metric.value is None:
        return Cell("")

    def text(value: float) -> str:
        return f"{value * scale:.{places}f}"

    return Cell(text(metric.value), metric.value * scale, (text(metric.ci[0]), text(metric.ci[1])) if metric.ci else None)


def _disagreement(table: Published, row: Mapping[str, str], column: Column, footnotes: Footnotes) -> tuple[str, ...]:
    key = table.key(row)
    for check in table.disagreements():
        if (check.row, check.column) == (key, column.name):
            places = decimals(check.published) + 1
            text = f"{table.id}, {key}: published {check.published}, its own columns give {check.recomputed:.{places}f} ({check.basis})."
            return (footnotes.add(text),)
    return ()


def suite_places(text: str, column: Column) -> int:
    """Decimals of a printed number in the suite's own units."""
    return decimals(text) + round(math.log10(column.scale))


def _direction(column: Column, table: Published) -> str:
    return column.better if table.best_within is not None and column.better != "none" else ""
