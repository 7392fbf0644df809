"""The command line: a function `verb_<name>` is a verb. It declares its options on the parser it is given and returns what to run.

A verb's help is its function's docstring; `--json`, `--debug` and `--plug` belong to every verb. Exit codes: 0 every requested number is
complete, 2 the command cannot mean anything as typed, 3 incomplete, 1 any other error. Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign import __version__, registry
from mmalign.options import Parser, add_evaluation_options, add_run_options, add_worker_options
from mmalign.screen import Screen, Show, columns
from mmalign.types import MmalignError, UsageError

if TYPE_CHECKING:
    from mmalign.evaluate import Job, Progress
    from mmalign.types import Result

COMPLETE, ERROR, USAGE, INCOMPLETE = 0, 1, 2, 3
GROUPS = {"suites": "evaluators", "models": "models", "scorers": "scorers", "trainers": "trainers"}

Run = Callable[[argparse.Namespace, Screen], int]

EPILOG = """examples:
  mmalign eval --model tiny-janus --suite shapes --limit 40     the bundled checkpoint on the bundled suite, in a minute or two
  mmalign eval --model ./checkpoint --suite geneval,shapes      run, or continue where it stopped
  mmalign explain geneval                                       protocol, formula, known traps
exit codes: 0 complete, 2 usage, 3 incomplete, 1 error"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    typed = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the bars on the screen are ours
    screen = Screen("--json" in typed)
    try:
        options = _parse(typed)
        return options.run(options, screen)
    except UsageError as error:
        return _fail(screen, str(error), USAGE, typed)
    except MmalignError as error:
        return _fail(screen, str(error), ERROR, typed)
    except KeyboardInterrupt as stop:
        return _fail(screen, str(stop) or "Stopped.", INCOMPLETE, typed)
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        sys.stderr.close()
        return COMPLETE
    except Exception as error:  # noqa: BLE001 (the command line's top: a fault of ours must still be a sentence)
        text = f"Unexpected {type(error).__name__}: {error}. This is a fault in mmalign or a plug-in; --debug shows the traceback."
        return _fail(screen, text, ERROR, typed)


# -- verbs --------------------------------------------------------------------------------------------------------------------------


def verb_ls(parser: argparse.ArgumentParser) -> Run:
    """Names of suites, models, scorers and trainers, one line each, with what is missing to run them."""
    parser.add_argument("filter", nargs="*", metavar="suites|models|scorers|trainers|TEXT", help="a kind, a text to look for, or both")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import doctor, hub

        kinds = [word for word in options.filter if word in GROUPS] or list(GROUPS)
        texts = [word.lower() for word in options.filter if word not in GROUPS]
        found = [(kind.removesuffix("s"), item) for kind in kinds for item in doctor.readiness(GROUPS[kind], options.plug)]
        lines = [(noun, item.entry.name, item.short_mark, item.entry.description) for noun, item in found]
        content = [{**asdict(item.entry), "ready": not item.unmet, "unmet": [asdict(need) for need in item.unmet]} for _, item in found]
        if "models" in kinds:
            for name in hub.bundled_names():
                lines.append(("checkpoint", name, "ready", f"bundled: --model {name}"))
                content.append({"kind": "checkpoints", "name": name, "description": "bundled", "ready": True, "unmet": []})
        kept = [number for number, line in enumerate(lines) if all(text in " ".join(line).lower() for text in texts)]
        if not kept:
            raise UsageError(f"Nothing is called '{' '.join(texts)}'{registry.suggest(' '.join(texts), [line[1] for line in lines])}")
        for line in columns([lines[number] for number in kept]):
            screen.say(line)
        screen.give([content[number] for number in kept])
        return COMPLETE

    return run


def verb_explain(parser: argparse.ArgumentParser) -> Run:
    """A suite's protocol card: prompts, images, seed, judge, formula, paper tables, options, known traps."""
    parser.add_argument("name", metavar="SUITE", help="a suite; a scorer, model family or trainer shows its docstring and options")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import explain

        content = explain.explain(options.name, options.plug)
        for line in explain.lines(content):
            screen.say(line)
        screen.give(content)
        return COMPLETE

    return run


