"""A trainer's reward from scorers: weights, clipping, failed samples masked and counted, a stop when too many fail.

The scorers are those of the benchmarks, so a reward's part is bit for bit the value of a benchmark's row. What a group does with several
parts (sum, then normalise; or normalise, then sum) is the advantage's business in grpo.py; a batch therefore keeps every part and weight.
Legend: B samples of one call.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign import registry
from mmalign.config import build
from mmalign.types import Failure, MmalignError, Sample, Score, Scorer, UsageError, Value

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class RewardBatch:
    """What a reward said of B samples.

    `total` [B] float64 is the weighted sum of the clipped parts, NaN where any part failed; `ok` [B] bool is where it is a number.
    `parts` {scorer: [B] float64} are the scorers' own values, unweighted and unclipped, NaN where that scorer failed; `clipped` are the
    same within the reward's clips. `scores` are the scorers' full answers (heat maps, components, failures); `failures` counts samples
    without a total by "scorer/kind", first hole each.
    """

    total: np.ndarray
    parts: Mapping[str, np.ndarray]
    clipped: Mapping[str, np.ndarray]
    ok: np.ndarray
    weights: Mapping[str, float]
    scores: Mapping[str, Sequence[Score]]
    failures: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Reward:
    """A weighted sum of scorers. `clip` bounds a scorer's value before its weight; GenEval's soft count, say, has no lower bound.

    A call in which more than `max_failures` of the samples have no total is an MmalignError: a training that goes on without its reward
    only drifts. Below that share the failed samples are masked, never counted as zero.
    """

    scorers: Mapping[str, Scorer]
    weights: Mapping[str, float]
    clip: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    max_failures: float = 0.25

    def __post_init__(self) -> None:
        if not self.scorers or set(self.scorers) != set(self.weights):
            raise UsageError(
                f"A reward needs one weight for each scorer; scorers: {sorted(self.scorers)}, weights: {sorted(self.weights)}."
            )
        if stray := set(self.clip) - set(self.scorers):
            raise UsageError(f"The clip names {sorted(stray)}, which this reward does not use; it uses {sorted(self.scorers)}.")
        if not 0 <= self.max_failures <= 1:
            raise UsageError(f"max_failures is a share between 0 and 1, got {self.max_failures}.")

    def __call__(self, samples: Sequence[Sample | Failure]) -> RewardBatch:
        """Score the samples; a sample that is already a Failure stays one under every scorer."""
        import numpy as np

        scores = {name: _score_all(scorer, samples) for name, scorer in self.scorers.items()}
        parts = {name: np.array([score.x if isinstance(score, Value) else math.nan for score in column]) for name, column in scores.items()}
        clipped = {name: np.clip(values, *self.clip.get(name, (-math.inf, math.inf))) for name, values in parts.items()}
        total = sum((self.weights[name] * values for name, values in clipped.items()), np.zeros(len(samples)))
        ok = ~np.isnan(total)
        holes = [next((name, score) for name in scores if isinstance(score := scores[name][at], Failure)) for at in np.flatnonzero(~ok)]
        if len(holes) > self.max_failures * len(samples):
            raise _too_many(holes, len(samples), self.max_failures)
        failures = Counter(f"{name}/{hole.kind}" for name, hole in holes)
        return RewardBatch(total, parts, clipped, ok, dict(self.weights), scores, dict(failures))


def parse_weights(text: str) -> dict[str, float]:
    """ "shapes=1,clipscore=0.5" -> {"shapes": 1.0, "clipscore": 0.5}; a name alone weighs 1, a weight may be negative."""
    weights: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, number = item.partition("=")
        name = registry.normalise(name)
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise UsageError(f"--reward {text}: '{item}' is not NAME=WEIGHT with a finite number, such as pickscore=1,geneval=2.")
        if name in weights:
            raise UsageError(f"--reward {text}: '{name}' stands there twice.")
        weights[name] = weight
    if not weights:
        raise UsageError(f"--reward '{text}' names no scorer; expected NAME=WEIGHT pairs such as pickscore=1,geneval=2.")
    return weights


def load_reward(
    weights: Mapping[str, float],
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    device: str = "cpu",
    clip: Mapping[str, tuple[float, float]] | None = None,
    max_failures: float = 0.25,
    plugs: Sequence[Path] = (),
) -> Reward:
    """The reward of these weights with every scorer loaded; `overrides` are the options by scorer (config.parse_sets)."""
    scorers = {name: load_scorer(name, (overrides or {}).get(name, {}), device, plugs) for name in weights}
    return Reward(scorers, dict(weights), dict(clip or {}), max_failures)


def load_scorer(name: str, options: Mapping[str, Any] | None = None, device: str = "cpu", plugs: Sequence[Path] = ()) -> Scorer:
    """The scorer of a registered name with these options, ready on the device."""
    entry = registry.find("scorers", name, plugs)
    module = registry.load(entry)
    scorer: Scorer = module.load(build(module.Config, options or {}, entry.name), device)
    return scorer


def _score_all(scorer: Scorer, samples: Sequence[Sample | Failure]) -> list[Score]:
    usable = [sample for sample in samples if isinstance(sample, Sample)]
    scores = scorer.score(usable) if usable else []
    if len(scores) != len(usable):
        raise MmalignError(
            f"The scorer '{scorer.name}' gave {len(scores)} scores for {len(usable)} samples; it must give one each, in order."
        )
    remaining = iter(scores)
    return [_finite(next(remaining)) if isinstance(sample, Sample) else sample for sample in samples]


def _finite(score: Score) -> Score:
    if isinstance(score, Value) and not math.isfinite(score.x):
        return Failure("score", "nonfinite", f"The scorer gave {score.x}, expected a finite number.")
    return score


def _too_many(holes: Sequence[tuple[str, Failure]], count: int, limit: float) -> MmalignError:
    name, first = holes[0]
    tally = ", ".join(f"{n} {what}" for what, n in Counter(f"{name}/{hole.kind}" for name, hole in holes).most_common())
    return MmalignError(
        f"{len(holes)} of {count} samples have no reward ({tally}); at most {limit:.0%} may fail. First, from '{name}': {first.message} "
        "Mend that scorer and resume the training; what is trained so far is saved."
    )
