"""From what was typed to a training run: a trainer's config, a model, a reward, prompts, one folder; then the checkpoint it leaves.

A run's folder holds `run.json` (everything that was chosen), `metrics.jsonl`, `samples/` and `rollouts/` (pictures), `state/` (to
continue from) and, at the end, `index.html` (the report) and `model/`: the trained checkpoint in its family's official layout with
`training.json`, which says what it was rewarded for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmalign import config, history, hub, jobs, registry, trackers
from mmalign.prompts import is_unsafe, read_prompts
from mmalign.store import slug, write_atomic
from mmalign.types import Result, UsageError, digest
from mmalign.worker import Recipe


@dataclass(frozen=True)
class Training:
    """A run, decided and checked as far as that is possible without loading weights."""

    trainer: registry.Entry
    config: Any
    spec: hub.ModelSpec
    model: Recipe
    reward: Mapping[str, float]
    sets: Mapping[str, Mapping[str, str]]  # options of scorers and suites, by name
    source: str  # where the prompts come from; empty when the trainer learns from pairs
    data: str  # where the pairs come from; empty when it learns from prompts
    panel: str  # suite measured on held-out prompts during training; empty: none
    run: Path
    recipe: Path | None
    plugs: Sequence[Path]
    device: str

    @property
    def folder(self) -> Path:
        """Where the trained checkpoint goes."""
        return self.run / "model"


def training(options: argparse.Namespace) -> Training:
    """Flags over --config over the recipe that ships for this trainer and model over the paper's defaults."""
    entry = registry.find("trainers", options.trainer, options.plug)
    module = registry.load(entry)
    sets = config.parse_sets(options.set)
    spec, model = jobs.model_recipe(options, sets)
    recipe = options.config or bundled_recipe(entry, spec)
    chosen = dict(config.load_yaml(recipe) or {}) if recipe else {}
    common = {name: chosen.pop(name, None) for name in ("reward", "prompts", "data", "panel", "options")}
    for root, values in (common["options"] or {}).items():
        sets[root] = {**{name: str(value) for name, value in values.items()}, **sets.get(root, {})}
    typed: dict[str, Any] = {**flags(options.rest), **sets.pop(entry.name, {})}
    if options.size and "size" in {item.name for item in fields(module.Config)}:
        typed["size"] = list(options.size)  # trained at the size at which it is evaluated
    made = config.build(module.Config, {**chosen, **typed}, entry.name)
    trackers.check_trackers(made.tracker)
    text = options.reward or common["reward"] or module.REWARD
    from mmalign.reward import parse_weights

    source, data = options.prompts or common["prompts"] or "", options.data or common["data"] or ""
    check_source(entry.name, learns_from_pairs(module), source, data, text or "")
    name = f"{spec.name}-{entry.name}-{digest(essence(config.plain(made)), text, source or data, str(spec.path))[:8]}"
    return Training(
        trainer=entry,
        config=made,
        spec=spec,
        model=model,
        reward=parse_weights(text) if text else {},
        sets=sets,
        source=source,
        data=data,
        panel=options.panel or common["panel"] or "",
        run=options.run_dir or Path("runs") / slug(name),
        recipe=recipe,
        plugs=tuple(options.plug),
        device=jobs.devices(options.device)[0],
    )


def learns_from_pairs(module: Any) -> bool:
    """Whether a trainer takes image-text pairs (its module says DATA = "pairs") in place of prompts."""
    return getattr(module, "DATA", "prompts") == "pairs"


def check_source(trainer: str, is_pairs: bool, source: str, data: str, reward: str) -> None:
    """UsageError when a trainer is not given what it learns from, or is given what it cannot use."""
    if is_pairs and not data:
        raise UsageError(f"`mmalign train {trainer}` learns from image-text pairs: --data with a folder, a .jsonl file or .tar shards.")
    if is_pairs and (source or reward):
        raise UsageError(
            f"`mmalign train {trainer}` draws no samples of its own, so it takes neither --prompts nor --reward. Measure it with "
            "--panel and --then-eval."
        )
    if not is_pairs and data:
        raise UsageError(f"`mmalign train {trainer}` learns from prompts and a reward, not from --data. Give --prompts SUITE or FILE.")
    if not is_pairs and not source:
        raise UsageError(f"`mmalign train {trainer}` needs prompts: --prompts SUITE (its train split) or --prompts FILE (.txt or .jsonl).")


