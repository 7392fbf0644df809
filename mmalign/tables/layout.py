"""A table ready to print: cells with marks, intervals and footnotes, whatever they are printed as. Pure; standard library only."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Mark = Literal["", "best", "second"]
Origin = Literal["published", "own", "ours", "deviating"]

DAGGER, DOUBLE_DAGGER = "†", "‡"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, what it is worth (None: a label, or nothing printed), its 95% interval, its mark and its footnotes."""

    text: str
    value: float | None = None
    interval: tuple[str, str] | None = None
    mark: Mark = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Header:
    """One column. `better` is higher, lower, or empty where no direction is better or the column is a label."""

    name: str
    better: str = ""
    is_number: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Line:
    """One row. published: a baseline of the paper; own: the paper's own method; ours: a complete result of this package by the protocol;
    deviating: a result that is not, shown on demand and never marked. Rows are ranked inside their `group`."""

    cells: tuple[Cell, ...]
    origin: Origin
    group: str = ""


@dataclass(frozen=True)
class Table:
    """Everything a format needs. `footnotes` are (symbol, sentence)."""

    id: str
    title: str
    source: str
    headers: tuple[Header, ...]
    lines: tuple[Line, ...]
    footnotes: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def ranked(headers: Sequence[Header], lines: Iterable[Line]) -> tuple[Line, ...]:
    """The lines with the best and the second of each column marked inside each group.

    Values count as they are printed, so what cannot be told apart shares a mark. Deviating rows neither get a mark nor take one away. A
    column without a direction has none; of two rows only the best is marked, of one row none.
    """
    rows = list(lines)
    for column, header in enumerate(headers):
        if header.better not in ("higher", "lower"):
            continue
        sign = -1.0 if header.better == "lower" else 1.0
        for group in dict.fromkeys(row.group for row in rows):
            places = [
                place
                for place, row in enumerate(rows)
                if row.group == group and row.origin != "deviating" and row.cells[column].value is not None
            ]
            worth = {place: sign * float(rows[place].cells[column].text) for place in places}
            levels = sorted(set(worth.values()), reverse=True)
            if len(places) < 2 or len(levels) < 2:
                continue
            marks: dict[float, Mark] = {levels[0]: "best"}
            if len(places) > 2:
                marks[levels[1]] = "second"
            for place in places:
                cells = list(rows[place].cells)
                cells[column] = replace(cells[column], mark=marks.get(worth[place], ""))
                rows[place] = replace(rows[place], cells=tuple(cells))
    return tuple(rows)


def letter(position: int) -> str:
    """The symbol of a footnote: a, b, ..., z, aa, ab, ..."""
    alphabet = string.ascii_lowercase
    return alphabet[position] if position < 26 else letter(position // 26 - 1) + alphabet[position % 26]
