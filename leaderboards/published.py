"""The papers' tables as data: `published/<paper>/<table>.csv` holds the cells as printed, the YAML beside it says what they are.

A cell stays the text that was printed ("0.50" is not "0.5"). A derived column has a rule (a mean, weighted or not, or a ratio), and
loading recomputes it: a published value that its own columns do not give is a Check with the verdict `disagrees`; nothing is replaced.
Rows of two tables are never the same row: a baseline's name is a label, and papers measure it under different settings.

YAML: title, kind (results, settings, setup, orderings), benchmark, source {place, status, address}, rows (the columns that name a row),
own ({column: values} of the paper's own rows, or all), own_columns, best (none: nothing is marked), best_within (the columns inside whose
groups best and second are marked), columns {name: label | factor | {better, range, unit, metric, scale, rule}}, row_rules, notes. `metric`
is <suite>/<metric> of this package and `scale` what its values are multiplied by; in a table of several benchmarks `suites` names the
suite by the row's value of a column, {task: {T2I: mmdt, I2T: mmdt_i2t}}, and `metric` is */<metric>. Standard library at import time.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmalign.config import load_yaml
from mmalign.registry import suggest
from mmalign.types import MmalignError, UsageError

if TYPE_CHECKING:
    from pandas import DataFrame

ROOT = Path(__file__).parent / "published"
Verdict = Literal["exact", "rounding", "disagrees"]

_TABLE_FIELDS = {
    "suites",
    "title",
    "kind",
    "benchmark",
    "source",
    "rows",
    "own",
    "own_columns",
    "best",
    "best_within",
    "columns",
    "row_rules",
    "notes",
}
_RULE_FIELDS = {"mean", "weights", "ratio", "to", "times", "basis", "decimals"}
_COLUMN_FIELDS = {"better", "range", "unit", "metric", "scale"} | _RULE_FIELDS


@dataclass(frozen=True)
class Paper:
    """One paper; `method` is what it proposes."""

    name: str
    title: str
    address: str
    method: str


@dataclass(frozen=True)
class Rule:
    """How a column follows from others of its row: their mean, or `times` the ratio of one to `to` (a number, or the row of that name).

    `decimals` is how precisely the inputs were printed where their text does not tell ("100" beside "97.4").
    """

    kind: Literal["mean", "ratio"]
    of: tuple[str, ...]
    weights: tuple[float, ...]
    to: str | float
    times: float
    basis: str
    decimals: int | None


@dataclass(frozen=True)
class Column:
    """One column. `better` is higher, lower, none, or empty for a label or factor; `metric` is "" where this package has no such metric."""

    name: str
    role: Literal["label", "factor", "number"]
    better: str = ""
    range: tuple[float, float] | None = None
    unit: str = ""
    metric: str = ""
    scale: float = 1.0
    rule: Rule | None = None


@dataclass(frozen=True)
class Check:
    """A published number against its own columns: exact after rounding, possible within the rounding of the inputs, or neither."""

    row: str
    column: str
    published: str
    recomputed: float
    verdict: Verdict
    basis: str


@dataclass(frozen=True)
class Published:
    """One table of one paper. `rows` map column names to printed texts; an empty text was not printed."""

    paper: Paper
    name: str
    title: str
    kind: str
    benchmark: str
    source: Mapping[str, str]
    keys: tuple[str, ...]
    own: Mapping[str, tuple[str, ...]] | Literal["all"]
    own_columns: tuple[str, ...]
    best_within: tuple[str, ...] | None
    columns: Mapping[str, Column]
    rows: tuple[Mapping[str, str], ...]
    notes: tuple[str, ...]
    checks: tuple[Check, ...] = ()
    suite_column: str = ""  # the column whose value says which suite a row is of, where rows are of several
    suite_of: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The short name that the command line takes: dense-reward/2, segros/10t, gvu/fig4_training_curve."""
        return f"{self.paper.name}/{short_name(self.name)}"

    def key(self, row: Mapping[str, str]) -> str:
        """The name of a row inside its table: `MMaDA`, or `I2T / Show-o2` where two columns name it."""
        return " / ".join(row[column] for column in self.keys)

    def is_own(self, row: Mapping[str, str]) -> bool:
        """Whether a row is the paper's own method."""
        return self.own == "all" or bool(self.own) and all(row[column] in values for column, values in self.own.items())

    def number(self, row: Mapping[str, str], column: str) -> float | None:
        """A cell as a number; None where nothing was printed."""
        return float(row[column]) if row[column] else None

    def cell(self, key: str, column: str) -> float:
        """The number of a named row; MmalignError when there is none."""
        row = next((row for row in self.rows if self.key(row) == key), None)
        value = None if row is None or column not in self.columns else self.number(row, column)
        if value is None:
            raise MmalignError(f"Table {self.id} has no number in the row '{key}' under '{column}'.")
        return value

    def suites(self) -> tuple[str, ...]:
        """The suites of this package whose metrics the table has."""
        metrics = [column.metric for part in self.parts() for column in part.columns.values() if column.metric]
        return tuple(dict.fromkeys(metric.split("/")[0] for metric in metrics))

    def parts(self) -> tuple[Published, ...]:
        """The table cut into the rows of each suite, so that every metric names its own; itself where one suite's rows are all there is."""
        return tuple(self._part(value, suite) for value, suite in self.suite_of.items()) or (self,)

    def _part(self, value: str, suite: str) -> Published:
        rows = tuple(row for row in self.rows if row[self.suite_column] == value)
        columns = {
            name: replace(column, metric=column.metric.replace("*", suite) if any(row[name] for row in rows) else "")
            for name, column in self.columns.items()
        }
        return replace(self, columns=columns, rows=rows, suite_of={})

    def disagreements(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.verdict == "disagrees")