def essence(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide what a run computes, without those that only look at it."""
    from mmalign.loop import OBSERVING

    return {name: value for name, value in options.items() if name not in OBSERVING}


def bundled_recipe(entry: registry.Entry, spec: hub.ModelSpec) -> Path | None:
    """trainers/recipes/<trainer>.<model>.yaml, for a bundled checkpoint that has one."""
    file = entry.path.parent / "recipes" / f"{entry.name}.{spec.name}.yaml"
    return file if file.is_file() else None


def flags(rest: Sequence[str]) -> dict[str, str]:
    """The trainer's own options as typed: --learning-rate 1e-5, --beta=0, --no-reasoning."""
    found: dict[str, str] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"'{word}' is not an option. A trainer's options are --NAME VALUE, as --show-config lists them.")
        name, equals, value = word[2:].partition("=")
        if not equals and name.startswith("no-") and (not words or words[0].startswith("--")):
            name, value = name[3:], "false"
        elif not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        found[name.replace("-", "_")] = value
    return found


def described(job: Training) -> dict[str, Any]:
    """Everything that was chosen, as run.json keeps it and --show-config prints it."""
    return {
        "trainer": job.trainer.name,
        "model": {"name": job.spec.name, "family": job.spec.family, "path": str(job.spec.path)},
        "reward": dict(job.reward),
        **({"data": job.data} if job.data else {"prompts": job.source}),
        "panel": job.panel,
        **({"unsafe": True} if is_unsafe(job.source, job.plugs) or is_unsafe(job.panel, job.plugs) else {}),
        "recipe": str(job.recipe) if job.recipe else None,
        "config": config.plain(job.config),
        "options": {root: dict(values) for root, values in job.sets.items()},
    }


def train(job: Training, say: Callable[[str], None]) -> Path:
    """Runs or continues the training; returns the folder of the trained checkpoint. Under torchrun every process calls this."""
    from mmalign import distributed
    from mmalign.loop import Loop
    from mmalign.pairs import open_pairs
    from mmalign.reward import load_reward
    from mmalign.watch import SHOWN_PROMPTS, Panel, SamePictures

    distributed.start()
    module = registry.load(job.trainer)
    pairs = open_pairs(job.data, job.config.seed) if job.data else None
    prompts = read_prompts(job.source, job.plugs, job.sets) if pairs is None else pairs.prompts(SHOWN_PROMPTS)
    write_run(job, {} if pairs is None else {"pairs": {"number": len(pairs), "fingerprint": pairs.source.fingerprint}})
    model = load_model(job)
    reward = load_reward(job.reward, overrides=job.sets, device=job.device, plugs=job.plugs) if job.reward else None
    panel = Panel(job, model) if job.panel and job.config.panel_every else None
    shown = SamePictures(job, model, panel.prompts if panel else prompts) if job.config.image_every else None
    loop = Loop(job.config, model, job.run, panel, say if distributed.rank() == 0 else None, shown)
    if loop.step:
        say(f"continues after step {loop.step} of {job.config.steps}")
    if distributed.rank() == 0:
        loop.trackers = trackers.open_trackers(job.config.tracker, job.run, described(job), loop.step)
    try:
        module.train(job.config, model, reward, prompts if pairs is None else pairs, loop)
    finally:
        for tracker in loop.trackers:
            tracker.close()
    loop.export(job.folder)
    if distributed.rank() == 0:
        trained_on = sorted(job.reward) if module.REWARD is not None or pairs is not None else ["self_understanding"]
        note = history.hacking_note(history.read_metrics(job.run))
        facts = {"name": job.run.name, **described(job), "trained_on_rewards": trained_on, "steps": loop.step, "note": note}
        (job.folder / hub.TRAINING_FILE).write_text(json.dumps(facts, indent=1) + "\n")
        if note:
            say(f"warning   {note}")
        say(f"  report    {_write_page(job)}")
    distributed.stop()
    return job.folder


