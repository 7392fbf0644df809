"""Static HTML of one or more runs: headline table, figures, galleries and comparisons. It opens from disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmalign.screen import Screen
from mmalign.verbs import COMPLETE, Run


def declare(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, a result's JSON file, or a folder of runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the run's directory, or report/ beside several)")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import report

        page = report.write_report(options.runs, options.out)
        screen.say(str(page))
        screen.give({"report": page})
        return COMPLETE

    return run
