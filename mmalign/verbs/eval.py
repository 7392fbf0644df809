"""Run suites on a model, or continue where an earlier run stopped. The same command line again continues."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.options import add_run_options
from mmalign.screen import Screen
from mmalign.verbs import COMPLETE, INCOMPLETE, Run, _run

if TYPE_CHECKING:
    from mmalign.evaluate import Job, Progress
    from mmalign.types import Result


def declare(parser: argparse.ArgumentParser) -> Run:
    add_run_options(parser)
    parser.add_argument("--retry-failed", action="store_true", help="redo what failed in earlier runs, and nothing else")
    parser.add_argument("--wait", action="store_true", help="wait when another run uses the run directory")
    parser.add_argument("--show-unsafe", action="store_true", help="the report prints prompts and answers of unsafe suites in full")
    parser.add_argument("--show-config", action="store_true", help="print every option with the value in force, and stop")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import config, jobs

        if options.show_config:
            shown = jobs.settings(jobs.jobs(options))
            screen.say(config.dump_yaml(shown).rstrip())
            screen.give(shown)
            return COMPLETE
        made, executor = jobs.jobs(options), jobs.executor(options)
        _run.announce(made, jobs.describe(executor), options.results, screen)
        is_all = jobs.is_all(options)
        left_out: dict[str, str] = {}
        able: list[Job] = []
        for job in made:  # missing data of the last suite must not surface after hours of the first
            able += _run.attempt(job, partial(_with_prompts, job), left_out, is_all)
        results = [
            result for job in able for result in _run.attempt(job, partial(_evaluate, job, executor, options, screen), left_out, is_all)
        ]
        results += _run.say_left_out(left_out, len(made), screen)
        screen.give(results)
        return COMPLETE if all(result["is_complete"] for result in results) else INCOMPLETE

    return run


def _with_prompts(job: Job) -> Job:
    """The job, whose prompts are there."""
    job.evaluator.prompts(job.split)
    return job


def _evaluate(job: Job, executor: Any, options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    from mmalign import evaluate, report, results

    saved: dict[str, Progress] = {}

    def watch(progress: Progress) -> None:
        saved[f"{progress.stage} {progress.name}"] = progress
        _run.advance(show, screen, progress)

    try:
        with screen.progress() as show:
            result = evaluate.evaluate(
                job,
                executor,
                options.results,
                batch=options.batch_size,
                retry_failed=options.retry_failed,
                wait=options.wait,
                command=options.command,
                report=watch,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_saved(saved, job, evaluate.run_directory(options.results, job), options.command)) from None
    directory = evaluate.run_directory(options.results, job)
    _say_result(result, directory, screen)
    page = report.write_report([results.json_path(directory, result.run)], show_unsafe=options.show_unsafe)
    screen.say(f"  report    {page}")
    return {
        **asdict(result),
        "line": results.paste_line(result),
        "is_complete": results.is_complete(result),
        "continue": results.continue_line(result),
        "file": results.json_path(directory, result.run),
        "report": page,
    }


def _say_result(result: Result, directory: Path, screen: Screen) -> None:
    from mmalign import results

    screen.say(results.paste_line(result))
    for warning in result.provenance.get("warnings", ()):
        screen.say(f"  warning   {warning}")
    if not results.is_complete(result):
        counts = result.counts
        kinds = ", ".join(f"{number} {kind}" for kind, number in counts.failed.items()) or "headline undefined"
        screen.say(f"  {counts.expected} images, {counts.scored} scored, {counts.expected - counts.scored} failed: {kinds}")
        screen.say("  not written to the leaderboard")
        if results.continue_line(result):
            screen.say(f"  continue  {results.continue_line(result)}")
        screen.say(f"  inspect   {directory / 'index.html'}#failed")


def _saved(stages: dict[str, Progress], job: Job, directory: Path, command: str) -> str:
    """What Ctrl-C says: everything that was reported done is on disk."""
    parts = [
        f"{stage.done} of {stage.total} {'images' if stage.stage == 'generate' else f'values of {stage.name}'}"
        for stage in stages.values()
        if stage.stage in ("generate", "score")
    ]
    return f"Stopped in {job.suite}. Saved in {directory}: {', '.join(parts) or 'nothing new'}. Continue: {command}"
