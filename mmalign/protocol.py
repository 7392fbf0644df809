"""What a suite's protocol asks for, and every point in which a run differs from it.

The protocol is the suite's card and, beside it, what its Evaluator says of itself in these class attributes, each of which may be absent:

    scorer_options    {scorer: {option: value}}: what the protocol sets on its scorers
    sampling_options  {option: value}: what it sets on the model's sampling, in families that have such an option
    free              names of the suite's options that choose what is measured, so that no value of theirs is a deviation
    headline          the metric quoted first, where the suite's options decide it
    refused           {scorer: Value}: what a request is worth that the model itself declined; without it, that is a hole
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmalign import config
from mmalign.types import Card, Deviation, Evaluator, Value

if TYPE_CHECKING:
    from mmalign.evaluate import Job
    from mmalign.worker import Description


def headline(evaluator: Evaluator, card: Card) -> str:
    """The metric quoted first."""
    return str(getattr(evaluator, "headline", card.headline))


def refused(evaluator: Evaluator) -> Mapping[str, Value]:
    """What each scorer's value is where the model declined; empty where that is a hole."""
    return getattr(evaluator, "refused", {})


def sampling(evaluator: Evaluator, known: Sequence[str]) -> dict[str, Any]:
    """The protocol's sampling settings, of those that the model's family knows."""
    return {name: value for name, value in getattr(evaluator, "sampling_options", {}).items() if name in known}


def deviations(job: Job, model: Description, scorers: Mapping[str, Description], available: int) -> tuple[Deviation, ...]:
    """Every point in which the job differs from the card or from the defaults that go with it. `available`: prompts in the split."""
    card, evaluator = job.card, job.evaluator
    asked = [
        ("split", "test", job.split),
        ("limit", f"{available} prompts", available if job.limit is None else min(job.limit, available)),
        ("images_per_prompt", card.images_per_prompt, job.images_per_prompt),
        ("size", card.size, None if job.size is None else f"{job.size[0]}x{job.size[1]}"),
        ("seed", card.seed, job.seed),
    ]
    if job.split == "test" and card.prompts:
        asked.append(("prompts", card.prompts, available))
    found = [Deviation(name, str(official), str(used)) for name, official, used in asked if used is not None and used != official]
    found = [one for one in found if not (one.field == "limit" and one.used == str(available))]
    free = getattr(evaluator, "free", ())
    options = {name: value for name, value in config.plain(evaluator).items() if name not in free}
    found += _changed(job.suite, config.plain(type(evaluator)()), options)
    for name, scorer in scorers.items():
        own = [Deviation(**deviation) for deviation in scorer.facts.get("deviations", ())]  # what the scorer knows of itself comes first
        told = {deviation.field for deviation in own}
        protocol = {**scorer.defaults, **getattr(evaluator, "scorer_options", {}).get(name, {})}
        found += own + [one for one in _changed(name, protocol, scorer.options) if one.field not in told]
    defaults = {**model.defaults, **sampling(evaluator, list(model.defaults))}
    return (*found, *_changed("sampling", defaults, model.options))


def _changed(root: str, defaults: Mapping[str, Any], used: Mapping[str, Any]) -> list[Deviation]:
    return [Deviation(f"{root}.{name}", str(defaults.get(name)), str(value)) for name, value in used.items() if value != defaults.get(name)]
