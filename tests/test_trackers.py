"""Trackers: what each package is told, in which order, from which step on; and the sentence when one is not installed."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mmalign.trackers import TRACKERS, check_trackers, open_trackers
from mmalign.types import UsageError

IMAGE = np.zeros((4, 6, 3), np.uint8)
# A stand-in for wandb and trackio that writes down every call.
FAKE = """
CALLS = []


class Image:
    def __init__(self, data, caption=None):
        self.shape, self.caption = data.shape, caption


class Run:
    def log(self, figures, step):
        CALLS.append(("log", figures, step))

    def finish(self):
        CALLS.append(("finish",))


def init(**options):
    CALLS.append(("init", options))
    return Run()


def log(figures, step):
    CALLS.append(("log", figures, step))


def finish():
    CALLS.append(("finish",))
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(FAKE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    yield
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_figures_pictures_and_choices_reach_the_package(name: str, fakes: None, tmp_path: Path) -> None:
    (tracker,) = open_trackers([name], tmp_path / "my-run", {"trainer": "gvu"}, 0)
    tracker.show(0, "samples", [(IMAGE, "a cat")])
    tracker.log(1, {"reward": 0.5})
    tracker.close()
    (_, options), (_, pictures, step), *rest = sys.modules[name].CALLS
    assert options["project"] == "mmalign" and options["name"] == "my-run" and options["config"] == {"trainer": "gvu"}
    assert options["resume"] == "allow" and step == 0
    (image,) = pictures["samples"] if name == "wandb" else pictures.values()
    assert image.shape == IMAGE.shape and image.caption == "a cat"
    assert rest == [("log", {"reward": 0.5}, 1), ("finish",)]


def test_a_resumed_training_is_the_same_run_of_wandb(fakes: None, tmp_path: Path) -> None:
    for step in (0, 5):
        open_trackers(["wandb"], tmp_path / "one", {}, step)
    open_trackers(["wandb"], tmp_path / "other", {}, 0)
    first, again, other = [options["id"] for _, options in sys.modules["wandb"].CALLS]
    assert first == again != other


def test_an_unknown_or_absent_tracker_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no tracker 'tensorbord'; there are tensorboard, wandb, trackio"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr("mmalign.trackers.find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(UsageError, match=rf"{name} is not installed here.*mmalign\[trackers\].*metrics\.jsonl"):
            check_trackers([name])
    check_trackers([])


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs the extra [trackers]")
def test_tensorboard_holds_the_figures_and_forgets_what_is_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, value in ((0, 0.1), (2, 0.9)):  # killed after step 4, continued from the state of step 2
        (tracker,) = open_trackers(["tensorboard"], tmp_path, {}, start)
        for step in range(start + 1, start + 5):
            tracker.log(step, {"reward": value})
        tracker.show(start, "samples", [(IMAGE, "a cat")])
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("reward")] == [(n, 0.1 if n <= 2 else 0.9) for n in range(1, 7)]
    assert "samples/00" in events.Tags()["images"]


def test_a_training_run_reports_to_its_tracker(fakes: None, tmp_path: Path) -> None:
    from mmalign import cli
    from mmalign.testbed.tiny import make_janus

    (tmp_path / "prompts.txt").write_text("two red things\nthree red things\n")
    plug = Path(__file__).parent / "helpers" / "redness.py"
    words = ["train", "t2i_r1", "--model", str(make_janus(tmp_path / "tiny", seed=1)), "--plug", str(plug), "--reward", "redness=1"]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--run-dir", str(tmp_path / "run"), "--steps", "2", "--prompts-per-step", "2"]
    words += ["--samples", "2", "--no-reasoning", "--image-every", "1", "--device", "cpu", "--tracker", "trackio"]
    assert cli.main(words) == 0
    calls = sys.modules["trackio"].CALLS
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [(step, figures) for kind, figures, step in calls[1:-1] if "reward" in figures]
    assert [step for step, _ in logged] == [1, 2] and [{"step": step, **figures} for step, figures in logged] == lines
    assert [step for _, figures, step in calls[1:-1] if "samples/00" in figures] == [0, 1, 2] and calls[-1] == ("finish",)
