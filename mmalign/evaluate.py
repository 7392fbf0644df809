"""Evaluation, top to bottom: plan -> generate -> score -> aggregate -> write.

`evaluate` is the whole job for one model and one suite. Whatever has been done is in the store and is not done again, so the same
call continues after any interruption. The core owns the denominator: expected items come from the suite, every one of them ends as a
Value or a Failure, and the evaluator's `aggregate` sees only rows without holes. `plan` says what a run would do and writes nothing.
The artefacts are described in results.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mmalign import config as configs
from mmalign import judge as judges
from mmalign import protocol, provenance, stats
from mmalign import results as artefacts
from mmalign.executors import Executor, Session
from mmalign.store import Scored, Store, content_of, image_path, slug
from mmalign.types import (
    Card,
    Counts,
    Deviation,
    Evaluator,
    Failure,
    Metric,
    MmalignError,
    Prompt,
    Request,
    Result,
    Row,
    Sample,
    Status,
    UsageError,
    Value,
    digest,
    request_seed,
)
from mmalign.worker import Description, Outcome, Picture, Recipe

SEED_RULE = "digest(seed, prompt id, index), 63 bits"
ALIKE = 10  # this many equal values of a scorer, and no other value, are worth a warning


@dataclass(frozen=True)
class Job:
    """All that one evaluation depends on. None means: as the card says.

    `model_facts` goes into the result unchanged (source, revision, trained_on_rewards, ...). `scorers` has a recipe for each name in
    `evaluator.scorers`. `limit` keeps that many prompts, taken from the tags in turn.
    """

    suite: str
    evaluator: Evaluator
    card: Card
    model_name: str
    model: Recipe
    scorers: Mapping[str, Recipe]
    model_facts: Mapping[str, Any] = field(default_factory=dict)
    split: str = "test"
    images_per_prompt: int | None = None
    size: tuple[int, int] | None = None  # height, width
    seed: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `stage` is load, wait, generate, score or aggregate; `name` the model or scorer (or what is waited for)."""

    stage: str
    name: str
    done: int = 0
    total: int = 0
    failed: int = 0


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Plan:
    """What a run comprises: its expected requests by sample key, and all that identifies it."""

    job: Job
    model: Description
    scorers: Mapping[str, Description]
    prompts: tuple[Prompt, ...]
    requests: Mapping[str, Request]
    deviations: tuple[Deviation, ...]
    run: str
    cached_samples: int = 0
    cached_scores: int = 0
    failures: int = 0  # holes of earlier runs, among the cached

    @property
    def expected(self) -> int:
        return len(self.requests)

    def score_key(self, sample_key: str, scorer: str) -> str:
        """Digest of all that changes a score: the sample, the prompt's text and meta, the scorer's fingerprint."""
        prompt = self.requests[sample_key].prompt
        return digest(sample_key, prompt.text, dict(prompt.meta), self.scorers[scorer].fingerprint)

    def score_keys(self) -> list[str]:
        return [self.score_key(key, scorer) for scorer in self.scorers for key in self.requests]


def _silent(_: Progress) -> None:
    """Progress that nobody watches."""


def run_directory(results: Path, job: Job) -> Path:
    """Where the results and the store of a model and suite live."""
    return results / slug(job.model_name) / slug(job.suite)


def plan(job: Job, executor: Executor, results: Path, *, report: Report = _silent) -> Plan:
    """What `evaluate` would do: expected images, what of it is there already, deviations. Writes nothing."""
    scorers = {name: _describe(executor, recipe, report) for name, recipe in job.scorers.items()}
    made = _plan(job, _describe(executor, job.model, report), scorers)
    store = Store.read(run_directory(results, job))
    try:
        samples = store.samples(made.requests)
        scores = {key: scored for name in scorers for key, scored in _kept(made, name, samples, store).items()}
    finally:
        store.close()
    failures = sum(isinstance(one, Failure) for one in (*samples.values(), *(scored.score for scored in scores.values())))
    return replace(made, cached_samples=len(samples), cached_scores=len(scores), failures=failures)