def verb_plan(parser: argparse.ArgumentParser) -> Run:
    """What eval would run, what of it is there already, its cost and its deviations from the protocol; writes nothing."""
    add_run_options(parser)

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import evaluate, jobs

        made, executor, plans = jobs.jobs(options), jobs.executor(options), []
        _announce(made, jobs.describe(executor), options.results, screen)
        for job in made:
            with screen.progress() as show:
                plan = evaluate.plan(job, executor, options.results, report=partial(_show, show, screen))
            values = plan.expected * len(plan.scorers)
            seconds = jobs.seconds_left(plan, executor, options.results)
            judges = ", ".join(plan.scorers) or "nothing"
            screen.say(f"{job.suite}: {len(plan.prompts)} prompts, {plan.expected} images, scored by {judges}")
            screen.say(f"  there already  {plan.cached_samples} images, {plan.cached_scores} of {values} values, {plan.failures} failures")
            screen.say(f"  to do          {plan.expected - plan.cached_samples} images, {values - plan.cached_scores} values")
            screen.say(f"  time           {'unknown before the first images' if seconds is None else f'about {_duration(seconds)}'}")
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


def verb_eval(parser: argparse.ArgumentParser) -> Run:
    """Run suites on a model, or continue where an earlier run stopped. The same command line again continues."""
    add_run_options(parser)
    parser.add_argument("--retry-failed", action="store_true", help="redo what failed in earlier runs, and nothing else")
    parser.add_argument("--wait", action="store_true", help="wait when another run uses the run directory")
    parser.add_argument("--show-config", action="store_true", help="print every option with the value in force, and stop")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import config, jobs

        if options.show_config:
            shown = jobs.settings(jobs.jobs(options))
            screen.say(config.dump_yaml(shown).rstrip())
            screen.give(shown)
            return COMPLETE
        made, executor = jobs.jobs(options), jobs.executor(options)
        _announce(made, jobs.describe(executor), options.results, screen)
        for job in made:  # missing data of the last suite must not surface after hours of the first
            job.evaluator.prompts(job.split)
        results = [_evaluate(job, executor, options, screen) for job in made]
        screen.give(results)
        return COMPLETE if all(result["is_complete"] for result in results) else INCOMPLETE

    def _evaluate(job: Job, executor: Any, options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
        from mmalign import evaluate, report, results

        saved: dict[str, Progress] = {}

        def watch(progress: Progress) -> None:
            saved[f"{progress.stage} {progress.name}"] = progress
            _show(show, screen, progress)

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
        page = report.write_report([results.json_path(directory, result.run)])
        screen.say(f"  report    {page}")
        return {
            **asdict(result),
            "line": results.paste_line(result),
            "is_complete": results.is_complete(result),
            "continue": results.continue_line(result),
            "file": results.json_path(directory, result.run),
            "report": page,
        }

    return run


def verb_score(parser: argparse.ArgumentParser) -> Run:
    """Score a folder of images with any scorers: a table here, every value in a Parquet file."""
    what = parser.add_argument_group("what")
    what.add_argument("--images", required=True, type=Path, metavar="DIR", help="images, in this folder or below it")
    what.add_argument("--prompts", type=Path, metavar="FILE", help=".txt (a line per image), .json or .jsonl (by image name)")
    what.add_argument("--scorers", required=True, metavar="NAME[,NAME]", help="as `mmalign ls scorers` lists them")
    what.add_argument("--set", action="append", default=[], metavar="SCORER.OPTION=VALUE", help="an option of a scorer")
    what.add_argument("--out", type=Path, metavar="FILE", help="the Parquet file (default: scores.parquet in the folder)")
    what.add_argument("--attribution", metavar="TOOL", help="also draw what earned each score (fast_shap, shap, gradcam, ...) into maps/")
    add_worker_options(parser.add_argument_group("how (none of it changes a number)"))

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import jobs, scoring

        recipes = jobs.scorer_recipes(options)
        with screen.progress() as show:
            scores = scoring.score_folder(
                options.images,
                options.prompts,
                recipes,
                jobs.executor(options),
                options.batch_size,
                lambda name, done, total: show(name, f"score {name}", done, total),
            )
        out = options.out or options.images / "scores.parquet"
        scoring.write_parquet(scores, out)
        found = scores.summary()
        for text in columns([list(found[0]), *([scoring.cell(value) for value in line.values()] for line in found)]):
            screen.say(text)
        screen.say(f"{len(scores.rows)} images, every value in {out}")
        tool, device = options.attribution, jobs.devices(options.device)[0]
        maps = scoring.write_maps(scores, recipes, tool, device, out.parent / "maps") if tool else []
        screen.say(f"{len(maps)} maps in {out.parent / 'maps'}" if tool else "")
        screen.give({"scorers": found, "file": out, "maps": maps})
        return INCOMPLETE if scores.failures else COMPLETE

    return run


def verb_serve(parser: argparse.ArgumentParser) -> Run:
    """Serve scorers over HTTP to the scorer `remote` of other processes and machines, until interrupted."""
    what = parser.add_argument_group("what")
    what.add_argument("--scorers", required=True, metavar="NAME[,NAME]", help="as `mmalign ls scorers` lists them")
    what.add_argument("--set", action="append", default=[], metavar="SCORER.OPTION=VALUE", help="an option of a scorer")
    how = parser.add_argument_group("how (beyond this machine only with a token, read from MMALIGN_TOKEN)")
    how.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: %(default)s, this machine)")
    how.add_argument("--port", type=int, default=8190, metavar="N", help="0 takes a free one (default: %(default)s)")
    how.add_argument("--batch-size", type=int, default=16, metavar="N", help="items a scorer gets at once (default: %(default)s)")
    how.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for one request (default: %(default)s)")
    how.add_argument("--device", default="auto", metavar="DEVICE", help="cpu, cuda:0 or auto (default: %(default)s)")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import jobs, serve

        recipes = jobs.scorer_recipes(options)
        settings = serve.Settings(options.host, options.port, batch_size=options.batch_size, timeout=options.timeout)

        def ready(server: serve.Server) -> None:
            screen.say(f"serving {', '.join(recipes)} at {server.url} (Ctrl-C ends it)")

        try:
            serve.serve(recipes, settings, jobs.devices(options.device)[0], ready)
        except KeyboardInterrupt:
            screen.say("ended")
        screen.give({"served": list(recipes)})
        return COMPLETE

    return run


