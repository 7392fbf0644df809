"""Claims put to the test on the testbed: numbers for each arm and seed, kept as they come, and the verdict on them.

An entry of `claims/*.yaml` may have an `experiment`:

  measure: paper.function of `measures/`, called with a seed and `options`; it returns a number for each arm
  train: {arm: trainer and flags of `mmalign train`} in its place; an arm's number is the trained checkpoint's `metric` on `suite`
  seeds: how many; one means that the calculation is exact
  minutes: about what a seed costs on a CPU core; the cheap ones run first
  rules: [{order: [a, b, c]}, {above: {arm: number}}, {below: {arm: number}}, {same: [a, b], margin: m}, {never_below: {arm: number}}]

A rule compares arms seed by seed; the interval of the mean difference is Student's, 95%; `never_below` asks for every single seed.
`agrees` when every interval lies on the claimed side, `opposite` when one lies on the other, else `not resolved`.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.leaderboards.verdicts import Claim, Comparison, Verdict, decide

from mmalign.stats import student_t
from mmalign.store import disk_errors, write_atomic
from mmalign.types import MmalignError, digest

EVIDENCE = "testbed"
Numbers = dict[str, float]


@dataclass(frozen=True)
class Experiment:
    """What is done, how often, and when the claim holds."""

    rules: tuple[Mapping[str, Any], ...]
    measure: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, str] = field(default_factory=dict)
    suite: str = "shapes"
    metric: str = "strict"
    seeds: int = 5
    minutes: float = 1.0


@dataclass(frozen=True)
class Values:
    """What was found so far: a number for each arm, by seed, and the minutes it took."""

    by_seed: Mapping[int, Numbers]
    minutes: float


def of(claim: Claim) -> Experiment:
    """The claim's experiment. MmalignError when its entry is none."""
    try:
        found = Experiment(**{**claim.experiment, "rules": tuple(claim.experiment["rules"])})
    except (TypeError, KeyError) as error:
        raise MmalignError(f"The experiment of the claim '{claim.name}' cannot be read: {error}.") from error
    if bool(found.measure) == bool(found.train):
        raise MmalignError(f"The experiment of the claim '{claim.name}' needs `measure` or `train`, and not both.")
    return found


