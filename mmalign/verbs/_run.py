"""What verbs that run suites say while they run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.screen import Screen, Show

if TYPE_CHECKING:
    from mmalign.evaluate import Job, Progress


def announce(made: Sequence[Job], where: str, results: Path, screen: Screen) -> None:
    from mmalign.evaluate import run_directory

    suites = ", ".join(job.suite for job in made)
    screen.say(f"{made[0].model_name} on {suites}: {where}, results in {run_directory(results, made[0]).parent}")


def advance(show: Show, screen: Screen, progress: Progress) -> None:
    if progress.stage == "wait":
        screen.note(f"{progress.name} Waiting.")
    failed = f" ({progress.failed} failed)" if progress.failed else ""
    show(f"{progress.stage} {progress.name}", f"{progress.stage} {progress.name}{failed}", progress.done, progress.total)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
