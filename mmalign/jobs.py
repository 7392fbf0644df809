"""From what was typed to jobs: names become files, `--set` options reach their owners, devices become an executor."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from mmalign import config, doctor, hub, protocol, registry
from mmalign.evaluate import Job, Plan, run_directory
from mmalign.executors import Executor, Inline, Processes
from mmalign.store import Store
from mmalign.types import Evaluator, Sample, UsageError
from mmalign.worker import Recipe

ALL = "all"
Sets = Mapping[str, Mapping[str, str]]


def jobs(options: argparse.Namespace) -> list[Job]:
    """One job per suite named, everything about it checked that can be checked without loading weights."""
    sets = config.parse_sets(options.set)
    every = registry.entries("evaluators", options.plug)
    suites = list(every.values()) if is_all(options) else [registry.find("evaluators", name, options.plug) for name in names(options.suite)]
    spec, model = model_recipe(options, sets)
    facts = {"family": spec.family, "source": options.model, "revision": spec.revision, "dtype": model.arguments["dtype"]}
    trained = hub.training_facts(spec.path)
    facts |= {name: trained[name] for name in ("trained_on_rewards", "trainer", "steps") if name in trained}
    made = []
    for entry in suites:
        evaluator, rest = _evaluator(entry, sets)
        scorers = suite_scorers(evaluator, {**sets, **rest}, options.plug)
        made.append(
            Job(
                suite=entry.name,
                evaluator=evaluator,
                card=registry.card(entry),
                model_name=spec.name,
                model=with_protocol(model, evaluator),
                scorers=scorers,
                model_facts=facts,
                split=options.split,
                images_per_prompt=options.images_per_prompt,
                size=options.size,
                seed=options.seed,
                limit=options.limit,
            )
        )
    config.check_roots(sets, {"sampling", *(job.suite for job in made), *(name for job in made for name in job.scorers)})
    return made


def model_recipe(options: argparse.Namespace, sets: Sets) -> tuple[hub.ModelSpec, Recipe]:
    """The checkpoint that --model names, and how to load it."""
    spec = hub.resolve_model(options.model, options.plug)
    dtype = options.dtype or ("float32" if devices(options.device) == ("cpu",) else "bfloat16")
    arguments = {"path": spec.path, "dtype": dtype, "extra": options.model_extra}
    return spec, Recipe(registry.find("models", spec.family, options.plug), sets.get("sampling", {}), arguments)


def is_all(options: argparse.Namespace) -> bool:
    """Whether every suite is asked for: then those that cannot run here are left out and named, and the others run."""
    return bool(options.suite.strip().lower() == ALL)


def with_protocol(model: Recipe, evaluator: Evaluator) -> Recipe:
    """The model with the sampling settings of a suite's protocol and, over these, those that were set."""
    if not hasattr(evaluator, "sampling_options"):
        return model
    known = [item.name for item in fields(registry.load(model.entry).Sampling)]
    typed = {option.replace("-", "_"): value for option, value in model.overrides.items()}
    return replace(model, overrides={**protocol.sampling(evaluator, known), **typed})


def suite_scorers(evaluator: Evaluator, sets: Sets, plugs: Sequence[Path]) -> dict[str, Recipe]:
    """A suite's scorers by name, with the options of its protocol and, over these, those that were set."""
    protocol = getattr(evaluator, "scorer_options", {})
    return {name: scorer_recipe(name, sets, plugs, protocol.get(name, {})) for name in evaluator.scorers}


def scorer_recipe(name: str, sets: Sets, plugs: Sequence[Path], protocol: Mapping[str, Any] = {}) -> Recipe:
    """A scorer by name, with the options that were set on it, else those of the protocol that asks for it."""
    entry = registry.find("scorers", name, plugs)
    typed = {option.replace("-", "_"): value for option, value in sets.get(entry.name, {}).items()}
    return Recipe(entry, {**protocol, **typed})


def scorer_recipes(options: argparse.Namespace) -> dict[str, Recipe]:
    """The scorers that --scorers names ("all": every one), with what --set says of them."""
    typed = [part for part in options.scorers.split(",") if part.strip()]
    listed = list(registry.entries("scorers", options.plug)) if typed == ["all"] else typed
    sets = config.parse_sets(options.set)
    recipes = {(made := scorer_recipe(name, sets, options.plug)).entry.name: made for name in listed}
    if not recipes:
        raise UsageError("--scorers names none; expected names such as hpsv2,ocr (`mmalign ls scorers`).")
    config.check_roots(sets, recipes)
    return recipes


def executor(options: argparse.Namespace) -> Executor:
    """Worker processes: one per core on a CPU, one per GPU otherwise; -j decides differently. `inline` runs in this process."""
    places = devices(options.device)
    if options.executor == "inline":
        return Inline(places[0])
    workers = options.jobs or (doctor.cores() if places == ("cpu",) else len(places))
    return Processes(workers=workers, devices=places, seconds_per_item=options.timeout)


def devices(text: str) -> tuple[str, ...]:
    """ "auto" -> every GPU that the installed torch can use, else the CPU; otherwise the comma-separated devices named."""
    if text != "auto":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    has_cuda_build = not metadata.version("torch").endswith("+cpu")
    found = doctor.gpus() if has_cuda_build else []
    return tuple(f"cuda:{number}" for number in range(len(found))) or ("cpu",)


def describe(executor: Executor) -> str:
    """Where the work will run, in words."""
    if isinstance(executor, Processes):
        noun = "process" if executor.workers == 1 else "processes"
        return f"{executor.workers} worker {noun} on {', '.join(executor.devices)}"
    return "this process"


def settings(made: Sequence[Job]) -> dict[str, Any]:
    """Every option of these jobs with the value in force, as --set would name it. Imports the files, loads no weights."""
    shown: dict[str, Any] = {}
    for job in made:
        shown[job.suite] = config.plain(job.evaluator)
        for name, recipe in job.scorers.items():
            options = config.plain(config.build(registry.load(recipe.entry).Config, recipe.overrides, name))
            shown[name] = {**shown.get(name, {}), **options}
        shown["sampling"] = config.plain(config.build(registry.load(job.model.entry).Sampling, job.model.overrides, "sampling"))
    return shown


def seconds_left(plan: Plan, executor: Executor, results: Path) -> float | None:
    """Time to generate what is missing, from the mean of the images that are there; None before the first."""
    store = Store.read(run_directory(results, plan.job))
    try:
        seconds = [sample.seconds for sample in store.samples(plan.requests).values() if isinstance(sample, Sample)]
    finally:
        store.close()
    workers = executor.workers if isinstance(executor, Processes) else 1
    return sum(seconds) / len(seconds) * (plan.expected - len(seconds)) / workers if seconds else None


def names(text: str) -> list[str]:
    """ "geneval,wise" -> ["geneval", "wise"], each once."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise UsageError("--suite is empty. Name one or more suites, such as --suite geneval,wise; `mmalign ls suites` lists them.")
    return found


def _evaluator(entry: registry.Entry, sets: Sets) -> tuple[Evaluator, Sets]:
    """The suite with its options. A suite and its scorer may share a name; what the suite does not know is then the scorer's."""
    cls = registry.load(entry).Evaluator
    typed = sets.get(entry.name, {})
    is_shared = entry.name in doctor.scorers_of(entry)
    known = {item.name for item in fields(cls)}
    own = {name: value for name, value in typed.items() if name in known or not is_shared}
    rest = {name: value for name, value in typed.items() if name not in own}
    return config.build(cls, own, entry.name), {entry.name: rest} if is_shared else {}
