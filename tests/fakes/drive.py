"""A driver to be killed: evaluates the test suite with worker processes, in step with whoever reads its lines.

It prints a line for each step that is saved and goes on when it gets a line back, or freely once its standard input is closed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fakes.suite import make_job, scorer_recipe

from mmalign.evaluate import Progress, evaluate
from mmalign.executors import Processes


def show(progress: Progress) -> None:
    sys.stdout.write(f"{progress.stage} {progress.done} {progress.total}\n")
    sys.stdout.flush()
    sys.stdin.readline()


if __name__ == "__main__":
    folder, results, workers, batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    job = make_job(folder / "w", scorer_recipe(folder / "s"), count=30)
    sys.stdout.write(f"digest {evaluate(job, Processes(workers), results, batch=batch, wait=True, report=show).rows_digest}\n")
