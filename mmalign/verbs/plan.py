"""What eval would run, what of it is there already, its cost and its deviations from the protocol; writes nothing."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from mmalign.options import add_run_options
from mmalign.screen import Screen
from mmalign.verbs import COMPLETE, INCOMPLETE, Run, _run

if TYPE_CHECKING:
    from mmalign.evaluate import Job
    from mmalign.executors import Executor


def declare(parser: argparse.ArgumentParser) -> Run:
    add_run_options(parser)

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import jobs

        made, executor = jobs.jobs(options), jobs.executor(options)
        _run.announce(made, jobs.describe(executor), options.results, screen)
        is_all = jobs.is_all(options)
        left_out: dict[str, str] = {}
        plans = [plan for job in made for plan in _run.attempt(job, partial(_plan, job, executor, options, screen), left_out, is_all)]
        screen.give([*plans, *_run.say_left_out(left_out, len(made), screen)])
        return INCOMPLETE if left_out else COMPLETE

    return run


def _plan(job: Job, executor: Executor, options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    from mmalign import evaluate, jobs

    with screen.progress() as show:
        plan = evaluate.plan(job, executor, options.results, report=partial(_run.advance, show, screen))
    values = plan.expected * len(plan.scorers)
    seconds = jobs.seconds_left(plan, executor, options.results)
    judges = ", ".join(plan.scorers) or "nothing"
    screen.say(f"{job.suite}: {len(plan.prompts)} prompts, {plan.expected} images, scored by {judges}")
    screen.say(f"  there already  {plan.cached_samples} images, {plan.cached_scores} of {values} values, {plan.failures} failures")
    screen.say(f"  to do          {plan.expected - plan.cached_samples} images, {values - plan.cached_scores} values")
    screen.say(f"  time           {'unknown before the first images' if seconds is None else f'about {_run.duration(seconds)}'}")
    for deviation in plan.deviations:
        screen.say(f"  deviates       {deviation.field}={deviation.used} (card: {deviation.official})")
    return {
        "suite": job.suite,
        "model": job.model_name,
        "run": plan.run,
        "directory": evaluate.run_directory(options.results, job),
        "prompts": len(plan.prompts),
        "images": plan.expected,
        "values": values,
        "cached": {"images": plan.cached_samples, "values": plan.cached_scores, "failures": plan.failures},
        "seconds": seconds,
        "deviations": [asdict(deviation) for deviation in plan.deviations],
    }
