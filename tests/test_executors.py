"""Executors: batches that fail are split until only the guilty item is left; workers that hang or die are replaced."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from fakes.suite import make_weights, model_recipe, scorer_recipe, set_faults
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.executors import CRASHES_OF_AN_ITEM, Executor, Inline, Processes, Schedule
from mmalign.images import decode_image, encode_png
from mmalign.store import write_atomic
from mmalign.types import Failure, MmalignError, Prompt, Request, Sample, UsageError, Value
from mmalign.worker import BatchFailure, Outcome, Picture, Recipe

SETTINGS = {"brightness": 1.0, "steps": 4}


def requests(*ids: str) -> list[Request]:
    return [Request(Prompt(name, name), 0, seed=number, settings=SETTINGS) for number, name in enumerate(ids)]


def run(executor: Executor, recipe: Recipe, items: Sequence[object], batch: int = 4) -> list[Sample | Value | Failure]:
    """The results in the order of the items; every item must come back exactly once."""
    found: dict[int, Outcome] = {}
    with executor.open(recipe) as session:
        for outcomes in session.run(items, batch):
            for position, outcome in outcomes:
                assert position not in found
                found[position] = outcome
    assert sorted(found) == list(range(len(items)))
    return [found[position].result for position in range(len(items))]


def quick(workers: int = 1) -> Processes:
    return Processes(workers, seconds_per_item=120.0, load_seconds=300.0)


def failed(results: Sequence[object]) -> dict[int, str]:
    return {position: result.kind for position, result in enumerate(results) if isinstance(result, Failure)}


def pictures(folder: Path, *ids: str) -> list[Picture]:
    found = []
    for number, request in enumerate(requests(*ids)):
        png = encode_png(np.full((4, 4, 3), 30 * number + 20, np.uint8))
        path = folder / f"{number}.png"
        write_atomic(path, png)
        found.append(Picture(Sample(request, image_sha=hashlib.sha256(png).hexdigest()), path))
    return found


EXECUTORS: list[Callable[[], Executor]] = [Inline, quick]


@pytest.mark.parametrize("make", EXECUTORS)
def test_a_model_describes_itself_and_generates(tmp_path: Path, make: Callable[[], Executor]) -> None:
    recipe = model_recipe(make_weights(tmp_path / "w"), brightness="0.5")
    with make().open(recipe) as session:
        description = session.description
        assert (description.name, description.facts["determinism"]) == ("dots", "bitwise")
        assert description.options == {"brightness": 0.5, "steps": 4} and description.defaults == SETTINGS
        [(position, outcome)] = [one for outcomes in session.run(requests("a"), 4) for one in outcomes]
    assert position == 0 and isinstance(outcome.result, Sample) and outcome.seconds > 0
    pixels = decode_image(outcome.result.image)
    assert pixels.shape == (8, 8, 3) and outcome.result.extra == {"mean": float(pixels.mean())}


@pytest.mark.parametrize("make", EXECUTORS)
@pytest.mark.parametrize("fault", ["raise", "short", "oom"])
def test_only_the_guilty_item_of_a_batch_fails(tmp_path: Path, make: Callable[[], Executor], fault: str) -> None:
    weights = make_weights(tmp_path / "w", faults={"c": fault})
    results = run(make(), model_recipe(weights), requests(*"abcdefg"), batch=7)
    assert failed(results) == {2: "oom" if fault == "oom" else "error"}
    clean = run(Inline(), model_recipe(make_weights(tmp_path / "clean")), requests(*"abcdefg"), batch=1)
    assert [one.image_sha for n, one in enumerate(results) if n != 2] == [one.image_sha for n, one in enumerate(clean) if n != 2]


def test_messages_say_what_happened(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "w", faults={"a": "raise", "b": "short", "c": "refuse"})
    raised, short, refused = run(Inline(), model_recipe(weights), requests("a", "b", "c"), batch=1)
    assert "ValueError: no luck with a" in raised.message and "faults.py:" in raised.message
    assert short.message == "generate() of model 'dots' must give 1 results in order, got 0."
    assert refused == Failure("generate", "refusal", "the model refused")


def test_out_of_memory_in_batches_costs_nothing_but_time(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "w", faults=dict.fromkeys("abcdefg", "oom in batches"))
    assert failed(run(Inline(), model_recipe(weights), requests(*"abcdefg"), batch=7)) == {}


@pytest.mark.parametrize("fault", ["hang", "spin"])
def test_a_hung_worker_is_killed_and_costs_one_item(tmp_path: Path, fault: str) -> None:
    weights = make_weights(tmp_path / "w", faults={"a": fault})
    results = run(Processes(1, seconds_per_item=5.0), model_recipe(weights), requests("a", "b"), batch=1)
    assert failed(results) == {0: "timeout"}
    assert results[0].message == "The model 'dots' gave no answer within 5 s for this item and was stopped."


def test_a_worker_that_dies_costs_one_item(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "w", faults={"b": "die"})
    results = run(quick(2), model_recipe(weights), requests(*"abcde"), batch=3)
    assert failed(results) == {1: "error"}
    assert results[1].message == (
        "The worker died (signal SIGKILL) while it ran the model 'dots'. "
        f"This happened {CRASHES_OF_AN_ITEM} times with this item alone."
    )


def test_a_worker_killed_from_outside_costs_nothing(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "w", faults={"delay": 0.05})
    found: dict[int, Outcome] = {}
    with quick(2).open(model_recipe(weights)) as session:
        for outcomes in session.run(requests(*(f"p{n}" for n in range(12))), 2):
            found.update(outcomes)
            if len(found) in (2, 6):
                for child in multiprocessing.active_children():
                    os.kill(child.pid or 0, signal.SIGKILL)
    assert sorted(found) == list(range(12)) and failed([one.result for one in found.values()]) == {}


@pytest.mark.parametrize("make", EXECUTORS)
def test_scores_are_checked(tmp_path: Path, make: Callable[[], Executor]) -> None:
    set_faults(tmp_path / "f", {"b": "nan", "c": "inf", "d": "untyped", "e": "text", "f": "raise"})
    results = run(make(), scorer_recipe(tmp_path / "f"), pictures(tmp_path, *"abcdefg"), batch=7)
    assert failed(results) == {1: "nonfinite", 2: "nonfinite", 3: "error", 4: "error", 5: "error"}
    assert results[0] == Value(20 / 255, {"bright": 0.0}, detail="saw 0.078")
    assert results[1].message == "The scorer gave x = nan, expected a finite number."
    assert results[3].message == "The scorer 'brightness' gave a float where a Value or Failure is expected."
    assert all(result.stage == "score" for result in results if isinstance(result, Failure))


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_a_damaged_image_is_a_hole_and_not_a_score(tmp_path: Path, damage: str) -> None:
    items = pictures(tmp_path, "a", "b")
    path = items[1].path
    assert path is not None
    path.unlink() if damage == "missing" else path.write_bytes(items[0].path.read_bytes())
    results = run(Inline(), scorer_recipe(), items)
    assert isinstance(results[0], Value) and failed(results) == {1: "missing"}


@pytest.mark.parametrize("make", EXECUTORS)
def test_what_cannot_be_loaded_is_one_error_of_the_run(tmp_path: Path, make: Callable[[], Executor]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MmalignError, match=r"The weights .*weights.txt are missing. Copy them there."):
        make().open(model_recipe(tmp_path / "empty"))
    with pytest.raises(UsageError, match="Unknown option 'brightnes' of sampling. Did you mean 'brightness'?"):
        make().open(model_recipe(make_weights(tmp_path / "w"), brightnes=1))
    with pytest.raises(MmalignError, match=r"The model 'dots' \(.*dots.py\) could not be loaded: ValueError: a header that makes no sense"):
        make().open(model_recipe(make_weights(tmp_path / "bad", faults={"load": "raise"})))
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_or_hangs_while_loading_is_an_error_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(MmalignError, match=r"died 3 times while loading \(signal SIGKILL\)"):
        quick().open(model_recipe(make_weights(tmp_path / "die", faults={"load": "die"})))
    with pytest.raises(MmalignError, match="did not load within 1 s"):
        Processes(1, load_seconds=1).open(model_recipe(make_weights(tmp_path / "hang", faults={"load": "hang"})))
    assert multiprocessing.active_children() == []


def test_workers_that_cannot_load_beside_a_working_one_are_given_up(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "w")
    with quick(2).open(model_recipe(weights)) as session:
        set_faults(weights, {"load": "die", "delay": 0.5})
        found = [position for outcomes in session.run(requests(*(f"p{n}" for n in range(20))), 1) for position, _ in outcomes]
    assert sorted(found) == list(range(20))


def test_weights_that_change_between_workers_stop_the_run(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "w", faults={"delay": 0.5})
    with quick(2).open(model_recipe(weights)) as session:
        (weights / "weights.txt").write_text("other weights")
        with pytest.raises(MmalignError, match="The model 'dots' changed while it ran"):
            list(session.run(requests(*(f"p{n}" for n in range(80))), 1))


def test_no_worker_outlives_a_driver_that_is_killed(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "w", faults={"a": "spin"})
    code = (
        "import sys, pathlib, multiprocessing\nfrom fakes.suite import model_recipe\nfrom mmalign.executors import Processes\n"
        "from test_executors import requests\nif __name__ == '__main__':\n"
        "    with Processes(1).open(model_recipe(pathlib.Path(sys.argv[1]))) as session:\n"
        "        print(multiprocessing.active_children()[0].pid, flush=True)\n        list(session.run(requests('a'), 1))\n"
    )
    script = tmp_path / "driver.py"
    script.write_text(code)
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here.parent, here)))
    driver = subprocess.Popen([sys.executable, str(script), str(weights)], stdout=-1, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert driver.stdout is not None
    worker = int(driver.stdout.readline())
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    deadline = time.monotonic() + 60
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(worker)


def is_running(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@given(st.integers(0, 40), st.integers(1, 9), st.sets(st.integers(0, 39)), st.data())
@settings(deadline=None)
def test_every_item_ends_once_and_only_the_guilty_fail(count: int, batch: int, guilty: set[int], data: st.DataObject) -> None:
    schedule = Schedule(count, batch, "score")
    found: dict[int, object] = {}
    while schedule:
        task = schedule.next()
        if guilty & set(task.positions):
            end = data.draw(st.sampled_from(["raise", "crash", "time out"]))
            if end == "raise":
                done = schedule.finish(task, BatchFailure("error", "?"))
            else:
                done = schedule.crash(task, "dead") if end == "crash" else schedule.time_out(task, "late")
        else:
            done = schedule.finish(task, [Outcome(Value(float(position)), 0.0) for position in task.positions])
        for position, outcome in done:
            assert position not in found
            found[position] = outcome.result
    assert sorted(found) == list(range(count))
    assert {position for position, result in found.items() if isinstance(result, Failure)} == guilty & set(range(count))
    assert all(result == Value(float(position)) for position, result in found.items() if not isinstance(result, Failure))


def test_devices_are_taken_in_turn(tmp_path: Path) -> None:
    with Processes(4, devices=("cpu", "meta")).open(model_recipe(make_weights(tmp_path / "w", faults={"delay": 0.05}))) as session:
        list(session.run(requests(*(f"p{n}" for n in range(8))), 1))
        assert sorted(worker.device for worker in session._workers) == ["cpu", "cpu", "meta", "meta"]

