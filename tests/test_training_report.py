"""The report of a training run: what its page says and shows, of whole, unfinished and exploited runs, in a real browser from disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import Page, Visitor

from mmalign import curves, history
from mmalign.curves import Curve
from mmalign.prompts import is_unsafe
from mmalign.report import write_report
from mmalign.types import MmalignError, UsageError

HOSTILE = 'a cat</td><script>alert(1)</script> & "it\'s"'


def picture(seed: int, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (16, width, 3), dtype=np.uint8)


def line(step: int, **figures: float) -> dict[str, float]:
    known = {
        "reward": 0.3 + 0.01 * step,
        "reward/shapes": 0.3 + 0.01 * step,
        "kl": 0.001 * step,
        "ratio_deviation": 0.0,
        "map_top_mass": 0.2,
    }
    times = {"seconds/rollout": 3.0, "seconds/update": 1.0, "seconds/step": 4.0}
    return {"step": step, **known, **times, **figures}


def make(run: Path, steps: int = 30, falls: bool = False) -> Path:
    """A run's folder as the loop and the trainer leave it: a panel every five steps, two prompts, one group."""
    run.mkdir(parents=True)
    facts = {"trainer": "dense_grpo", "model": {"name": "tiny-janus"}, "reward": {"shapes": 1.0}, "prompts": "shapes"}
    (run / "run.json").write_text(json.dumps({**facts, "config": {"steps": 40, "learning_rate": 3e-5}}))
    for step in range(1, steps + 1):
        strict = 0.5 - 0.01 * step if falls else 0.3 + 0.01 * step
        parts = {f"panel/kind_{n}": 0.1 * n for n in range(8)}
        history.append_metrics(run, line(step, **({"panel/strict": strict, **parts} if step % 5 == 0 else {})))
    for step in range(0, steps + 1, 2):
        history.write_album(run, "samples", step, [(picture(step), HOSTILE), (picture(step + 1), "a red star")])
    history.write_album(run, "rollouts", 1, [(picture(9, 32), "reward 0.250"), (picture(8, 32), "reward 1.000")], "two blue squares")
    return run


def words(page: Page) -> str:
    return " ".join(" ".join(page.text).split())


def test_prompts_of_unsafe_suites_are_cut_short_unless_asked_for(tmp_path: Path) -> None:
    run = make(tmp_path / "safety")
    history.write_gains(run, 1, "two blue squares", [[0.1, 0.2]])
    assert "two blue squares" in write_report([run]).read_text() and "cut short" not in write_report([run]).read_text()
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "unsafe": True}))
    cut = write_report([run]).read_text()
    assert "blue squares" not in cut and "a red star" not in cut and "--show-unsafe" in cut and '<body class="unsafe"' in cut
    assert "two blue squares" in write_report([run], show_unsafe=True).read_text()


def test_a_run_on_an_unsafe_suite_says_so() -> None:
    assert is_unsafe("mmdt", ()) and is_unsafe("shapes=0.7,mmdt=0.3", ())
    assert not any(is_unsafe(source, ()) for source in ("shapes", "shapes=0.5,geneval=0.5", "prompts.txt", ""))


def test_the_page_holds_curves_pictures_over_time_and_the_verdict(tmp_path: Path) -> None:
    run = make(tmp_path / "dense")
    index = write_report([run])
    assert index == run / "index.html"
    page = Page(index)
    text = words(page)
    assert "dense_grpo from tiny-janus, reward 1 shapes, prompts shapes; step 30 of 40." in text
    assert "The training reward rises; strict on held-out prompts rises. No sign of an exploited reward." in text
    for title in ("Reward", "Held-out prompts", "KL to the starting model", "Ratio before the first update", "Seconds a step"):
        assert title in text
    assert "Gradient norm" not in text and "shapes 0.600" not in text  # no such figure; a lone part of the reward is the reward
    assert "reward 0.600" in text and "kind_7 0.700" in text
    steps = [int(word) for word in text.split("The same prompts over time prompt step ")[1].split(HOSTILE[:5])[0].split(" step ")]
    assert len(steps) == 8 and steps[0] == 0 and steps[-1] == 30
    sources = [image["src"] for image in page.named("img")]
    assert len(sources) == 8 * 2 + 2 and sources[0] == "samples/step-000000/00.png" and sources[-1] == "rollouts/step-000001/01.png"
    assert "rollout 3.000 75%" in text and HOSTILE in "".join(page.text) and len(page.scripts) == 1
    assert write_report([run]).read_bytes() == page.content.encode()


