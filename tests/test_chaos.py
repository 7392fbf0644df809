"""kill -9 of drivers and workers at random moments, and two runs at once: nothing is lost, nothing is done twice, one digest."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from fakes.suite import calls, make_job, make_weights, scorer_recipe, set_faults

from mmalign.evaluate import evaluate, run_directory
from mmalign.executors import Inline

HERE = Path(__file__).parent
KILLS = 20
ITEMS = 60  # 30 prompts, two images each


def prepare(folder: Path) -> str:
    """Slow weights and scorer in `folder`, and the digest of an undisturbed inline run."""
    make_weights(folder / "w")
    set_faults(folder / "s", {})
    digest = evaluate(make_job(folder / "w", scorer_recipe(folder / "s"), count=30), Inline(), folder / "undisturbed", batch=60).rows_digest
    for part in ("w", "s"):
        set_faults(folder / part, {"delay": 0.01})
        (folder / part / "calls.log").unlink()
    return digest


def start(folder: Path, workers: int, batch: int) -> subprocess.Popen[str]:
    paths = os.pathsep.join((str(HERE.parent), str(HERE)))
    command = [sys.executable, str(HERE / "fakes" / "drive.py"), str(folder), str(folder / "results"), str(workers), str(batch)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths})


def step(driver: subprocess.Popen[str]) -> str:
    """The next line that a driver prints, at which it stands still."""
    assert driver.stdout is not None
    line = driver.stdout.readline()
    assert line, "the driver ended before its time"
    return line


def go_on(driver: subprocess.Popen[str]) -> None:
    assert driver.stdin is not None
    driver.stdin.write("\n")
    driver.stdin.flush()


def finish(driver: subprocess.Popen[str]) -> str:
    """Let a driver run to its end; the last line it printed."""
    assert driver.stdout is not None and driver.stdin is not None
    driver.stdin.close()
    lines = driver.stdout.read().splitlines()
    assert driver.wait() == 0
    return lines[-1]


def workers_of(driver: int) -> list[int]:
    """The worker processes of a driver (its other child, the resource tracker, has no pipe to serve)."""
    children = Path(f"/proc/{driver}/task/{driver}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [child for child in found if b"spawn_main" in command_of(child)]


def command_of(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def check_index(folder: Path) -> None:
    """Every sample and score is there once and was made once."""
    index = run_directory(folder / "results", make_job(folder / "w", count=30)) / "store" / "index.sqlite"
    with sqlite3.connect(index) as connection:
        for table in ("samples", "scores"):
            found = connection.execute(f"SELECT request, state, attempts FROM {table}").fetchall()
            assert sorted(request for request, _, _ in found) == sorted(f"p{n:03d}/{index}" for n in range(30) for index in range(2))
            assert {(state, attempts) for _, state, attempts in found} == {("done", 1)}


def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    digest = prepare(tmp_path)
    generator = random.Random(0)
    kills = {"driver": 0, "worker": 0}
    driver = start(tmp_path, 2, 2)
    while sum(kills.values()) < KILLS:
        for _ in range(generator.randrange(1, 4)):
            assert not step(driver).startswith("digest"), f"the work was done after {kills}; give it more items"
            go_on(driver)
        time.sleep(generator.random() * 0.05)  # into whatever follows: loading, computing, writing
        victims = workers_of(driver.pid) if kills["worker"] < KILLS / 2 else []
        if victims:
            os.kill(generator.choice(victims), signal.SIGKILL)
            kills["worker"] += 1
        if not victims or generator.random() < 0.3:
            driver.kill()
            driver.wait()
            kills["driver"] += 1
            driver = start(tmp_path, generator.choice((1, 2)), generator.choice((1, 2, 3)))
    assert finish(driver) == f"digest {digest}"
    assert min(kills.values()) >= 5
    check_index(tmp_path)
    # What was computed beside what is kept is at most what was under way when something died: two workers' batches of at most three.
    for part in ("w", "s"):
        assert ITEMS <= len(calls(tmp_path / part)) <= ITEMS + KILLS * 2 * 3
    assert not list((tmp_path / "results").rglob("*.tmp"))


def test_two_runs_at_once_take_turns(tmp_path: Path) -> None:
    digest = prepare(tmp_path)
    first = start(tmp_path, 1, 7)
    while not step(first).startswith("generate"):
        go_on(first)
    second = start(tmp_path, 1, 7)
    assert step(second).startswith("wait")
    go_on(second)
    assert [finish(driver) for driver in (first, second)] == [f"digest {digest}"] * 2
    check_index(tmp_path)
    assert sorted(calls(tmp_path / "w")) == sorted(set(calls(tmp_path / "w")))  # the second found everything done
