"""The papers' tables with our own rows in them: published numbers as printed, ours with intervals, best and second marked.

mmalign table dense-reward/2                      one table; --list names all, --paper segros prints all of a paper
mmalign table --suite wise                        every published row of a suite, and ours
mmalign table gvu/1 --against paper               exit 1 when a result that reproduces a row lies outside --tolerance, 3 when none does
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmalign.screen import Screen, columns
from mmalign.types import UsageError
from mmalign.verbs import COMPLETE, ERROR, INCOMPLETE, Run


def declare(parser: argparse.ArgumentParser) -> Run:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("table", nargs="?", metavar="PAPER/TABLE", help="such as dense-reward/2; a suite's name is --suite")
    parser.add_argument("--list", action="store_true", help="the names of all tables")
    parser.add_argument("--paper", metavar="NAME", help="every table of a paper")
    parser.add_argument("--suite", metavar="NAME", help="every row of a suite, over all papers")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where our results are (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="also our results that deviate or are incomplete, with a dagger")
    parser.add_argument("--format", choices=("terminal", "markdown", "latex", "csv", "html"), default="terminal")
    parser.add_argument("--against", choices=("paper",), help="compare our rows with the rows that they reproduce")
    parser.add_argument("--tolerance", type=float, default=0.01, metavar="SHARE", help="of the column's range (default: %(default)s)")
    parser.add_argument("--as", action="append", default=[], dest="reproduces", metavar="MODEL=ROW", help="our MODEL reproduces that ROW")
    parser.add_argument("--render", type=Path, metavar="DIR", help="write all tables as Markdown and LaTeX")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign.tables import ours

        if options.list:
            return _list(screen)
        found = ours.read(options.results)
        if options.render:
            from mmalign.tables import rendered

            paths = rendered.write(options.render, found)
            screen.say(f"{len(paths)} files in {options.render}")
            screen.give([str(path) for path in paths])
            return COMPLETE
        return _against(options, screen, found) if options.against else _print(options, screen, found)

    return run


def _list(screen: Screen) -> int:
    from mmalign.leaderboards import published

    tables = published.load_all()
    for line in columns([(table.id, str(len(table.rows)), table.source["place"], table.title) for table in tables]):
        screen.say(line)
    screen.give([{"id": table.id, "name": table.name, "title": table.title, "rows": len(table.rows), **table.source} for table in tables])
    return COMPLETE


def _chosen(options: argparse.Namespace) -> list[Any]:
    """The published tables that the options name."""
    from mmalign.leaderboards import published

    if options.paper:
        return published.load_all(options.paper)
    if not options.table:
        raise UsageError(
            "Which table? Name one (mmalign table dense-reward/2), a paper (--paper segros) or a suite (--suite wise); --list names all."
        )
    return [published.find(options.table)]


def _print(options: argparse.Namespace, screen: Screen, found: list[Any]) -> int:
    from mmalign.leaderboards import published
    from mmalign.tables import build, formats

    suite = options.suite or (options.table if options.table in _suites(found) else None)
    if suite:
        tables = [build.suite_table(suite, published.load_all(options.paper), found, options.all)]
    else:
        tables = [build.paper_table(table, found, options.all) for table in _chosen(options)]
    screen.say("\n\n".join(formats.FORMATS[options.format](table).rstrip("\n") for table in tables))
    screen.give([asdict(table) for table in tables])
    return COMPLETE


def _suites(found: list[Any]) -> set[str]:
    from mmalign.leaderboards import published

    return {suite for table in published.load_all() for suite in table.suites()} | {one.suite for one in found}


def _against(options: argparse.Namespace, screen: Screen, found: list[Any]) -> int:
    from mmalign.tables import compare

    if options.suite:
        raise UsageError("--against paper compares with the rows of a paper's table: name the table or --paper, not --suite.")
    rows = dict(pair.split("=", 1) for pair in options.reproduces if "=" in pair)
    if len(rows) < len(options.reproduces):
        raise UsageError("--as needs MODEL=ROW, such as --as my-model=T2I-R1.")
    compared = [(table.id, item) for table in _chosen(options) for item in compare.compare(table, found, options.tolerance, rows)]
    lines = [("table", "row", "column", "published", "ours", "95% interval", "gap", "")] if compared else []
    for name, item in compared:
        interval = f"[{item.interval[0]:.3f}, {item.interval[1]:.3f}]" if item.interval else ""
        verdict = "within" if item.is_within else "OUTSIDE"
        lines.append((name, item.row, item.column, f"{item.published:g}", f"{item.ours:.3f}", interval, f"{item.gap:+.3f}", verdict))
    for line in columns(lines):
        screen.say(line)
    outside = sum(not item.is_within for _, item in compared)
    screen.give(
        {"tolerance": options.tolerance, "outside": outside, "compared": [{"table": name, **asdict(item)} for name, item in compared]}
    )
    if not compared:
        screen.note(
            f"Nothing was compared: no complete, undeviating result in {options.results} reproduces a row. --as MODEL=ROW names one."
        )
        return INCOMPLETE
    screen.say(f"{len(compared) - outside} of {len(compared)} numbers lie within {options.tolerance:g} of the paper's.")
    return ERROR if outside else COMPLETE