def verb_train(parser: argparse.ArgumentParser) -> Run:
    """Train a checkpoint with a method and a reward, or continue where the run stopped; --then-eval measures it beside its base.

    Every option of the trainer is a flag (--learning-rate 1e-5, --steps 200, --attribution fast_shap); --show-config lists them.
    The same line under `torchrun --nproc-per-node N -m mmalign` trains on N processes.
    """
    parser.add_argument("trainer", metavar="TRAINER", help="a method, as `mmalign ls trainers` lists them")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--model", required=True, metavar="MODEL", help="the checkpoint to start from: a bundled name, PATH, FAMILY:PATH or hub id"
    )
    what.add_argument("--reward", metavar="NAME=W[,NAME=W]", help="scorers and their weights (default: the recipe's, or the paper's)")
    what.add_argument("--prompts", metavar="SUITE|FILE", help="a suite's train split, a .txt file, or a .jsonl file")
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
        screen.say(f"{job.trainer.name} on {job.spec.name}: reward {_weights(job.reward)}, prompts {job.source}, run {job.run}")
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


def verb_report(parser: argparse.ArgumentParser) -> Run:
    """Static HTML of one or more runs: headline table, figures, galleries and comparisons. It opens from disk."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, a result's JSON file, or a folder of runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the run's directory, or report/ beside several)")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import report

        page = report.write_report(options.runs, options.out)
        screen.say(str(page))
        screen.give({"report": page})
        return COMPLETE

    return run


def verb_doctor(parser: argparse.ArgumentParser) -> Run:
    """Environment, cores, GPUs, packages; which suites, scorers and models run here; the commands that fix the rest."""
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


def verb_data(parser: argparse.ArgumentParser) -> Run:
    """Benchmark files: list them, add one you have (checked by sha256), or fetch one from its pinned address."""
    parser.add_argument("action", nargs="?", choices=("list", "add", "fetch"), default="list")
    parser.add_argument("name", nargs="?", help="the name of the data, as `mmalign data` lists it")
    parser.add_argument("--from", dest="source", type=Path, metavar="PATH", help="the file, or a folder that holds it (add)")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import data

        if options.action == "list":
            found = data.listing()
            for line in columns([(item.source.name, item.state, item.source.licence, str(item.path)) for item in found]):
                screen.say(line)
            screen.give([{**asdict(item.source), "path": item.path, "state": item.state} for item in found])
            return COMPLETE
        if options.name is None:
            raise UsageError(f"`mmalign data {options.action}` needs a name; `mmalign data` lists them.")
        if options.action == "add" and options.source is None:
            raise UsageError(f"Where is the file? mmalign data add {options.name} --from PATH")
        path = data.fetch(options.name) if options.action == "fetch" else data.add(options.name, options.source)
        screen.say(f"{options.name} is ready: {path}")
        screen.give({"name": options.name, "path": path})
        return COMPLETE

    return run


# -- shared by verbs that run something ---------------------------------------------------------------------------------------------


def _try_scorers(options: argparse.Namespace) -> dict[str, str]:
    from mmalign import executors, jobs, scoring

    one = executors.Processes(workers=1, devices=jobs.devices("auto")[:1])
    return scoring.self_test(jobs.scorer_recipes(options), one)


def _announce(made: Sequence[Job], where: str, results: Path, screen: Screen) -> None:
    from mmalign.evaluate import run_directory

    suites = ", ".join(job.suite for job in made)
    screen.say(f"{made[0].model_name} on {suites}: {where}, results in {run_directory(results, made[0]).parent}")


def _show(show: Show, screen: Screen, progress: Progress) -> None:
    if progress.stage == "wait":
        screen.note(f"{progress.name} Waiting.")
    failed = f" ({progress.failed} failed)" if progress.failed else ""
    show(f"{progress.stage} {progress.name}", f"{progress.stage} {progress.name}{failed}", progress.done, progress.total)


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


def _weights(reward: Any) -> str:
    return " + ".join(f"{weight:g} {name}" for name, weight in reward.items()) or "the model's own"


def _saved(stages: dict[str, Progress], job: Job, directory: Path, command: str) -> str:
    """What Ctrl-C says: everything that was reported done is on disk."""
    parts = [
        f"{stage.done} of {stage.total} {'images' if stage.stage == 'generate' else f'values of {stage.name}'}"
        for stage in stages.values()
        if stage.stage in ("generate", "score")
    ]
    return f"Stopped in {job.suite}. Saved in {directory}: {', '.join(parts) or 'nothing new'}. Continue: {command}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# -- start and end -----------------------------------------------------------------------------------------------------------------


def _parse(typed: list[str]) -> argparse.Namespace:
    parser = Parser(prog="mmalign", description="Evaluate and align text-to-image and unified multimodal models.", epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"mmalign {__version__}")
    verbs = {name.removeprefix("verb_"): function for name, function in globals().items() if name.startswith("verb_")}
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for name, declare in verbs.items():
        text = (declare.__doc__ or "").strip()
        sub = subparsers.add_parser(name, help=text.split(":")[0].split(".")[0], description=text, allow_abbrev=False)
        sub.set_defaults(run=declare(sub), command=shlex.join(["mmalign", *typed]))
        general = sub.add_argument_group("every verb")
        general.add_argument("--json", action="store_true", help="one JSON document on standard output")
        general.add_argument("--debug", action="store_true", help="tracebacks instead of a sentence")
        general.add_argument("--plug", action="append", type=Path, default=[], metavar="FILE", help="register a Python file (repeatable)")
    first = next((word for word in typed if not word.startswith("-")), None)
    if first is None and not {"-h", "--help", "--version"} & set(typed):
        parser.print_help()
        raise SystemExit(USAGE)
    if first is not None and first not in verbs and typed[0] == first:
        raise UsageError(f"Unknown verb '{first}'{registry.suggest(first, verbs)}")
    if first in verbs:
        if subparsers.choices[first].get_default("takes_rest"):
            options, rest = parser.parse_known_args(typed)
            options.rest = rest
            return options
        known = list(subparsers.choices[first]._option_string_actions)
        for word in typed:
            flag = word.partition("=")[0]
            if flag.startswith("--") and len(flag) > 2 and flag not in known:
                near = difflib.get_close_matches(flag, known, n=1)
                hint = f"Did you mean '{near[0]}'?" if near else f"See: mmalign {first} --help"
                raise UsageError(f"Unknown option '{flag}' of mmalign {first}. {hint}")
    return parser.parse_args(typed)


def _fail(screen: Screen, sentence: str, code: int, typed: Sequence[str]) -> int:
    """Say what went wrong: on standard error for a person, as {"error", "exit"} on standard output with --json."""
    if "--debug" in typed:
        screen.note(traceback.format_exc().rstrip())
    if screen.as_json:
        screen.give({"error": sentence, "exit": code})
    else:
        screen.note(f"mmalign: {sentence}")
    return code
