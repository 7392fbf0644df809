"""What a verb says: text for a person on standard output, or one JSON document; progress bars and notes on standard error."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mmalign.config import redact

# (name of a bar, text beside it, done, total); a total of 0 means that nobody knows how long it takes
Show = Callable[[str, str, int, int], None]


class Screen:
    """Where output goes. With `as_json`, standard output holds exactly one JSON document, also when the verb fails."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def say(self, text: str = "") -> None:
        """A line for a person, visible at once; nothing with --json."""
        if not self.as_json:
            print(text, flush=True)  # noqa: T201

    def note(self, text: str) -> None:
        """A line beside the output: warnings, waiting, errors. Values of known secrets are blanked."""
        print(redact(text), file=sys.stderr, flush=True)  # noqa: T201

    def give(self, content: Any) -> None:
        """The verb's answer as JSON; nothing without --json."""
        if self.as_json:
            print(redact(json.dumps(content, indent=2, ensure_ascii=False, default=str)), flush=True)  # noqa: T201

    @contextmanager
    def progress(self) -> Iterator[Show]:
        """Bars on standard error where it is a terminal; elsewhere calls do nothing."""
        if not sys.stderr.isatty():
            yield lambda name, text, done, total: None
            return

        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        tasks: dict[str, TaskID] = {}
        parts = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*parts, console=Console(stderr=True), transient=True) as bars:

            def show(name: str, text: str, done: int, total: int) -> None:
                for other, task in tasks.items():  # a bar without an end is over when the next thing begins
                    bars.update(task, visible=bars.tasks[task].total is not None or other == name)
                if name not in tasks:
                    tasks[name] = bars.add_task(text, total=total or None)
                bars.update(tasks[name], description=text, completed=done, total=total or None)

            yield show


def columns(rows: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """Rows as lines with aligned columns; on a terminal a line is cut at its width."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = (gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return [line if limit is None or len(line) <= limit else line[: limit - 1] + "…" for line in lines]
