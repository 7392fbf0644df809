"""Our results for others: a Hugging Face model card, the Hub's .eval_results, or lm-eval's JSON, on standard output."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mmalign.screen import Screen
from mmalign.types import UsageError
from mmalign.verbs import COMPLETE, Run


def declare(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("format", choices=("model-index", "eval-results", "lm-eval"))
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where our results are (default: %(default)s)")
    parser.add_argument("--model", metavar="NAME", help="whose results (default: the only model there is)")
    parser.add_argument("--dataset", action="append", default=[], metavar="SUITE=ORG/NAME[:TASK]", help="eval-results: the Hub's dataset")
    parser.add_argument("--all", action="store_true", help="also results that deviate or are incomplete, with a note that says so")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign.config import dump_yaml
        from mmalign.tables import export, ours

        datasets = dict(pair.split("=", 1) for pair in options.dataset if "=" in pair)
        if len(datasets) < len(options.dataset):
            raise UsageError("--dataset needs SUITE=ORG/NAME, such as --dataset wise=org/WISE:default.")
        found = export.choose(ours.read(options.results), options.model, options.all)
        if options.format == "lm-eval":
            content: object = export.lm_eval(found)
            screen.say(json.dumps(content, indent=2, ensure_ascii=False))
        else:
            content = export.model_index(found) if options.format == "model-index" else export.eval_results(found, datasets)
            screen.say(dump_yaml(content).rstrip("\n"))
        screen.give(content)
        return COMPLETE

    return run