def short_name(name: str) -> str:
    """table2_wise -> 2, table5b_genai_advanced_overall -> 5b; a figure or a text keeps its name."""
    found = re.fullmatch(r"table(\d+[a-z]?)(_.*)?", name)
    return found[1] if found else name


def papers() -> list[str]:
    """The names of the papers."""
    return sorted(path.name for path in ROOT.iterdir() if path.is_dir())


def names(paper: str) -> list[str]:
    """The tables of a paper in the order of their numbers, figures and texts last; UsageError for an unknown paper."""
    if paper not in papers():
        raise UsageError(f"Unknown paper '{paper}'{suggest(paper, papers())}")
    return sorted((path.stem for path in (ROOT / paper).glob("*.csv")), key=_order)


def _order(name: str) -> tuple[int, int, str]:
    found = re.match(r"table(\d+)", name)
    return (0, int(found[1]), name) if found else (1, 0, name)


def find(spec: str) -> Published:
    """The table of `<paper>/<table>`: its number (2, 5b), its whole name, or the beginning of one. UsageError with the nearest names."""
    paper, slash, wanted = spec.partition("/")
    known = names(paper) if slash or paper in papers() else []
    tables = [f"{own}/{short_name(name)}" for own in papers() for name in names(own)]
    if not known:
        near = suggest(spec, tables)
        raise UsageError(f"Unknown table '{spec}'{near if 'mean' in near else '. `mmalign table --list` names them all.'}")
    wanted = wanted.removeprefix("table") if short_name(wanted) == wanted else wanted
    exact = [name for name in known if wanted in (name, short_name(name))]
    fitting = exact or [name for name in known if wanted and name.startswith(wanted)]
    if len(fitting) != 1:
        choice = ", ".join(f"{paper}/{short_name(name)}" for name in fitting or known)
        raise UsageError(f"{'No' if not fitting else 'More than one'} table is '{spec}'. Expected one of: {choice}.")
    return load(paper, fitting[0])


def load_all(paper: str | None = None) -> list[Published]:
    """Every table of one paper or of all."""
    return [load(own, name) for own in ([paper] if paper else papers()) for name in names(own)]


@cache
def load(paper: str, name: str) -> Published:
    """Read one table and recompute its derived columns. MmalignError with the file where YAML and CSV do not fit together."""
    return read(ROOT / paper / f"{name}.yaml", _paper(paper))


@cache
def _paper(name: str) -> Paper:
    return Paper(**load_yaml(ROOT / name / "paper.yaml"))


def read(path: Path, paper: Paper) -> Published:
    """The table of a YAML file and the CSV file beside it."""
    content = load_yaml(path)
    _no_others(content, _TABLE_FIELDS, path)
    with path.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    columns = {str(column): _column(str(column), facts, path) for column, facts in content["columns"].items()}
    if header != list(columns):
        raise MmalignError(f"{path} describes the columns {list(columns)}, but the CSV file beside it has {header}.")
    rows = tuple(dict(zip(header, line, strict=True)) for line in lines)
    own = content.get("own", {})
    suite_column, suite_of = next(iter(content.get("suites", {}).items()), ("", {}))
    table = Published(
        paper=paper,
        name=path.stem,
        title=content["title"],
        kind=content["kind"],
        benchmark=content.get("benchmark", ""),
        source={"address": paper.address, **content["source"]},
        keys=tuple(content["rows"]),
        own="all" if own == "all" else {column: tuple(map(str, values)) for column, values in own.items()},
        own_columns=tuple(content.get("own_columns", ())),
        best_within=None if content.get("best") == "none" else tuple(content.get("best_within", ())),
        columns=columns,
        rows=rows,
        notes=tuple(content.get("notes", ())),
        suite_column=suite_column,
        suite_of=suite_of,
    )
    keys = [table.key(row) for row in rows]
    doubled = sorted({key for key in keys if keys.count(key) > 1})
    if doubled:
        raise MmalignError(f"{path} has more than one row {doubled[0]!r}: `rows` must name columns that tell every row apart.")
    rules = {str(row): _rule(facts, path) for row, facts in content.get("row_rules", {}).items()}
    return Published(**{**vars(table), "checks": (*_column_checks(table), *_row_checks(table, rules))})


