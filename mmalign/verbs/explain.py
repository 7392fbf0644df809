"""A suite's protocol card: prompts, images, seed, judge, formula, paper tables, options, known traps."""

from __future__ import annotations

import argparse

from mmalign.screen import Screen
from mmalign.verbs import COMPLETE, Run


def declare(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("name", metavar="SUITE", help="a suite; a scorer, model family or trainer shows its docstring and options")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import explain

        content = explain.explain(options.name, options.plug)
        for line in explain.lines(content):
            screen.say(line)
        screen.give(content)
        return COMPLETE

    return run
