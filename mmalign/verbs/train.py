"""Train a checkpoint with a reward or on image-text pairs, or continue where the run stopped; --then-eval measures it beside its base.

Every option of the trainer is a flag (--learning-rate 1e-5, --steps 200, --attribution fast_shap); --show-config lists them.
The same line under `torchrun --nproc-per-node N -m mmalign` trains on N processes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmalign.options import add_evaluation_options
from mmalign.screen import Screen
from mmalign.verbs import COMPLETE, INCOMPLETE, Run


def declare(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("trainer", metavar="TRAINER", help="a method, as `mmalign ls trainers` lists them")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--model", required=True, metavar="MODEL", help="the checkpoint to start from: a bundled name, PATH, FAMILY:PATH or hub id"
    )
    what.add_argument("--reward", metavar="NAME=W[,NAME=W]", help="scorers and their weights (default: the recipe's, or the paper's)")
    what.add_argument("--prompts", metavar="SUITE|FILE", help="a suite's train split, a .txt or .jsonl file, or a mixture A=0.3,B=0.7")
    what.add_argument("--data", metavar="DIR|FILE", help="image-text pairs: a folder, a .jsonl file or webdataset shards a-{000..127}.tar")
    what.add_argument("--panel", metavar="SUITE", help="measured on held-out prompts every --panel-every steps")
    what.add_argument("--config", type=Path, metavar="FILE", help="a recipe (YAML); flags win over it")
    what.add_argument("--run-dir", type=Path, metavar="DIR", help="the run's folder (default: runs/<name from all choices>)")
    what.add_argument("--then-eval", metavar="SUITE[,SUITE]", help="evaluate the trained checkpoint and its base, and compare them")
    what.add_argument("--show-config", action="store_true", help="print every option with the value in force, and stop")
    add_evaluation_options(parser, what)
    parser.set_defaults(takes_rest=True)

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import config, training

        job = training.training(options)
        if options.show_config:
            screen.say(config.dump_yaml(training.described(job)).rstrip())
            screen.give(training.described(job))
            return COMPLETE
        taught = f"pairs of {job.data}" if job.data else f"reward {_weights(job.reward)}, prompts {job.source}"
        screen.say(f"{job.trainer.name} on {job.spec.name}: {taught}, run {job.run}")
        if job.recipe:
            screen.say(f"  recipe    {job.recipe}")
        try:
            folder = training.train(job, screen.say)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"Stopped. The last state is in {job.run / 'state'}. Continue: {options.command}") from None
        screen.say(f"  trained   {folder}")
        found = training.compare(job, options, screen.say) if options.then_eval and training.is_first_process() else []
        screen.give({"run": job.run, "checkpoint": folder, "evaluations": found})
        return COMPLETE if all(item["is_complete"] for item in found) else INCOMPLETE

    return run


def _weights(reward: Any) -> str:
    return " + ".join(f"{weight:g} {name}" for name, weight in reward.items()) or "the model's own"
