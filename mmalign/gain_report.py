"""The part of a training report that looks at denoising steps: what each step gained, how often, and how much noise it was given.

Figures 3 and 6 of the DenseGRPO paper (arXiv 2601.20218) for a run of one's own: the gains of a group as one line per trajectory, the mean
gain and the share of positive gains of each step as training goes on, and psi(t) where it was calibrated. Step 0 is the noisiest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmalign import curves
from mmalign.curves import Curve
from mmalign.history import Gains, Line

CALIBRATION = "calibration.json"
STAGES = 3  # parts of a run that are told apart


@dataclass(frozen=True)
class StepChart:
    """A chart over denoising steps 0 to `last`."""

    title: str
    curves: tuple[Curve, ...]
    note: str
    last: int


def step_charts(run: Path, metrics: Sequence[Line], groups: Sequence[Gains]) -> list[StepChart]:
    """The charts of a run whose steps were credited one by one (`groups` are those it kept), or whose noise was calibrated; none for any
    other run."""
    shown = [groups[0], groups[-1]] if len(groups) > 1 else groups
    found = [_polylines(group) for group in shown]
    notes = {"gain": "Mean over a step's samples.", "positive": "Share of samples whose reward rose; the rest fell or stayed."}
    for figure, title in (("gain", "Reward gain"), ("positive", "Share of positive gains")):
        stages = _stages(metrics, figure)
        if stages:
            found.append(StepChart(f"{title} by denoising step", stages, notes[figure], len(stages[0].points) - 1))
    return [*found, *_noise(run)]


def _polylines(group: Gains) -> StepChart:
    rows = group.rows[: curves.MOST]
    lines = tuple(
        Curve(f"sample {number}", tuple((float(k), math.nan if gain is None else gain) for k, gain in enumerate(row)))
        for number, row in enumerate(rows, 1)
    )
    note = f"\u201c{group.title}\u201d: one line per trajectory, R(t-1) - R(t). Steps at which all fall are given too much noise."
    return StepChart(f"Gains of a group at step {group.step}", lines, note, max(len(row) for row in rows) - 1)


def _stages(metrics: Sequence[Line], figure: str) -> tuple[Curve, ...]:
    """Means of `figure`/step_k over up to three parts of the run."""
    lines = [line for line in metrics if f"{figure}/step_0" in line]
    number = min(STAGES, len(lines))
    found = []
    for stage in range(number):
        part = lines[stage * len(lines) // number : (stage + 1) * len(lines) // number]
        n_steps = sum(name.startswith(f"{figure}/step_") for name in part[0])
        means = (sum(line[f"{figure}/step_{k}"] for line in part) / len(part) for k in range(n_steps))
        ends = f"{part[0]['step']:g} to {part[-1]['step']:g}" if len(part) > 1 else f"{part[0]['step']:g}"
        found.append(Curve(f"training steps {ends}", tuple(enumerate(means))))
    return tuple(found)


def _noise(run: Path) -> list[StepChart]:
    """psi(t) as calibration began and as it ended, with the drift that says whether it settled."""
    file = run / CALIBRATION
    if not file.is_file():
        return []
    content = json.loads(file.read_text(encoding="utf-8"))
    start, levels, drift = content["history"][0], content["levels"], content["drift"]
    falling = sum(value < -0.5 for value in drift)
    note = f"Found in {len(content['positive'])} iterations; still falling at the end: {falling} of {len(levels)} steps."
    pair = (Curve("at the start", tuple(enumerate(start))), Curve("calibrated", tuple(enumerate(levels))))
    return [StepChart("Noise by denoising step, psi(t)", pair, note, len(levels) - 1)]
