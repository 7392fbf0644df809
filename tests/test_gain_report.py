"""The charts of denoising steps: stages of a run, lines of a group, calibrated noise; none for runs that have no such steps."""

import json
import math

import pytest

from mmalign import curves, gain_report, history


def line(step, n_steps=3):
    figures = {f"gain/step_{k}": 0.1 * step + k for k in range(n_steps)}
    return {"step": step, "reward": 0.5, **figures, **{f"positive/step_{k}": 0.25 for k in range(n_steps)}}


def charts(run, metrics):
    return gain_report.step_charts(run, metrics, history.read_gains(run))


def test_stages_are_means_over_thirds_of_the_run(tmp_path):
    gain, positive = charts(tmp_path, [line(step) for step in range(1, 10)])
    assert [curve.name for curve in gain.curves] == ["training steps 1 to 3", "training steps 4 to 6", "training steps 7 to 9"]
    assert [value for _, value in gain.curves[1].points] == pytest.approx([0.5, 1.5, 2.5]) and gain.last == 2
    assert {value for curve in positive.curves for _, value in curve.points} == {0.25}
    assert [len(chart.curves) for chart in charts(tmp_path, [line(1), line(2)])] == [2, 2]


def test_a_group_is_one_line_per_trajectory_with_a_gap_for_a_missing_reward(tmp_path):
    rows = [[0.5, -0.25, 0.0]] * 7 + [[math.nan, math.nan, 0.1]]
    for step in (1, 26, 51):
        history.write_gains(tmp_path, step, "two <red> things", rows)
    assert [group.rows[-1] for group in history.read_gains(tmp_path)] == [(None, None, 0.1)] * 3
    first, last = charts(tmp_path, [])
    assert first.title.endswith("step 1") and last.title.endswith("step 51") and len(first.curves) == curves.MOST
    assert first.curves[0].points == ((0.0, 0.5), (1.0, -0.25), (2.0, 0.0))
    assert "nan" not in curves.chart(first.curves, first.title, (0, first.last))


def test_calibrated_noise_shows_where_it_began_and_whether_it_settled(tmp_path):
    content = {"levels": [1.4, 0.3], "history": [[1.2, 0.7], [1.4, 0.3]], "positive": [[3, 1]] * 40, "drift": [0.1, -0.9]}
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    (chart,) = charts(tmp_path, [])
    assert [curve.points for curve in chart.curves] == [((0, 1.2), (1, 0.7)), ((0, 1.4), (1, 0.3))]
    assert "40 iterations" in chart.note and "1 of 2 steps" in chart.note


def test_other_runs_have_no_such_charts(tmp_path):
    assert charts(tmp_path, [{"step": 1, "reward": 0.5}]) == []
