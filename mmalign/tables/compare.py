"""Our results against a paper's row: a published table as a regression test."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mmalign.leaderboards.published import Column, Published
from mmalign.registry import suggest
from mmalign.tables import ours
from mmalign.tables.ours import Ours
from mmalign.types import UsageError


@dataclass(frozen=True)
class Comparison:
    """One published number and ours, in the table's units. `gap` is the difference as a share of the column's range, or of the published
    number where the column has no range; `interval` is our 95% interval."""

    model: str
    row: str
    column: str
    published: float
    ours: float
    interval: tuple[float, float] | None
    gap: float
    is_within: bool


def compare(table: Published, found: Sequence[Ours], tolerance: float, rows: Mapping[str, str] | None = None) -> list[Comparison]:
    """Every number of the rows that our complete, undeviating results reproduce.

    A result reproduces the row that `rows` names for its model, else the row whose name is its model's, letter case and punctuation
    aside (`deepseek-ai/Janus-Pro-7B` is `Janus-Pro-7B`). UsageError for a row or a model that does not exist.
    """
    chosen = ours.usable(found)
    named = dict(rows or {})
    keys = [table.key(row) for row in table.rows]
    for model, key in named.items():
        if model not in chosen:
            raise UsageError(f"No complete, undeviating result is called '{model}'{suggest(model, chosen)}")
        if key not in keys:
            raise UsageError(f"Table {table.id} has no row '{key}'{suggest(key, keys)}")
    pairs = [(part, model, by_suite) for model, by_suite in chosen.items() for part in table.parts()]
    return [one for part, model, by_suite in pairs for one in _row_comparisons(part, model, by_suite, named, tolerance)]


def _row_comparisons(
    table: Published, model: str, by_suite: Mapping[str, Ours], named: Mapping[str, str], tolerance: float
) -> Iterator[Comparison]:
    row = _reproduced(table, model, by_suite, named)
    for column in table.columns.values() if row else ():
        suite, _, name = column.metric.partition("/")
        metric = ours.best_known(by_suite, suite, name) if column.metric else None
        published = table.number(row, column.name) if row and column.role == "number" else None
        if row is None or metric is None or metric.value is None or published is None:
            continue
        value = metric.value * column.scale
        interval = (metric.ci[0] * column.scale, metric.ci[1] * column.scale) if metric.ci else None
        gap = (value - published) / _span(column, published)
        yield Comparison(model, table.key(row), column.name, published, value, interval, gap, abs(gap) <= tolerance + 1e-12)


def _reproduced(table: Published, model: str, by_suite: Mapping[str, Ours], named: Mapping[str, str]) -> Mapping[str, str] | None:
    if model in named:
        return next((row for row in table.rows if table.key(row) == named[model]), None)
    facts = next(iter(by_suite.values())).result.model
    known = {_plain(str(name)) for name in (model, facts.get("name", ""), facts.get("spec", ""), facts.get("source", ""))} - {""}
    fitting = [row for row in table.rows if {_plain(table.key(row)), _plain(row.get("model", ""))} & known]
    return fitting[0] if len(fitting) == 1 else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").rpartition("/")[2].lower())


def _span(column: Column, published: float) -> float:
    return column.range[1] - column.range[0] if column.range else abs(published) or 1.0