def evaluate(
    job: Job,
    executor: Executor,
    results: Path,
    *,
    batch: int = 16,
    score_batch: int | None = None,
    retry_failed: bool = False,
    wait: bool = False,
    command: str = "",
    report: Report = _silent,
) -> Result:
    """Evaluate a model on a suite, or continue, and write the result. Interrupt it at any moment: what was reported done is saved.

    `batch` is the number of items that a worker gets at once and never changes a number. `retry_failed` redoes the holes of earlier
    runs and nothing else. `command` is what the user typed, for the record and the line to continue. MmalignError when
    something prevents the run as a whole (missing weights, full disk, a run directory in use); an item's trouble is a Failure.
    """
    started = provenance.now()
    directory = run_directory(results, job)
    command = provenance.without_secrets(command)
    with Store.write(directory, command=command, wait=wait, on_wait=lambda holder: report(Progress("wait", holder))) as store:
        # Scorers are loaded once before generation, because a missing weight must not surface after hours of it.
        scorers = {name: _describe(executor, recipe, report) for name, recipe in job.scorers.items()}
        report(Progress("load", job.model_name))
        with executor.open(job.model) as model:
            made = _plan(job, model.description, scorers)
            if retry_failed:
                store.drop_failures(made.requests, made.score_keys())
            _check_judges(made, store)
            samples, cached = _generate(made, model, store, batch, report)
        scores = {name: _score(made, name, executor, samples, store, score_batch or batch, report) for name in scorers}
        report(Progress("aggregate", job.suite))
        worth = protocol.refused(job.evaluator)
        rows = [
            _row(request, samples[key], {name: scores[name].get(key) for name in scorers}, worth) for key, request in made.requests.items()
        ]
        counts = _counts(rows, store.retried(made.requests, made.score_keys()))
        origin = provenance.collect(command, started) | {**made.model.environment, "cached": cached, "warnings": _warnings(made, rows)}
        result = _result(made, rows, counts, origin)
        artefacts.write(directory, result, rows)
    return result


def _kept(made: Plan, name: str, samples: Mapping[str, Sample | Failure], store: Store) -> dict[str, Scored]:
    """What the store holds of a scorer's values and failures, by score key."""
    present = {made.score_key(key, name): sample for key, sample in samples.items() if isinstance(sample, Sample)}
    return store.scores({key: content_of(sample) for key, sample in present.items()})


def _check_judges(made: Plan, store: Store) -> None:
    """MmalignError when a judge that is still to be asked cannot be: an absent key must not surface after hours of drawing."""
    samples = store.samples(made.requests)
    holes = sum(isinstance(sample, Failure) for sample in samples.values())
    for name, scorer in made.scorers.items():
        judge = scorer.facts.get("judge")
        if not judge or holes + len(_kept(made, name, samples, store)) == len(made.requests):
            continue
        if absence := judges.absence(**judge):
            raise MmalignError(f"The scorer '{name}' has nobody to ask. {absence}")


def _describe(executor: Executor, recipe: Recipe, report: Report) -> Description:
    report(Progress("load", recipe.entry.name))
    with executor.open(recipe) as session:
        return session.description


# -- plan ---------------------------------------------------------------------------------------------------------------------------


