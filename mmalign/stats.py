"""What a number is worth: intervals clustered by prompt, paired differences, detectable effects, bounds. Standard library only.

Everything here takes the same pure `aggregate` function that made the number, so an interval can never belong to another estimator.
The sampling unit is the prompt with all its images: four images of one prompt are not four independent facts. Prompts are drawn
within tags (a benchmark fixes how many prompts a tag has), so variances are summed over tags.

Where a quantity is undefined (an empty group, a single prompt) it is None, never a number.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TypeVar

from mmalign.types import Metric, Row, Sample, Score, Value, digest

T = TypeVar("T")
Numbers = Mapping[str, float | None]
Aggregate = Callable[[Sequence[Row]], Numbers]

LEVEL = 0.95
MAX_REPLICATES = 600  # prompts beyond this number are left out in groups: 553 GenEval prompts go one by one
RESAMPLES = 1000
NON_LINEAR = 0.1  # jackknife bias, as a share of the standard error, beyond which a metric gets a bootstrap interval


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error, its interval at 95% and the method behind them."""

    value: float | None
    stderr: float | None
    ci: tuple[float, float] | None
    method: str = "clustered"


@dataclass(frozen=True)
class Difference:
    """A minus B on the (prompt, image) pairs that both have, with the least true difference that such data would reveal."""

    value: float | None
    stderr: float | None
    ci: tuple[float, float] | None
    pairs: int
    prompts: int
    detectable: float | None

    @property
    def is_significant(self) -> bool | None:
        """Whether the 95% interval leaves out zero; None when there is no interval."""
        return None if self.ci is None else self.ci[0] > 0 or self.ci[1] < 0


def metrics(
    rows: Sequence[Row],
    aggregate: Aggregate,
    *,
    bootstrap: Sequence[str] = (),
    higher_is_better: Mapping[str, bool] | None = None,
    seed: int = 0,
) -> dict[str, Metric]:
    """Every number of `aggregate` on scored rows, with its clustered standard error and 95% interval.

    The stratified jackknife gives the closed-form error for means and sums of means. A metric whose jackknife shows that it is not
    linear in the prompts, or that is named in `bootstrap`, gets the standard error and percentile interval of a seeded cluster
    bootstrap instead. `n` and `prompts` count what the number rests on, over all tags.
    """
    clusters = _clusters(rows, _prompt_of, _tag_of)
    estimates, bias = _jackknife(clusters, aggregate)
    rough = [name for name, estimate in estimates.items() if name in bootstrap or _is_rough(estimate, bias[name])]
    if rough:
        estimates |= {name: found for name, found in _bootstrap(clusters, aggregate, seed).items() if name in rough}
    better = higher_is_better or {}
    return {
        name: Metric(
            estimate.value, estimate.stderr, estimate.ci, len(rows), len(clusters), estimate.method, higher_is_better=better.get(name, True)  # type: ignore[arg-type]
        )
        for name, estimate in estimates.items()
    }


def jackknife(rows: Sequence[Row], aggregate: Aggregate) -> dict[str, Estimate]:
    """Stratified delete-one-prompt jackknife of every number of `aggregate` (Student t interval).

    variance = sum over tags h of (n_h - 1) / n_h * sum over prompts i of (value without i - mean of these in h)^2. Tags with a single
    prompt are pooled. With more than 600 prompts, random groups of prompts are left out instead of single ones.
    """
    return _jackknife(_clusters(rows, _prompt_of, _tag_of), aggregate)[0]


def cluster_bootstrap(rows: Sequence[Row], aggregate: Aggregate, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Estimate]:
    """Bootstrap of prompts within tags: standard error and percentile interval of every number of `aggregate`.

    A prompt drawn k times enters as k prompts with ids of their own, so aggregates that group by prompt stay right.
    """
    return _bootstrap(_clusters(rows, _prompt_of, _tag_of), aggregate, seed, resamples)


def paired_difference(rows_a: Sequence[Row], rows_b: Sequence[Row], aggregate: Aggregate, metric: str) -> Difference:
    """Metric of A minus metric of B on the rows (prompt, index) that are scored in both, jackknifed over prompts in pairs."""
    scored_b = {row.request.id: row for row in rows_b if row.failure is None}
    pairs = [(row, scored_b[row.request.id]) for row in rows_a if row.failure is None and row.request.id in scored_b]

    def difference(some: Sequence[tuple[Row, Row]]) -> Numbers:
        first = aggregate([pair[0] for pair in some]).get(metric)
        second = aggregate([pair[1] for pair in some]).get(metric)
        return {metric: None if first is None or second is None else first - second}

    clusters = _clusters(pairs, lambda pair: _prompt_of(pair[0]), lambda pair: _tag_of(pair[0]))
    if not clusters:
        return Difference(None, None, None, 0, 0, None)
    found = _jackknife(clusters, difference)[0][metric]
    detectable = None if found.stderr is None else minimum_detectable_effect(found.stderr)
    return Difference(found.value, found.stderr, found.ci, len(pairs), len(clusters), detectable)


