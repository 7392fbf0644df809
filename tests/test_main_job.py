"""The main job on real input: `mmalign eval` with the bundled checkpoint, from prompts to a result and its page."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.tiny_geneval import make_clip, make_detector

from mmalign import cli, results

SHARED = os.environ.get("MMALIGN_SHARED")
LIMIT = 17


def evaluate(folder, *more, limit=LIMIT, suite="shapes"):
    words = ["eval", "--model", "tiny-janus", "--suite", suite, "--results", str(folder), "--limit", str(limit), "--device", "cpu", *more]
    return cli.main(words)


def only_result(folder):
    (file,) = results.find(Path(folder))
    return results.read(file)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert evaluate(folder, "--images-per-prompt", "2", "--batch-size", "7", "-j", "1") == 0
    return only_result(folder)


@pytest.mark.parametrize("batch, workers", [("1", "1"), ("3", "2"), ("34", "2")])
def test_batch_and_workers_change_no_bit(undisturbed, tmp_path, batch, workers):
    evaluate(tmp_path, "--images-per-prompt", "2", "--batch-size", batch, "-j", workers)
    assert only_result(tmp_path).rows_digest == undisturbed.rows_digest
    assert undisturbed.model["determinism"] == "bitwise"


def test_the_result_says_what_it_is(undisturbed):
    assert undisturbed.status == "partial" and undisturbed.counts.expected == undisturbed.counts.scored == 2 * LIMIT
    assert {one.field for one in undisturbed.deviations} >= {"limit", "images_per_prompt"}
    metric = undisturbed.metrics["strict"]
    assert 0 <= metric.value <= 1 and metric.ci[0] <= metric.value <= metric.ci[1] and metric.prompts == LIMIT
    assert "PARTIAL" in results.paste_line(undisturbed)


@pytest.mark.slow
def test_kill_at_random_moments_loses_nothing(undisturbed, tmp_path):
    words = [sys.executable, "-m", "mmalign", "eval", "--model", "tiny-janus", "--suite", "shapes", "--results", str(tmp_path)]
    words += ["--limit", str(LIMIT), "--images-per-prompt", "2", "--batch-size", "3", "-j", "2", "--device", "cpu"]
    draw = random.Random(0)
    for _ in range(20):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.5, 12))
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert last.returncode == 0, last.stderr[-2000:]
    assert only_result(tmp_path).rows_digest == undisturbed.rows_digest


@pytest.mark.slow
@pytest.mark.skipif(SHARED is None, reason="the official prompts are read from $MMALIGN_SHARED/data, which is not set")
def test_geneval_from_official_prompts_to_a_report(tmp_path, monkeypatch):
    """553 prompts -> tiny-janus -> a tiny random detector -> result -> page. The numbers mean nothing; the path is the official one."""
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "data"))
    assert cli.main(["data", "add", "geneval", "--from", str(Path(SHARED) / "data" / "geneval")]) == 0
    options = {"detector": make_detector(tmp_path / "detector"), "clip": make_clip(tmp_path / "clip"), "resolution": 64}
    sets = [word for name, value in options.items() for word in ("--set", f"geneval.{name}={value}")]
    words = ["eval", "--model", "tiny-janus", "--suite", "geneval", "--results", str(tmp_path / "results"), "--device", "cpu"]
    assert cli.main([*words, "--images-per-prompt", "1", "--batch-size", "32", *sets]) == 0
    result = only_result(tmp_path / "results")
    assert result.counts.expected == result.counts.scored == 553 and result.status == "complete"
    assert "geneval-hf" in results.paste_line(result) and any("detector" in one.field for one in result.deviations)
    assert (
        len([name for name in result.metrics if name in ("single_object", "two_object", "counting", "colors", "position", "color_attr")])
        == 6
    )
    (page,) = (tmp_path / "results").rglob("index.html")
    assert "GenEval" in page.read_text()


def test_the_bundled_checkpoints_are_small_and_in_the_official_layout():
    from mmalign.hub import CHECKPOINTS

    for name in ("tiny-janus", "tiny-clip"):
        size = sum(file.stat().st_size for file in (CHECKPOINTS / name).iterdir())
        assert size <= 6 * 2**20, f"{name} takes {size} bytes"
        assert json.loads((CHECKPOINTS / name / "config.json").read_text())["model_type"] == name.removeprefix("tiny-")
