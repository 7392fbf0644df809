"""A suite's protocol card: prompts, images, seed, judge, formula, paper tables, options, known traps."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmalign.screen import Screen
from mmalign.types import UsageError
from mmalign.verbs import COMPLETE, Run


def declare(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("name", nargs="?", metavar="SUITE", help="a suite; of a scorer, model family or trainer: its docstring and options")
    parser.add_argument("--render", type=Path, metavar="DIR", help="instead: every suite's card as a Markdown page in this folder")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import cards, explain

        if bool(options.name) == bool(options.render):
            raise UsageError("Say what to explain: SUITE, or the name of a scorer, model family or trainer; or --render DIR for all cards.")
        if options.render:
            made = cards.write(options.render)
            screen.say(f"{len(made)} pages in {options.render}")
            screen.give({"pages": made})
            return COMPLETE
        content = explain.explain(options.name, options.plug)
        for line in explain.lines(content):
            screen.say(line)
        screen.give(content)
        return COMPLETE

    return run
