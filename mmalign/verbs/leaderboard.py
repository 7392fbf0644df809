"""A static page over all published rows and all our results: sortable, filtered, with a page per model. It opens from disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmalign.screen import Screen
from mmalign.verbs import COMPLETE, Run


def declare(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where our results are (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: leaderboard/ in the folder of the results)")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign.tables import leaderboard, ours

        page = leaderboard.write(ours.read(options.results), options.out or options.results / "leaderboard")
        screen.say(str(page))
        screen.give({"leaderboard": page})
        return COMPLETE

    return run
