"""What the published figures themselves say of the papers' claims: every entry of `claims/*.yaml`, tested and given a verdict.

A test is a list of comparisons, each an interval that lies above zero where the claim holds. The interval comes from rounding: a number
printed as 0.50 is anything from 0.495 to 0.505; where a number disagrees with its own columns, both it and what the columns give are tried,
and the interval spans both. `agrees`: every interval is above zero. `opposite`: one is below. `not resolved`: else. The papers print no
spread over seeds, so these verdicts say what the printed digits can carry, not what another training run would give.

Tests (YAML): {order: rows, best first}, {best: row, except: rows}, {over: [a, b], within_each: groups}, {amount: {column: value}, from,
to, relative}, {gains: columns, over: columns, pairs: [[from, to], ...]}, {larger_gain: [[from, to], [from, to]], relative}, {rising: true,
where}, {within: margin, rows}, {agree: margin, rows of several tables}, {totals: true}; each on `table` and `columns`, and with `least: n`
it is enough that n comparisons hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmalign.leaderboards import published
from mmalign.leaderboards.published import Published

from mmalign.config import load_yaml
from mmalign.registry import suggest
from mmalign.types import MmalignError, UsageError

ROOT = Path(__file__).parent / "claims"
Answer = Literal["agrees", "opposite", "not resolved"]
Range = tuple[float, float]
TINY = 1e-9


@dataclass(frozen=True)
class Claim:
    """One claim in our words. `number` is its place in the list of checkable claims, `paper` the paper or "across"."""

    number: int
    name: str
    paper: str
    claim: str
    tests: tuple[Mapping[str, Any], ...] = ()  # on the published figures
    note: str = ""
    experiment: Mapping[str, Any] = field(default_factory=dict)  # on the testbed (experiments.py)


@dataclass(frozen=True)
class Comparison:
    """By how much the claim holds at one place: between `low` and `high`, in the units of the table (or as a share, for relative ones)."""

    what: str
    low: float
    high: float

    @property
    def answer(self) -> Answer:
        return "agrees" if self.low > TINY else "opposite" if self.high < -TINY else "not resolved"


@dataclass(frozen=True)
class Verdict:
    """The answer to one claim, with the comparison that decided it (the weakest) and all others; what it rests on and what that cost."""

    claim: Claim
    answer: Answer
    decided_by: Comparison
    comparisons: tuple[Comparison, ...]
    evidence: str = "published figures"
    seeds: int = 0
    minutes: float = 0.0


def load() -> dict[str, Claim]:
    """Every claim by its name, in the order of the numbers."""
    entries = [(path.stem, entry) for path in sorted(ROOT.glob("*.yaml")) for entry in load_yaml(path)]
    found = [Claim(**{**entry, "paper": paper, "tests": tuple(entry.get("tests", ()))}) for paper, entry in entries]
    names = [claim.name for claim in found]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise MmalignError(f"Two claims are called '{doubled[0]}'. A claim's name is unique over all files of {ROOT}.")
    return {claim.name: claim for claim in sorted(found, key=lambda claim: claim.number)}


def choose(names: Sequence[str]) -> list[Claim]:
    """The claims of these names, numbers or papers; all without any. UsageError for an unknown one."""
    known = load()
    chosen: dict[str, Claim] = {}
    for name in names:
        fitting = [claim for claim in known.values() if name in (claim.name, str(claim.number), claim.paper)]
        if not fitting:
            raise UsageError(f"Unknown claim '{name}'{suggest(name, [*known, *{claim.paper for claim in known.values()}])}")
        chosen |= {claim.name: claim for claim in fitting}
    return list(chosen.values()) if names else list(known.values())


def judge(claim: Claim) -> Verdict:
    """Test a claim on the published figures."""
    found: list[tuple[list[Comparison], int]] = []
    for test in claim.tests:
        try:
            compared = _both(test)
        except (KeyError, MmalignError) as error:
            raise MmalignError(f"The claim '{claim.name}' cannot be tested: {error}") from error
        found.append((compared, test.get("least", len(compared))))
    answer, decided = decide(found)
    return Verdict(claim, answer, decided, tuple(one for compared, _ in found for one in compared))


def decide(found: Sequence[tuple[Sequence[Comparison], int]]) -> tuple[Answer, Comparison]:
    """The answer of several tests, each of comparisons of which some number has to hold: the worst of them decides."""
    worst = {"opposite": 0, "not resolved": 1, "agrees": 2}
    return min((_combined(*test) for test in found), key=lambda item: (worst[item[0]], item[1].low))


def _combined(found: Sequence[Comparison], least: int) -> tuple[Answer, Comparison]:
    """The answer when `least` of the comparisons have to hold, and the comparison on which it hangs."""
    ranked = sorted(found, key=lambda one: one.low, reverse=True)
    hold = sum(one.answer == "agrees" for one in found)
    fail = sum(one.answer == "opposite" for one in found)
    answer: Answer = "agrees" if hold >= least else "opposite" if fail > len(found) - least else "not resolved"
    return answer, ranked[min(least, len(ranked)) - 1] if answer == "agrees" else min(found, key=lambda one: (one.high, one.low))


def _both(test: Mapping[str, Any]) -> list[Comparison]:
    """The comparisons with the numbers as published, widened by those with disagreeing numbers as their columns give them."""
    printed, recomputed = _compare(test, False), _compare(test, True)
    return [Comparison(a.what, min(a.low, b.low), max(a.high, b.high)) for a, b in zip(printed, recomputed, strict=True)]


def _compare(test: Mapping[str, Any], is_recomputed: bool) -> list[Comparison]:
    kind = next((name for name in KINDS if name in test), None)
    if kind is None:
        raise MmalignError(f"a test needs one of {', '.join(KINDS)}, got {', '.join(test)}.")
    return KINDS[kind](test, is_recomputed)


def _range(table: Published, row: str, column: str, is_recomputed: bool) -> Range:
    """What a printed number can be."""
    value = table.cell(row, column)
    text = next(line[column] for line in table.rows if table.key(line) == row)
    half = 0.5 * 10.0 ** -published.decimals(text)
    for check in table.disagreements() if is_recomputed else ():
        if (check.row, check.column) == (row, column):
            value = check.recomputed
    return value - half, value + half


def _minus(a: Range, b: Range) -> Range:
    return a[0] - b[1], a[1] - b[0]


def _gain(table: Published, start: str, end: str, column: str, is_relative: bool, is_recomputed: bool) -> Range:
    before, after = (_range(table, row, column, is_recomputed) for row in (start, end))
    return (after[0] / before[1] - 1, after[1] / before[0] - 1) if is_relative else _minus(after, before)


def _better(table: Published, first: str, second: str, column: str, is_recomputed: bool) -> Comparison:
    a, b = (_range(table, row, column, is_recomputed) for row in (first, second))
    low, high = _minus(b, a) if table.columns[column].better == "lower" else _minus(a, b)
    return Comparison(f"{table.id} {column}: {first} against {second}", low, high)


def _order(test: Mapping[str, Any], is_recomputed: bool) -> list[Comparison]:
    table = published.find(test["table"])
    return [_better(table, a, b, column, is_recomputed) for column in test["columns"] for a, b in itertools.pairwise(test["order"])]


def _best(test: Mapping[str, Any], is_recomputed: bool) -> list[Comparison]:
    """A row against the nearest of the others in its group."""
    table, own = published.find(test["table"]), test["best"]
    row = next(row for row in table.rows if table.key(row) == own)
    found = []
    for column in test["columns"]:
        others = [
            table.key(other)
            for other in table.rows
            if other is not row and other[column] and all(other[name] == row[name] for name in table.best_within or ())
        ]
        rivals = [_better(table, own, other, column, is_recomputed) for other in others if other not in test.get("except", ())]
        found.append(min(rivals, key=lambda one: one.low))
    return found


def _over(test: Mapping[str, Any], is_recomputed: bool) -> list[Comparison]:
    table, (first, second) = published.find(test["table"]), test["over"]
    groups = [(f"{group} / {first}", f"{group} / {second}") for group in test["within_each"]]
    return [
        _better(table, a, b, column, is_recomputed) for column in test["columns"] for a, b in groups if _is_printed(table, column, a, b)
    ]


def _is_printed(table: Published, column: str, *keys: str) -> bool:
    return all(row[column] for row in table.rows if table.key(row) in keys)


def _amount(test: Mapping[str, Any], is_recomputed: bool) -> list[Comparison]:
    """How far the claimed amount is inside what the printed numbers allow."""
    table, found = published.find(test["table"]), []
    for column, claimed in test["amount"].items():
        low, high = _gain(table, test["from"], test["to"], column, test.get("relative", False), is_recomputed)
        slack = (high - low) / 2 + 0.5 * 10.0 ** -published.decimals(str(claimed))
        margin = slack - abs((low + high) / 2 - claimed)
        unit = " relative" if test.get("relative") else ""
        what = f"{table.id} {column}: {test['from']} to {test['to']} is {(low + high) / 2:+.3f}{unit}, claimed {claimed:+}"
        found.append(Comparison(what, margin, margin))
    return found


def _gains(test: Mapping[str, Any], is_recomputed: bool) -> list[Comparison]:
    """Each column of `gains` against each of `over`, by the mean gain over the pairs."""
    table = published.find(test["table"])

    def mean(column: str) -> Range:
        found = [_gain(table, start, end, column, False, is_recomputed) for start, end in test["pairs"]]
        return sum(low for low, _ in found) / len(found), sum(high for _, high in found) / len(found)

    pairs = itertools.product(test["gains"], test["over"])
    return [Comparison(f"{table.id}: gain of {a} against that of {b}", *_minus(mean(a), mean(b))) for a, b in pairs]


def _larger_gain(test: Mapping[str, Any], is_recomputed: bool) -> list[Comparison]:
    table, (first, second) = published.find(test["table"]), test["larger_gain"]
    found = []
    for column in test["columns"]:
        gains = [_gain(table, start, end, column, test.get("relative", False), is_recomputed) for start, end in (first, second)]
        found.append(Comparison(f"{table.id} {column}: {first[0]} to {first[1]} against {second[0]} to {second[1]}", *_minus(*gains)))
    return found


def _rising(test: Mapping[str, Any], is_recomputed: bool) -> list[Comparison]:
    table, where = published.find(test["table"]), test.get("where", {})
    rows = [table.key(row) for row in table.rows if all(row[column] == value for column, value in where.items())]
    return [
        Comparison(f"{table.id} {column}: {b} against {a}", *_gain(table, a, b, column, False, is_recomputed))
        for column in test["columns"]
        for a, b in itertools.pairwise(rows)
    ]


def _within(test: Mapping[str, Any], is_recomputed: bool) -> list[Comparison]:
    table = published.find(test["table"])
    found = []
    for column in test["columns"]:
        ranges = [_range(table, row, column, is_recomputed) for row in test["rows"]]
        found.append(_spread(f"{table.id} {column}: {', '.join(test['rows'])}", ranges, test["within"]))
    return found


def _agree(test: Mapping[str, Any], is_recomputed: bool) -> list[Comparison]:
    ranges = [_range(published.find(table), row, column, is_recomputed) for table, row, column in test["rows"]]
    return [_spread(" and ".join(f"{table} {row} {column}" for table, row, column in test["rows"]), ranges, test["agree"])]


def _spread(what: str, ranges: Sequence[Range], margin: float) -> Comparison:
    """How far below the margin the largest difference of any two lies."""
    spreads = [_minus(a, b) for a, b in itertools.permutations(ranges, 2)]
    least, most = max(low for low, _ in spreads), max(high for _, high in spreads)
    return Comparison(f"{what} within {margin:g}", margin - most, margin - max(least, 0.0))


def _totals(test: Mapping[str, Any], is_recomputed: bool) -> list[Comparison]:
    """Every derived total: by how much rounding allows it, at the most (the verdict is that of the table's own check)."""
    checks = [(table, check) for table in published.load_all() for check in table.checks]
    signs = {"exact": 1.0, "rounding": 1.0, "disagrees": -1.0}
    found = []
    for table, check in checks:
        gap = signs[check.verdict] * max(abs(check.recomputed - float(check.published)), 1e-6)
        what = f"{table.id} {check.column}: {check.row} prints {check.published}, its columns give {check.recomputed:.4g}"
        found.append(Comparison(what, gap, gap))
    return found


KINDS: dict[str, Callable[[Mapping[str, Any], bool], list[Comparison]]] = {
    "order": _order,
    "best": _best,
    "within_each": _over,
    "amount": _amount,
    "gains": _gains,
    "larger_gain": _larger_gain,
    "rising": _rising,
    "within": _within,
    "agree": _agree,
    "totals": _totals,
}