def _plan(job: Job, model: Description, scorers: Mapping[str, Description]) -> Plan:
    everything = job.evaluator.prompts(job.split)
    repeated = [identity for identity, times in Counter(prompt.id for prompt in everything).items() if times > 1]
    if repeated:
        raise MmalignError(f"The suite '{job.suite}' lists the prompt id '{repeated[0]}' more than once; ids must be unique.")
    if not everything:
        raise MmalignError(f"The suite '{job.suite}' has no prompts in the split '{job.split}'.")
    prompts = tuple(everything if job.limit is None else _spread(everything, job.limit))
    images = job.card.images_per_prompt if job.images_per_prompt is None else job.images_per_prompt
    seed = job.card.seed if job.seed is None else job.seed
    items = [(prompt, index) for prompt in prompts for index in range(images)]
    settings = _settings(job, model)
    requests = [Request(prompt, index, request_seed(seed, prompt.id, index), job.size, settings) for prompt, index in items]
    keyed = {request.key(model.fingerprint): request for request in requests}
    if len(keyed) < len(requests):
        raise MmalignError(f"Two items of the suite '{job.suite}' have the same prompt, seed and index, so they would be one image.")
    made = Plan(job, model, scorers, prompts, keyed, protocol.deviations(job, model, scorers, len(everything)), run="")
    identity = digest("run", job.card.hash, configs.plain(job.evaluator), sorted(keyed), sorted(made.score_keys()))
    return replace(made, run=identity[:12])


def _settings(job: Job, model: Description) -> Mapping[str, Any]:
    """The model's sampling settings; a suite with `task` "answer" asks it for answers where others ask for images."""
    task = getattr(job.evaluator, "task", "image")
    if task == "image":
        return model.options
    if task not in model.facts["capabilities"]:
        raise UsageError(f"The suite '{job.suite}' asks for answers, and {model.name} ({model.facts['family']}) gives none.")
    return {**model.options, "task": task}