def minimum_detectable_effect(stderr_of_difference: float, *, level: float = LEVEL, power: float = 0.8) -> float:
    """The least true difference that a two-sided test at `level` finds with probability `power`: (z_level + z_power) * standard error.

    For two unpaired runs the standard error of the difference is sqrt(a^2 + b^2).
    """
    normal = NormalDist()
    return (normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)) * stderr_of_difference


def bounds(rows: Sequence[Row], aggregate: Aggregate, ranges: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Between what every number would lie had the failed rows been scored: all at the least, then all at the greatest value.

    `rows` are all expected rows; `ranges` the least and greatest value of each scorer, which also fill the parts that rows of the same
    prompt (else tag, else suite) have. Empty where a range is infinite or nothing was scored. Right for aggregates that
    rise or fall with each score, as means do.
    """
    if not all(math.isfinite(end) for span in ranges.values() for end in span):
        return {}
    part_names = _part_names(rows)
    ends: list[Numbers] = []
    for end in (0, 1):
        filled = [_filled(row, {name: span[end] for name, span in ranges.items()}, part_names) for row in rows]
        complete = [row for row in filled if row is not None]
        if len(complete) < len(rows):
            return {}
        ends.append(aggregate(complete))
    found = {}
    for name, low in ends[0].items():
        high = ends[1].get(name)
        if low is not None and high is not None:
            found[name] = (min(low, high), max(low, high))
    return found


def student_t(level: float, freedom: int) -> float:
    """The two-sided critical value of Student's t (1.96 for many degrees of freedom at 0.95), by bisection on the exact distribution."""
    low, high = 0.0, 1e3
    while high - low > 1e-9 * (1 + low):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_t(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _central_t(t: float, freedom: int) -> float:
    """P(|T| < t), by the finite series for integer degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom % 2:
        term, total = cosine, 0.0
        for k in range(1, freedom - 1, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        return 2 / math.pi * (angle + sine * total)
    term, total = 1.0, 0.0
    for k in range(0, freedom, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    return sine * total


@dataclass(frozen=True)
class _Cluster:
    """One prompt: its tag and where its items lie in the sorted sequence."""

    prompt: str
    tag: str
    items: tuple


def _prompt_of(row: Row) -> str:
    return row.request.prompt.id


def _tag_of(row: Row) -> str:
    return row.tag


def _clusters(items: Sequence[T], prompt_of: Callable[[T], str], tag_of: Callable[[T], str]) -> list[_Cluster]:
    grouped: dict[str, list[T]] = {}
    for item in items:
        grouped.setdefault(prompt_of(item), []).append(item)
    return [_Cluster(prompt, tag_of(group[0]), tuple(group)) for prompt, group in grouped.items()]


def _strata(clusters: Sequence[_Cluster]) -> list[list[int]]:
    """Positions of the clusters of each tag; tags with one prompt are pooled, because one prompt shows no spread."""
    grouped: dict[str, list[int]] = {}
    for position, cluster in enumerate(clusters):
        grouped.setdefault(cluster.tag, []).append(position)
    pooled = [positions[0] for positions in grouped.values() if len(positions) == 1]
    strata = [positions for positions in grouped.values() if len(positions) > 1]
    if len(pooled) == 1 and strata:
        strata[-1] = sorted(strata[-1] + pooled)
    elif pooled:
        strata.append(pooled)
    return strata


def _jackknife(clusters: Sequence[_Cluster], statistic: Callable[[Sequence], Numbers]) -> tuple[dict[str, Estimate], dict[str, float]]:
    everything = [item for cluster in clusters for item in cluster.items]
    full = statistic(everything)
    strata = [_groups(clusters, positions, len(clusters)) for positions in _strata(clusters)]
    starts = [0]
    for cluster in clusters:
        starts.append(starts[-1] + len(cluster.items))
    variance = dict.fromkeys(full, 0.0)
    bias = dict.fromkeys(full, 0.0)
    spread_of_variance = dict.fromkeys(full, 0.0)  # Satterthwaite: tags with few prompts or much variance leave few degrees of freedom
    undefined = {name for name, value in full.items() if value is None}
    for groups in strata:
        replicates = [statistic(_without(everything, starts, group)) for group in groups]
        for name in full:
            values = [replicate.get(name) for replicate in replicates]
            if len(values) < 2 or any(value is None for value in values):
                undefined.add(name)
                continue
            numbers = [value for value in values if value is not None]
            mean, scale = math.fsum(numbers) / len(numbers), (len(numbers) - 1) / len(numbers)
            part = scale * math.fsum((number - mean) ** 2 for number in numbers)
            variance[name] += part
            bias[name] += (len(numbers) - 1) * (mean - (full[name] or 0.0))
            spread_of_variance[name] += part * part / (len(numbers) - 1)
    estimates = {}
    for name, value in full.items():
        if name in undefined or value is None or not strata:
            estimates[name] = Estimate(value, None, None)
            continue
        stderr = math.sqrt(variance[name])
        freedom = variance[name] ** 2 / spread_of_variance[name] if spread_of_variance[name] else 1.0
        half = student_t(LEVEL, max(1, math.floor(freedom))) * stderr
        estimates[name] = Estimate(value, stderr, (value - half, value + half))
    return estimates, bias


def _groups(clusters: Sequence[_Cluster], positions: Sequence[int], total: int) -> list[list[int]]:
    """The prompts of a stratum as the groups to leave out: one each, or equal random groups when the suite has too many."""
    if total <= MAX_REPLICATES:
        return [[position] for position in positions]
    count = min(len(positions), max(10, round(MAX_REPLICATES * len(positions) / total)))
    shuffled = sorted(positions, key=lambda position: digest(clusters[position].prompt))
    return [sorted(shuffled[start::count]) for start in range(count)]


def _without(items: list, starts: Sequence[int], group: Sequence[int]) -> list:
    kept: list = []
    previous = 0
    for position in group:
        kept += items[previous : starts[position]]
        previous = starts[position + 1]
    return kept + items[previous:]


def _is_rough(estimate: Estimate, bias: float) -> bool:
    return estimate.stderr is not None and abs(bias) > NON_LINEAR * estimate.stderr + 1e-12


def _bootstrap(clusters: Sequence[_Cluster], aggregate: Aggregate, seed: int, resamples: int = RESAMPLES) -> dict[str, Estimate]:
    generator = random.Random(seed)
    strata = _strata(clusters)
    full = aggregate([row for cluster in clusters for row in cluster.items])
    copies: dict[tuple[int, int], Sequence[Row]] = {}
    replicates = []
    for _ in range(resamples):
        rows: list[Row] = []
        for positions in strata:
            times: dict[int, int] = {}
            for position in generator.choices(positions, k=len(positions)):
                times[position] = copy = times.get(position, 0) + 1
                if (position, copy) not in copies:
                    copies[position, copy] = [_copy(row, copy) for row in clusters[position].items]
                rows += copies[position, copy]
        replicates.append(aggregate(rows))
    return {name: _percentiles(value, [replicate.get(name) for replicate in replicates]) for name, value in full.items()}


def _copy(row: Row, copy: int) -> Row:
    if copy == 1:
        return row
    request = replace(row.request, prompt=replace(row.request.prompt, id=f"{row.request.prompt.id}#{copy}"))
    return replace(row, request=request, sample=replace(row.sample, request=request) if isinstance(row.sample, Sample) else row.sample)


def _percentiles(value: float | None, replicates: Sequence[float | None]) -> Estimate:
    numbers = sorted(number for number in replicates if number is not None)
    if value is None or len(numbers) < len(replicates) or len(numbers) < 2:
        return Estimate(value, None, None, "bootstrap")
    mean = math.fsum(numbers) / len(numbers)
    stderr = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))
    tail = (1 - LEVEL) / 2 * (len(numbers) - 1)
    return Estimate(value, stderr, (numbers[math.floor(tail)], numbers[math.ceil(len(numbers) - 1 - tail)]), "bootstrap")


def _part_names(rows: Sequence[Row]) -> dict[tuple[str, str, str], tuple[str, ...]]:
    """Names of a scorer's parts by (scorer, prompt, tag), with "" for any prompt or any tag."""
    found: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for row in rows:
        for scorer, score in row.scores.items():
            if isinstance(score, Value):
                for place in ((_prompt_of(row), row.tag), ("", row.tag), ("", "")):
                    found.setdefault((scorer, *place), tuple(score.parts))
    return found


def _filled(row: Row, fill: Mapping[str, float], part_names: Mapping[tuple[str, str, str], tuple[str, ...]]) -> Row | None:
    if row.failure is None:
        return row
    scores: dict[str, Score] = {}
    for scorer, x in fill.items():
        score = row.scores.get(scorer)
        if not isinstance(score, Value):
            places = ((_prompt_of(row), row.tag), ("", row.tag), ("", ""))
            names = next((part_names[scorer, *place] for place in places if (scorer, *place) in part_names), None)
            if names is None:
                return None
            score = Value(x, dict.fromkeys(names, x))
        scores[scorer] = score
    return Row(row.request, Sample(row.request), scores)