def test_an_exploited_reward_is_said_at_the_top(tmp_path: Path) -> None:
    page = Page(write_report([make(tmp_path / "hacked", falls=True)]))
    note = "The training reward rises while strict on held-out prompts falls: the model may be exploiting its reward."
    assert note in words(page)
    assert [attributes["class"] for attributes in page.named("p") if attributes.get("id") == "verdict"] == ["verdict exploited"]


def test_base_and_trained_stand_beside_each_other_with_the_interval_of_the_gain(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    base, trained = {"run": "a", "value": 0.124, "ci": [0.09, 0.16]}, {"run": "b", "value": 0.230, "ci": [0.18, 0.28]}
    item = {"suite": "shapes", "headline": "strict", "base": base, "trained": trained, "gain": 0.106, "ci": [0.066, 0.147]}
    (run / history.EVALUATIONS).write_text(json.dumps([{**item, "prompts": 237, "trained_on": ["shapes"]}]))
    (run / "report-shapes").mkdir()
    (run / "report-shapes" / "index.html").write_text("")
    page = Page(write_report([run], tmp_path / "elsewhere"))
    assert "0.124 [0.090, 0.160] 0.230 [0.180, 0.280] +0.106 [0.066, 0.147] 237" in words(page)
    assert "shapes was a training reward" in words(page)
    assert "../run/report-shapes/index.html" in [link["href"] for link in page.named("a")]


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    run = make(tmp_path / "begun", steps=0)
    (run / "samples" / "step-000002").mkdir()  # killed while it wrote its pictures
    text = words(Page(write_report([run])))
    assert "step 0 of 40" in text and "No step has been logged yet." in text and "No held-out panel was measured" in text


def test_a_training_run_is_reported_alone_and_a_broken_one_is_named(tmp_path: Path) -> None:
    run = make(tmp_path / "run", steps=3)
    with pytest.raises(UsageError, match="page of its own"):
        write_report([run, run])
    (run / "run.json").write_text("{")
    with pytest.raises(MmalignError, match=r"run\.json cannot be read"):
        write_report([run])
    log = run / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step"')
    assert history.read_metrics(run) == [{"step": 1}]
    log.write_text('{"step"\n{"step": 2}\n')
    with pytest.raises(MmalignError, match="no JSON"):
        history.read_metrics(run)


def test_curves_keep_the_mean_and_leave_gaps_for_what_is_no_number() -> None:
    points = [(float(step), math.sin(step)) for step in range(1000)]
    thin = curves.thinned(points)
    assert len(thin) <= curves.POINTS and thin[0] == pytest.approx((2.0, sum(math.sin(step) for step in range(5)) / 5))
    assert curves.smoothed(points[:10]) == [] and len(curves.smoothed(points[:100])) == 100
    assert curves.smoothed([(float(step), 7.0) for step in range(40)])[0] == (0.0, 7.0)
    holes = Curve("loss <b>", ((1, math.nan), (2, 0.5), (3, math.inf)))
    drawn = curves.chart([holes], "a & b", (0, 3))
    assert holes.last == 0.5 and drawn.count("<circle") == 1 and "nan" not in drawn and "loss &lt;b&gt;" in drawn and "a &amp; b" in drawn
    flat = curves.chart([Curve("ratio", ((1, 0.0), (2, 0.0)))], "ratio", (0, 2))
    assert "−" not in flat
    with pytest.raises(ValueError, match="1 to 6"):
        curves.chart([holes] * 7, "too many", (0, 3))


def test_the_page_opens_from_disk_without_a_word_on_the_console(browser, tmp_path: Path) -> None:
    index = write_report([make(tmp_path / "run with space")])
    page = Visitor(browser, index)
    assert page.all_images_load()
    assert page.run("return document.querySelectorAll('svg.figure polyline').length") > 8
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    code = "const box = document.querySelector('svg.figure polyline').getBBox(); return [box.x, box.width, box.y + box.height]"
    left, width, bottom = page.run(code)
    assert left >= curves.LEFT and left + width <= curves.RIGHT + 1 and bottom <= curves.BOTTOM + 1 and width > 300
    assert page.run("return document.querySelectorAll('script').length") == 1
    page.assert_quiet()