def _spread(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """The first prompts of all tags in turn, in the suite's order, so that a small sample has every group and a larger one extends it."""
    by_tag: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_tag.setdefault(prompt.tag, []).append(prompt)
    in_turn = [prompt for round_ in zip_longest(*by_tag.values()) for prompt in round_ if prompt is not None]
    chosen = {prompt.id for prompt in in_turn[:limit]}
    return [prompt for prompt in prompts if prompt.id in chosen]


# -- generate and score -------------------------------------------------------------------------------------------------------------


def _generate(made: Plan, model: Session, store: Store, batch: int, report: Report) -> tuple[dict[str, Sample | Failure], int]:
    """Every expected sample or its failure, by key, and how many were there already."""
    samples = store.samples(made.requests)
    cached = len(samples)
    todo = [(key, request) for key, request in made.requests.items() if key not in samples]
    failed = sum(isinstance(sample, Failure) for sample in samples.values())
    report(Progress("generate", made.job.model_name, cached, made.expected, failed))
    for outcomes in model.run([request for _, request in todo], batch):
        store.add_samples([(todo[position][0], _sample(outcome), todo[position][1]) for position, outcome in outcomes])
        for position, outcome in outcomes:
            sample = _sample(outcome)
            samples[todo[position][0]] = replace(sample, image=None) if isinstance(sample, Sample) else sample
            failed += isinstance(sample, Failure)
        report(Progress("generate", made.job.model_name, len(samples), made.expected, failed))
    return samples, cached


def _sample(outcome: Outcome) -> Sample | Failure:
    sample = outcome.result
    assert isinstance(sample, (Sample, Failure)), sample
    return replace(sample, seconds=outcome.seconds) if isinstance(sample, Sample) and not sample.seconds else sample


def _score(
    made: Plan, name: str, executor: Executor, samples: Mapping[str, Sample | Failure], store: Store, batch: int, report: Report
) -> dict[str, Value | Failure]:
    """The score or failure of every sample there is, by sample key. The scorer is loaded only when something is left to score."""
    present = {key: sample for key, sample in samples.items() if isinstance(sample, Sample)}
    score_keys = {key: made.score_key(key, name) for key in present}
    kept = _kept(made, name, samples, store)
    scores = {key: kept[score_key].score for key, score_key in score_keys.items() if score_key in kept}
    todo = [key for key in present if key not in scores]
    failed = sum(isinstance(score, Failure) for score in scores.values())
    report(Progress("score", name, len(scores), len(present), failed))
    if not todo:
        return scores
    pictures = [_picture(replace(present[key], request=made.requests[key]), store) for key in todo]
    report(Progress("load", name))
    with executor.open(made.job.scorers[name]) as scorer:
        _check_unchanged(made.scorers[name], scorer.description)
        for outcomes in scorer.run(pictures, batch):
            entries = []
            for position, outcome in outcomes:
                key, score = todo[position], outcome.result
                assert isinstance(score, (Value, Failure)), score
                entries.append((score_keys[key], Scored(score, content_of(present[key]), outcome.seconds), made.requests[key]))
                scores[key] = score
                failed += isinstance(score, Failure)
            store.add_scores(name, entries)
            report(Progress("score", name, len(scores), len(present), failed))
    return scores


def _picture(sample: Sample, store: Store) -> Picture:
    return Picture(sample, None if sample.image_sha is None else image_path(store.directory, sample.image_sha))


def _check_unchanged(before: Description, now: Description) -> None:
    if before.fingerprint != now.fingerprint:
        raise MmalignError(
            f"The scorer '{before.name}' changed during the run: fingerprint {before.fingerprint} at the start, {now.fingerprint} now. "
            "Run the same command again; its images are kept."
        )


# -- aggregate ----------------------------------------------------------------------------------------------------------------------


def _row(
    request: Request, sample: Sample | Failure, scores: Mapping[str, Value | Failure | None], refused: Mapping[str, Value] = {}
) -> Row:
    if isinstance(sample, Failure) and sample.kind == "refusal" and refused:
        told = f"The model declined: {sample.message}"
        return Row(request, Sample(request), {name: replace(value, detail=told) for name, value in refused.items()})
    if isinstance(sample, Failure):
        return Row(request, sample, dict.fromkeys(scores, sample))
    return Row(request, replace(sample, request=request), {name: score for name, score in scores.items() if score is not None})


def _counts(rows: Sequence[Row], retried: int) -> Counts:
    failures = Counter(f"{row.failure.stage}/{row.failure.kind}" for row in rows if row.failure is not None)
    generated = sum(isinstance(row.sample, Sample) for row in rows)
    return Counts(len(rows), generated, len(rows) - failures.total(), dict(sorted(failures.items())), retried)


def _result(made: Plan, rows: Sequence[Row], counts: Counts, origin: Mapping[str, Any]) -> Result:
    job, model = made.job, made.model
    measured = _metrics(job, made, rows)
    first = protocol.headline(job.evaluator, job.card)
    whole = not counts.failed and measured[first].value is not None
    status: Status = "partial" if len(made.prompts) < len(job.evaluator.prompts(job.split)) else "complete" if whole else "incomplete"
    return Result(
        run=made.run,
        model={"name": model.name, "spec": job.model_name, **model.facts, "fingerprint": model.fingerprint, **job.model_facts},
        suite={
            "name": job.suite,
            "title": job.card.title,
            "unsafe": job.card.unsafe,
            "split": job.split,
            "card": job.card.hash,
            "protocol": digest("prompts", *made.prompts)[:12],
            "prompts": len(made.prompts),
            "images_per_prompt": counts.expected // len(made.prompts),
            "options": configs.plain(job.evaluator),
        },
        sampling={
            "settings": dict(_settings(job, model)),
            "size": job.size,
            "seed": job.card.seed if job.seed is None else job.seed,
            "seed_rule": SEED_RULE,
        },
        scorers={
            name: {
                "fingerprint": scorer.fingerprint,
                "metric_name": scorer.facts.get("metric_name", name),
                "options": dict(scorer.options),
                "range": _finite_range(scorer),
            }
            for name, scorer in made.scorers.items()
        },
        counts=counts,
        metrics=measured,
        headline=first,
        status=status,
        deviations=made.deviations,
        rows_digest=artefacts.rows_digest(rows),
        provenance=origin,
    )


def _metrics(job: Job, made: Plan, rows: Sequence[Row]) -> dict[str, Metric]:
    """Every metric on the rows without holes, with its interval; with holes also between what it would lie without them."""
    headline = protocol.headline(job.evaluator, job.card)
    better = {headline: job.card.higher_is_better, **getattr(job.evaluator, "higher_is_better", {})}
    scored = [row for row in rows if row.failure is None]
    measured: dict[str, Metric] = {}
    if scored:
        measured = stats.metrics(
            scored, _finite(job.evaluator.aggregate), bootstrap=getattr(job.evaluator, "bootstrap", ()), higher_is_better=better
        )
    ranges = {name: scorer.facts["range"] for name, scorer in made.scorers.items()}
    measured = _within(measured, _possible(scored, _finite(job.evaluator.aggregate), ranges))
    undefined = Metric(None, None, None, 0, 0)
    measured.setdefault(headline, replace(undefined, higher_is_better=better[headline]))
    if len(scored) < len(rows):
        for name, span in stats.bounds(rows, _finite(job.evaluator.aggregate), ranges).items():
            measured[name] = replace(measured.get(name, undefined), bounds=span, higher_is_better=better.get(name, True))
    return measured


def _possible(rows: Sequence[Row], aggregate: stats.Aggregate, ranges: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Between what every metric can lie at all: with all scores and their parts at the least, then at the greatest value."""
    if not rows or not all(math.isfinite(end) for span in ranges.values() for end in span):
        return {}

    def at(end: int) -> Mapping[str, float | None]:
        def filled(name: str, score: Any) -> Value:
            return Value(ranges[name][end], dict.fromkeys(score.parts, ranges[name][end]))

        return aggregate([replace(row, scores={name: filled(name, score) for name, score in row.scores.items()}) for row in rows])

    low, high = at(0), at(1)
    ends = {name: (one, other) for name, one in low.items() if one is not None and (other := high.get(name)) is not None}
    return {name: (min(pair), max(pair)) for name, pair in ends.items()}


def _within(measured: Mapping[str, Metric], possible: Mapping[str, tuple[float, float]]) -> dict[str, Metric]:
    """Intervals cut at what is possible: a rate has no interval below 0."""

    def cut(name: str, metric: Metric) -> Metric:
        if metric.ci is None or metric.value is None or name not in possible:
            return metric
        low, high = possible[name]
        if not low <= metric.value <= high:  # this aggregate does not rise with its scores, so its ends are elsewhere
            return metric
        return replace(metric, ci=(max(low, metric.ci[0]), min(high, metric.ci[1])))

    return {name: cut(name, metric) for name, metric in measured.items()}


def _finite(aggregate: Callable[[Sequence[Row]], Mapping[str, float | None]]) -> stats.Aggregate:
    """The aggregate with plain floats, and None for anything that is not finite: an undefined number is never a number."""

    def finite(rows: Sequence[Row]) -> dict[str, float | None]:
        return {name: None if value is None or not math.isfinite(value) else float(value) for name, value in aggregate(rows).items()}

    return finite


def _finite_range(scorer: Description) -> list[float | None]:
    return [end if math.isfinite(end) else None for end in scorer.facts["range"]]


def _warnings(made: Plan, rows: Sequence[Row]) -> list[str]:
    """What a reader should know before quoting the numbers."""
    found = []
    for name in made.scorers:
        values = [score.x for row in rows if isinstance(score := row.scores.get(name), Value)]
        if len(values) >= ALIKE and len(set(values)) == 1:
            found.append(f"All {len(values)} values of the scorer '{name}' are {values[0]:g}; look at its rows before you quote a number.")
        judge = made.scorers[name].facts.get("judge")
        if judge and judges.is_alias(judge["model"], judge["base_url"]):
            found.append(f"The judge {judge['model']} of '{name}' is a moving alias: the rows say which model answered. Name a dated one.")
        if name in made.job.model_facts.get("trained_on_rewards", ()):
            found.append(f"The model was trained on '{name}' as a reward, so this number measures fit to the reward, not transfer.")
    alarms = getattr(made.job.evaluator, "alarms", None)
    return found + (list(alarms([row for row in rows if row.failure is None])) if alarms else [])