def run(claim: Claim, folder: Path, deadline: float, say: Callable[[str], None]) -> Values | None:
    """All seeds of a claim, continued from what the folder holds; None when time (`time.monotonic`) is over before the last."""
    experiment, kept = of(claim), read(claim, folder)  # of whichever claim asked for the same first
    for seed in range(experiment.seeds):
        arms = [arm for arm in experiment.train or [""] if arm not in kept.by_seed.get(seed, {})]
        for arm in arms if experiment.train or seed not in kept.by_seed else ():
            if time.monotonic() >= deadline:
                return None
            begun = time.monotonic()
            found = {arm: _train(experiment, arm, seed)} if arm else _measure(experiment, seed)
            spent = kept.minutes + (time.monotonic() - begun) / 60
            kept = Values({**kept.by_seed, seed: {**kept.by_seed.get(seed, {}), **found}}, spent)
            _keep(claim, folder, kept)
            say(f"  {claim.name}, seed {seed}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return kept


def run_all(claims: Sequence[Claim], folder: Path, minutes: float, say: Callable[[str], None]) -> tuple[list[Verdict], list[str]]:
    """The verdicts of the experiments that were finished within the time, the cheap ones first, and the names of the others."""
    deadline, found, left = time.monotonic() + 60 * minutes, [], []
    for claim in sorted((claim for claim in claims if claim.experiment), key=_cost):
        values = run(claim, folder, deadline, say)
        if values is None:
            left.append(claim.name)
        else:
            found.append(judge(claim, values))
    return found, left


def _cost(claim: Claim) -> float:
    experiment = of(claim)
    return experiment.minutes * experiment.seeds * max(1, len(experiment.train))


def _measure(experiment: Experiment, seed: int) -> Numbers:
    module, _, name = experiment.measure.partition(".")
    measured: Numbers = getattr(importlib.import_module(f"mmalign.leaderboards.measures.{module}"), name)(seed, **experiment.options)
    return measured


def _train(experiment: Experiment, arm: str, seed: int) -> float:
    """Trains and evaluates one arm in a process of its own, as a user would."""
    with tempfile.TemporaryDirectory() as scratch:
        places = ["--run-dir", f"{scratch}/run", "--results", f"{scratch}/results", "--image-every", "0"]
        words = ["train", *shlex.split(experiment.train[arm]), "--seed", str(seed), "--then-eval", experiment.suite, *places, "--json"]
        done = subprocess.run([sys.executable, "-m", "mmalign", *words], capture_output=True, text=True)
        if done.returncode:
            raise MmalignError(f"`mmalign {shlex.join(words)}` ended with {done.returncode}: {done.stderr.strip()[-600:]}")
        for path in Path(scratch, "results").rglob("*.json"):
            result = json.loads(path.read_text(encoding="utf-8"))
            if "trainer" in result.get("model", {}):
                return float(result["metrics"][experiment.metric]["value"])
    raise MmalignError(f"`mmalign {shlex.join(words)}` left no result of the trained checkpoint on {experiment.suite}.")


# -- what is kept ------------------------------------------------------------------------------------------------------------------


def read(claim: Claim, folder: Path) -> Values:
    """What a folder holds of a claim's experiment; nothing when the experiment has changed since. Claims that ask for the same numbers
    share them."""
    path = _file(claim, folder)
    if not path.exists():
        return Values({}, 0.0)
    kept = json.loads(path.read_text(encoding="utf-8"))
    return Values({int(seed): numbers for seed, numbers in kept["values"].items()}, kept["minutes"])


def _keep(claim: Claim, folder: Path, found: Values) -> None:
    content = {"experiment": _asked(claim), "minutes": round(found.minutes, 2), "values": found.by_seed}
    path = _file(claim, folder)
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def _file(claim: Claim, folder: Path) -> Path:
    asked = _asked(claim)
    label = asked.get("measure") or asked["train"][next(iter(asked["train"]))].split()[0]
    return folder / "values" / f"{label}-{digest(asked)[:8]}.json"


def _asked(claim: Claim) -> dict[str, Any]:
    """What determines the numbers: neither the rules nor the number of seeds."""
    experiment = of(claim)
    if experiment.measure:
        return {"measure": experiment.measure, "options": dict(experiment.options)}
    return {"train": dict(experiment.train), "suite": experiment.suite, "metric": experiment.metric}


# -- the verdict -------------------------------------------------------------------------------------------------------------------


def judge(claim: Claim, values: Values) -> Verdict:
    """The answer of all rules on the seeds found."""
    experiment = of(claim)
    seeds = [values.by_seed[seed] for seed in range(experiment.seeds)]
    found = [comparison for rule in experiment.rules for comparison in _compared(rule, seeds)]
    answer, decided = decide([(found, len(found))])
    return Verdict(claim, answer, decided, tuple(found), EVIDENCE, len(seeds), values.minutes)


def _compared(rule: Mapping[str, Any], seeds: Sequence[Numbers]) -> list[Comparison]:
    if "order" in rule:
        return [_interval(f"{a} - {b}", [one[a] - one[b] for one in seeds]) for a, b in itertools.pairwise(rule["order"])]
    if "above" in rule:
        return [_interval(f"{arm} above {least:g}", [one[arm] - least for one in seeds]) for arm, least in rule["above"].items()]
    if "below" in rule:
        return [_interval(f"{arm} below {most:g}", [most - one[arm] for one in seeds]) for arm, most in rule["below"].items()]
    if "same" in rule:
        a, b = rule["same"]
        gap, margin = _interval("", [one[a] - one[b] for one in seeds]), rule["margin"]
        largest = max(abs(gap.low), abs(gap.high))
        least = 0.0 if gap.low <= 0 <= gap.high else min(abs(gap.low), abs(gap.high))
        return [Comparison(f"{a} and {b} within {margin:g}", margin - largest, margin - least)]
    if "never_below" in rule:
        worst = {arm: min(one[arm] for one in seeds) - least for arm, least in rule["never_below"].items()}
        return [Comparison(f"{arm}, in every seed, above {rule['never_below'][arm]:g}", value, value) for arm, value in worst.items()]
    raise MmalignError(f"a rule needs one of order, above, below, same, never_below; got {', '.join(rule)}.")


def _interval(what: str, differences: Sequence[float]) -> Comparison:
    """The mean and Student's interval; one number is exact."""
    mean = statistics.fmean(differences)
    half = 0.0
    if len(differences) > 1:
        half = student_t(0.95, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return Comparison(f"{what} = {mean:+.4g}", mean - half, mean + half)
