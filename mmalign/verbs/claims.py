"""The papers' claims and their verdicts: agrees, opposite or not resolved, with what decided.

mmalign claims list                    every claim that has a test
mmalign claims run [NAME ...]          test claims by name, number or paper (default: all) on the published figures; keep the verdicts
mmalign claims run ... --budget 10     and by experiments on the testbed, for 10 minutes; the same line continues
mmalign claims report                  the kept verdicts, unfavourable ones first
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from mmalign.screen import Screen, columns
from mmalign.types import UsageError
from mmalign.verbs import COMPLETE, Run


def declare(parser: argparse.ArgumentParser) -> Run:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=("list", "run", "report"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="a claim's name or number, or a paper (default: all)")
    parser.add_argument("--budget", type=float, default=0.0, metavar="MINUTES", help="time for experiments (default: none are run)")
    parser.add_argument("--out", type=Path, default=Path("results/claims"), metavar="DIR", help="the verdicts (default: %(default)s)")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign.leaderboards import experiments, verdict_report, verdicts

        if options.action == "report":
            if options.names:
                raise UsageError("`mmalign claims report` shows all kept verdicts and takes no names.")
            kept = verdict_report.read(options.out)
        else:
            chosen = verdicts.choose(options.names)
            if options.action == "list":
                for line in columns([(str(claim.number), claim.paper, claim.name, claim.claim) for claim in chosen]):
                    screen.say(line)
                screen.give([asdict(claim) for claim in chosen])
                return COMPLETE
            found = [verdicts.judge(claim) for claim in chosen if claim.tests]
            tested, left = experiments.run_all(chosen, options.out, options.budget, screen.say) if options.budget > 0 else ([], [])
            found += tested
            if not found:
                names = ", ".join(claim.name for claim in chosen)
                raise UsageError(f"Nothing was judged: {names} need experiments. Give them time with --budget MINUTES.")
            verdict_report.write(options.out, found)
            if left:
                screen.say(f"Time is over before {', '.join(left)}: the same line continues.")
            kept = [verdict_report.content(verdict) for verdict in found]
        ranked = sorted(kept, key=lambda one: (verdict_report.ANSWERS.index(one["verdict"]), one["number"]))
        for line in columns(
            [(str(one["number"]), one["name"], one["verdict"], verdict_report.effect(one), one["effect"]["what"]) for one in ranked]
        ):
            screen.say(line)
        screen.say(f"\n{verdict_report.summary(kept)}")
        screen.give(kept)
        return COMPLETE

    return run