def frame(table: Published) -> DataFrame:
    """The table for pandas: numbers as floats (NaN: not printed), labels and factors as text, indexed by the row's name."""
    import pandas

    index = pandas.Index([table.key(row) for row in table.rows], name=" / ".join(table.keys))
    data = pandas.DataFrame(list(table.rows), index=index)
    for name, column in table.columns.items():
        if column.role == "number":
            data[name] = pandas.to_numeric(data[name])
    return data


def decimals(text: str) -> int:
    """How many decimals a printed number has."""
    return len(text.partition(".")[2])


def _column(name: str, facts: Any, path: Path) -> Column:
    if facts in ("label", "factor"):
        return Column(name, facts)
    _no_others(facts, _COLUMN_FIELDS, path)
    span = facts.get("range")
    rule = _rule(facts, path) if "mean" in facts or "ratio" in facts else None
    return Column(
        name,
        "number",
        facts["better"],
        (float(span[0]), float(span[1])) if span else None,
        facts.get("unit", ""),
        facts.get("metric", ""),
        float(facts.get("scale", 1)),
        rule,
    )


def _rule(facts: Mapping[str, Any], path: Path) -> Rule:
    _no_others(facts, _RULE_FIELDS | _COLUMN_FIELDS, path)
    basis, precise = facts["basis"], facts.get("decimals")
    if "ratio" in facts:
        return Rule("ratio", (facts["ratio"],), (), facts["to"], float(facts.get("times", 1)), basis, precise)
    of = tuple(facts["mean"])
    return Rule("mean", of, tuple(map(float, facts.get("weights", [1] * len(of)))), "", 1.0, basis, precise)


def _no_others(facts: Mapping[str, Any], known: set[str], path: Path) -> None:
    other = sorted(set(facts) - known)
    if other:
        raise MmalignError(f"{path} has the unknown field '{other[0]}'{suggest(other[0], known)}")


def _column_checks(table: Published) -> list[Check]:
    found = []
    for column in table.columns.values():
        for row in table.rows:
            if column.rule and row[column.name]:
                rule = column.rule
                cells = {name: row[name] for name in rule.of}
                base = next((other[rule.of[0]] for other in table.rows if table.key(other) == str(rule.to)), "")
                check = _check(table.key(row), column.name, row[column.name], cells, rule, base)
                found += [check] if check else []
    return found


def _row_checks(table: Published, rules: Mapping[str, Rule]) -> list[Check]:
    by_key = {table.key(row): row for row in table.rows}
    found = []
    for key, rule in rules.items():
        for column in table.columns.values():
            if column.role == "number" and by_key[key][column.name]:
                cells = {name: by_key[name][column.name] for name in rule.of}
                check = _check(key, column.name, by_key[key][column.name], cells, rule, "")
                found += [check] if check else []
    return found


def _check(row: str, column: str, published: str, cells: Mapping[str, str], rule: Rule, base: str) -> Check | None:
    """What a rule gives for the printed cells, and whether the published number can be it; None where no input was printed."""
    inputs = [(float(text), weight, text) for text, weight in zip(cells.values(), rule.weights or (1.0,), strict=True) if text]
    if not inputs:
        return None

    def half_unit(text: str) -> float:
        return 0.5 * 10.0 ** -(decimals(text) if rule.decimals is None else rule.decimals)

    if rule.kind == "mean":
        total = math.fsum(weight for _, weight, _ in inputs)
        recomputed = math.fsum(value * weight for value, weight, _ in inputs) / total
        slack = math.fsum(half_unit(text) * weight for _, weight, text in inputs) / total
    else:
        value, _, text = inputs[0]
        divisor, divisor_slack = (float(base), half_unit(base)) if base else (float(rule.to), 0.0)
        recomputed = rule.times * value / divisor
        slack = rule.times * (value + half_unit(text)) / (divisor - divisor_slack) - recomputed
    gap, own_unit = abs(recomputed - float(published)), 0.5 * 10.0 ** -decimals(published)
    verdict: Verdict = "exact" if gap <= own_unit + 1e-9 else "rounding" if gap <= own_unit + slack + 1e-9 else "disagrees"
    return Check(row, column, published, recomputed, verdict, rule.basis)


def by_metric(tables: Sequence[Published], suite: str) -> list[tuple[Published, dict[str, Column]]]:
    """The tables that report a suite, each with its columns by the suite's own metric names."""
    found = []
    for part in (part for table in tables for part in table.parts()):
        columns = {c.metric.split("/", 1)[1]: c for c in part.columns.values() if c.metric.startswith(f"{suite}/")}
        if columns:
            found.append((part, columns))
    return found
