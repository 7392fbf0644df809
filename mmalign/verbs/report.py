"""Static HTML of one or more runs: tables, figures, galleries. Or of all results, as a leaderboard; or results in the formats of others."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mmalign.screen import Screen
from mmalign.types import UsageError
from mmalign.verbs import COMPLETE, Run


def declare(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run directory, a result's JSON file, or a folder of runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the run's directory, or report/ beside several)")
    parser.add_argument("--show-unsafe", action="store_true", help="print prompts and answers of unsafe suites in full")
    every = parser.add_argument_group("all results instead of some runs")
    every.add_argument("--leaderboard", action="store_true", help="one page of all published rows and our results, and a page per model")
    every.add_argument("--export", choices=("model-index", "eval-results", "lm-eval"), help="for a model card, the Hub, or as lm-eval does")
    every.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where our results are (default: %(default)s)")
    every.add_argument("--model", metavar="NAME", help="--export: whose results (default: the only model there is)")
    every.add_argument("--dataset", action="append", default=[], metavar="SUITE=ORG/NAME[:TASK]", help="eval-results: the Hub's dataset")
    every.add_argument("--all", action="store_true", help="--export: also what deviates or is incomplete, with a note that says so")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        if bool(options.runs) + options.leaderboard + bool(options.export) != 1:
            raise UsageError("Say what to report: RUN (one or more), --leaderboard, or --export FORMAT; one of the three.")
        if options.export:
            _export(options, screen)
            return COMPLETE
        page = _leaderboard(options) if options.leaderboard else _pages(options)
        screen.say(str(page))
        screen.give({"report": page})
        return COMPLETE

    return run


def _pages(options: argparse.Namespace) -> Path:
    from mmalign import report

    return report.write_report(options.runs, options.out, options.show_unsafe)


def _leaderboard(options: argparse.Namespace) -> Path:
    from mmalign.tables import leaderboard, ours

    return leaderboard.write(ours.read(options.results), options.out or options.results / "leaderboard")


def _export(options: argparse.Namespace, screen: Screen) -> None:
    from mmalign.config import dump_yaml
    from mmalign.tables import export, ours

    datasets = dict(pair.split("=", 1) for pair in options.dataset if "=" in pair)
    if len(datasets) < len(options.dataset):
        raise UsageError("--dataset needs SUITE=ORG/NAME, such as --dataset wise=org/WISE:default.")
    found = export.choose(ours.read(options.results), options.model, options.all)
    content: Any
    if options.export == "lm-eval":
        content = export.lm_eval(found)
        screen.say(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        content = export.model_index(found) if options.export == "model-index" else export.eval_results(found, datasets)
        screen.say(dump_yaml(content).rstrip("\n"))
    screen.give(content)
