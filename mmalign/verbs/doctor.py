"""Environment, cores, GPUs, packages; which suites, scorers and models run here; the commands that fix the rest."""

from __future__ import annotations

import argparse

from mmalign.screen import Screen, columns
from mmalign.verbs import COMPLETE, ERROR, Run


def declare(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("--deep", action="store_true", help="also import torch, its companions and every registered file")
    parser.add_argument(
        "--scorers", nargs="?", const="all", metavar="NAME[,NAME]", help="also load scorers (all) and let each judge a picture"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SCORER.OPTION=VALUE", help="an option of a scorer (--scorers)")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import doctor

        found = doctor.examine(options.plug, options.deep)
        for line in doctor.lines(found):
            screen.say(line)
        if options.scorers is not None:
            found["scorers_tried"] = _try_scorers(options)
            for line in columns(list(found["scorers_tried"].items())):
                screen.say(line)
        screen.give(found)
        return COMPLETE if found["is_sound"] else ERROR

    return run


def _try_scorers(options: argparse.Namespace) -> dict[str, str]:
    from mmalign import executors, jobs, scoring

    one = executors.Processes(workers=1, devices=jobs.devices("auto")[:1])
    return scoring.self_test(jobs.scorer_recipes(options), one)