def write_run(job: Training, found: Mapping[str, Any]) -> None:
    """Keeps the run's choices and what was `found` where they point; a folder that holds another run is refused, never mixed."""
    from mmalign import distributed

    file, facts = job.run / "run.json", {**described(job), **found}
    if file.exists():
        kept, given = json.loads(file.read_text()), json.loads(json.dumps(facts, default=str))
        kept["config"], given["config"] = essence(kept["config"]), essence(given["config"])
        differing = [name for name in given if given[name] != kept.get(name)]
        if differing:
            raise UsageError(
                f"{job.run} holds a run with another {', '.join(differing)}. Continue it with its own command, or choose another --run-dir."
            )
    elif distributed.rank() == 0:
        job.run.mkdir(parents=True, exist_ok=True)
        # Whole or absent: another process of the run may be reading it.
        write_atomic(file, (json.dumps(facts, indent=1, default=str) + "\n").encode())


def load_model(job: Training) -> Any:
    """The model to train, in full precision on this process's device."""
    from mmalign import distributed

    device = job.device if distributed.world() == 1 or job.device == "cpu" else f"cuda:{distributed.local_rank()}"
    model = registry.load(job.model.entry).load(**{**job.model.arguments, "dtype": "float32"}, device=device)
    missing = {"image", "train"} - set(model.capabilities)
    if missing:
        raise UsageError(f"{model.name} ({model.family}) cannot be trained by {job.trainer.name}: it lacks {', '.join(sorted(missing))}.")
    return model


def is_first_process() -> bool:
    """Whether this process evaluates and reports (torchrun's rank 0, or the only one)."""
    import os

    return os.environ.get("RANK", "0") == "0"


def compare(job: Training, options: argparse.Namespace, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Evaluates base and trained checkpoint on the suites of --then-eval, and states the paired difference of each headline."""
    from mmalign import evaluate, report, results, stats

    found = []
    options = argparse.Namespace(**{**vars(options), "suite": options.then_eval, "set": evaluation_sets(job, options)})
    executor = jobs.executor(options)
    base = jobs.jobs(argparse.Namespace(**{**vars(options), "model": options.model}))
    trained = jobs.jobs(argparse.Namespace(**{**vars(options), "model": str(job.folder)}))
    for pair in zip(base, trained, strict=True):
        made = [evaluate.evaluate(one, executor, options.results, batch=options.batch_size, command=options.command) for one in pair]
        files = [
            results.json_path(evaluate.run_directory(options.results, one), result.run) for one, result in zip(pair, made, strict=True)
        ]
        rows = [results.read_rows(results.rows_path(file)) for file in files]
        headline = made[0].headline
        gain = stats.paired_difference(rows[1], rows[0], pair[0].evaluator.aggregate, headline)
        for name, result in zip(("base", "trained"), made, strict=True):
            overlap = results.reward_overlap(result)
            say(f"  {name:<9} {results.paste_line(result)}" + (f"  (training reward: {', '.join(overlap)})" if overlap else ""))
        if gain.value is not None and gain.ci is not None:
            say(f"  gain      {headline} {gain.value:+.3f} [{gain.ci[0]:+.3f}, {gain.ci[1]:+.3f}] on {gain.prompts} shared prompts")
        page = report.write_report(files, job.run / f"report-{pair[0].suite}")
        say(f"  report    {page}")
        found.append(
            {
                "suite": pair[0].suite,
                "headline": headline,
                "base": _headline(made[0]),
                "trained": _headline(made[1]),
                "gain": gain.value,
                "ci": gain.ci,
                "prompts": gain.prompts,
                "trained_on": list(results.reward_overlap(made[1])),
                "report": page,
                "is_complete": all(results.is_complete(result) for result in made),
            }
        )
    (job.run / history.EVALUATIONS).write_text(json.dumps(found, indent=1, default=str) + "\n")
    say(f"  report    {_write_page(job)}")
    return found


def _headline(result: Result) -> dict[str, Any]:
    metric = result.metrics[result.headline]
    return {"run": result.run, "value": metric.value, "ci": metric.ci}


def _write_page(job: Training) -> Path:
    from mmalign.training_report import write_training_report

    return write_training_report(job.run)


def evaluation_sets(job: Training, options: argparse.Namespace) -> list[str]:
    """How the trainer says that its model samples, and the --set items that suites and their scorers understand, which win over it."""
    suites = [registry.find("evaluators", name, options.plug) for name in jobs.names(options.then_eval)]
    from mmalign.doctor import scorers_of

    known = {"sampling", *(entry.name for entry in suites), *(name for entry in suites for name in scorers_of(entry))}
    typed = [item for item in options.set if config.parse_sets([item]).keys() & known]
    return [*(f"sampling.{name}={value}" for name, value in job.config.sampling.items()), *typed]
