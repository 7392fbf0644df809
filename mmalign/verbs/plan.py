"""What eval would run, what of it is there already, its cost and its deviations from the protocol; writes nothing."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial

from mmalign.options import add_run_options
from mmalign.screen import Screen
from mmalign.verbs import COMPLETE, Run, _run


def declare(parser: argparse.ArgumentParser) -> Run:
    add_run_options(parser)

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import evaluate, jobs

        made, executor, plans = jobs.jobs(options), jobs.executor(options), []
        _run.announce(made, jobs.describe(executor), options.results, screen)
        for job in made:
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
            plans.append(
                {
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
            )
        screen.give(plans)
        return COMPLETE

    return run
