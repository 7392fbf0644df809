"""Our own rows: which results may stand in a table, what they are called, and why the others may not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmalign import results
from mmalign.types import Metric, Result


@dataclass(frozen=True)
class Ours:
    """One result. `label` tells its model apart from the others; `reasons` say why it may not stand unmarked (empty: it may)."""

    label: str
    result: Result
    path: Path
    reasons: tuple[str, ...]

    @property
    def suite(self) -> str:
        return str(self.result.suite["name"])

    @property
    def model(self) -> str:
        """What makes it the same model as another result's."""
        return str(self.result.model["fingerprint"])

    @property
    def is_usable(self) -> bool:
        return not self.reasons

    @property
    def rewards(self) -> tuple[str, ...]:
        """The scorers of this result that were rewards in the model's training."""
        return results.reward_overlap(self.result)

    def metric(self, name: str) -> Metric | None:
        """A metric that has a value."""
        found = self.result.metrics.get(name)
        return found if found is not None and found.value is not None else None


def read(folder: Path) -> list[Ours]:
    """Every result below a folder, by model and suite, newest first. A folder that does not exist has none."""
    found = [(path, results.read(path)) for path in results.find(folder)]
    found.sort(key=lambda item: str(item[1].provenance.get("ended", "")), reverse=True)
    names = {str(result.model["fingerprint"]): _name(result) for _, result in reversed(found)}
    same = {name for name in names.values() if list(names.values()).count(name) > 1}
    labels = {model: f"{name} ({model[:8]})" if name in same else name for model, name in names.items()}
    ours = [Ours(labels[str(result.model["fingerprint"])], result, path, _reasons(result)) for path, result in found]
    return sorted(ours, key=lambda one: (one.label, one.suite))


def usable(ours: Sequence[Ours]) -> dict[str, dict[str, Ours]]:
    """Model label -> suite -> its newest result that is complete and deviates in nothing."""
    chosen: dict[str, dict[str, Ours]] = {}
    for one in ours:
        if one.is_usable:
            chosen.setdefault(one.label, {}).setdefault(one.suite, one)
    return chosen


def deviating(ours: Sequence[Ours]) -> list[Ours]:
    """The results that may only be shown with a dagger."""
    return [one for one in ours if not one.is_usable]


def best_known(suites: Mapping[str, Ours], suite: str, metric: str) -> Metric | None:
    """The metric of one suite among a model's results; None where there is none."""
    return suites[suite].metric(metric) if suite in suites else None


def _name(result: Result) -> str:
    """The name that was typed where it is one; else that of the model's folder or hub id."""
    spec = str(result.model.get("spec", ""))
    return spec if spec and "/" not in spec and "\\" not in spec else str(result.model["name"])


def _reasons(result: Result) -> tuple[str, ...]:
    found = [f"{one.field}={one.used} (card: {one.official})" for one in result.deviations]
    failed = sum(result.counts.failed.values())
    if failed:
        found.append(f"{failed} of {result.counts.expected} failed")
    elif result.status != "complete" and not any(one.field == "limit" for one in result.deviations):
        found.append(result.status)
    elif not found and not results.is_complete(result):
        found.append(f"{result.headline} is undefined")
    return tuple(found)
