"""What verbs that run suites say while they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmalign.config import redact
from mmalign.screen import Screen, Show
from mmalign.types import MmalignError

if TYPE_CHECKING:
    from mmalign.evaluate import Job, Progress


T = TypeVar("T")
NAMED = 8  # suites that one line names


def announce(made: Sequence[Job], where: str, results: Path, screen: Screen) -> None:
    from mmalign.evaluate import run_directory

    suites = [job.suite for job in made]
    named = ", ".join(suites) if len(suites) <= NAMED else f"{len(suites)} suites"
    screen.say(f"{made[0].model_name} on {named}: {where}, results in {run_directory(results, made[0]).parent}")


def attempt(job: Job, work: Callable[[], T], left_out: dict[str, str], is_all: bool) -> list[T]:
    """What one of several jobs gives. Where every suite was asked for, one that cannot run is left out with the reason, and [] returned."""
    try:
        return [work()]
    except MmalignError as error:
        if not is_all:
            raise
        left_out[job.suite] = redact(str(error))
        return []


def say_left_out(left_out: Mapping[str, str], total: int, screen: Screen) -> list[dict[str, Any]]:
    """Name each suite that was left out, with the reason and its remedy; the same as JSON-able data."""
    if left_out:
        screen.say(f"Left out {len(left_out)} of {total} suites:")
        width = max(map(len, left_out))
        for suite, reason in left_out.items():  # in full, because a reason ends with its remedy
            screen.say(f"  {suite:<{width}}  {reason}")
        screen.say("`mmalign doctor` lists all that is absent here, with the commands that bring it.")
    return [{"suite": suite, "status": "left out", "reason": reason, "is_complete": False} for suite, reason in left_out.items()]


def advance(show: Show, screen: Screen, progress: Progress) -> None:
    if progress.stage == "wait":
        screen.note(f"{progress.name} Waiting.")
    failed = f" ({progress.failed} failed)" if progress.failed else ""
    show(f"{progress.stage} {progress.name}", f"{progress.stage} {progress.name}{failed}", progress.done, progress.total)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
