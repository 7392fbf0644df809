"""Curves of figures over steps, as hand-written SVG: raw values faint, their running mean strong. No dependency, no script; they print.

As in figures.py, colours and fonts come from the page's style sheet by class name, and all text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from mmalign.figures import SERIES_STYLES, format_number, ticks

WIDTH, HEIGHT = 480, 210  # user units; the page scales the figure to its column
LEFT, RIGHT, TOP, BOTTOM = 52, 470, 10, 184
POINTS = 240  # more are drawn as means of as many neighbours as it takes: a pixel shows no more
SMOOTH_FROM = 24  # points from which a running mean is drawn over the raw values
MOST = SERIES_STYLES  # curves that a chart can tell apart


@dataclass(frozen=True)
class Curve:
    """A figure's values at steps, in order. Values that are no number are gaps."""

    name: str
    points: tuple[tuple[float, float], ...]

    @property
    def finite(self) -> list[tuple[float, float]]:
        return [(step, value) for step, value in self.points if math.isfinite(value)]

    @property
    def last(self) -> float | None:
        return self.finite[-1][1] if self.finite else None


def chart(curves: Sequence[Curve], title: str, span: tuple[float, float]) -> str:
    """One SVG element with a curve per figure on shared axes; `span` is the first and the last step of the page's charts.

    A curve of few points shows each of them. ValueError for more curves than MOST.
    """
    if not 0 < len(curves) <= MOST:
        raise ValueError(f"a chart holds 1 to {MOST} curves, got {len(curves)}")
    drawn = [thinned(curve.finite) for curve in curves]
    values = [value for points in drawn for _, value in points] or [0.0]
    low, high = min(values), max(values)
    if low == high and low >= 0:  # what is never negative has no axis below zero
        low, high = 0.0, 2 * high or 1.0
    rows, columns = ticks(low, high, about=4), _step_ticks(*span)

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - columns[0]) / (columns[-1] - columns[0])
        up = (value - rows[0]) / (rows[-1] - rows[0])
        return LEFT + (RIGHT - LEFT) * across, BOTTOM - (BOTTOM - TOP) * up

    body = []
    for mark in rows:
        y = place(columns[0], mark)[1]
        body.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{RIGHT}" y2="{y:.1f}"/>')
        body.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick(mark)}</text>')
    for mark in columns:
        x = place(mark, rows[0])[0]
        body.append(f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{_tick(mark)}</text>')
    for number, (curve, points) in enumerate(zip(curves, drawn, strict=True)):
        title_text = f"{curve.name}: {format_number(curve.last)} at the end"
        body.append(f'<g class="series-{number}"><title>{escape(title_text)}</title>')
        body.extend(_draw([place(*point) for point in points], [place(*point) for point in smoothed(points)]))
        body.append("</g>")
    opening = f'<svg class="figure" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return "\n".join([opening, *body, "</svg>"])


def key(number: int) -> str:
    """The line of a curve, for a legend in the page."""
    line = '<line class="curve" x1="1" y1="8" x2="15" y2="8"/>'
    return f'<svg class="key series-{number % SERIES_STYLES}" viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">{line}</svg>'


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points: means of as many neighbours as that takes, the last group perhaps shorter."""
    size = -(-len(points) // POINTS)
    if size <= 1:
        return list(points)
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(step for step, _ in group) / len(group), sum(value for _, value in group) / len(group)) for group in groups]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The running mean over a tenth of the points, centred; at the ends over what there is."""
    if len(points) < SMOOTH_FROM:
        return []
    reach = len(points) // 20
    found = []
    for at, (step, _) in enumerate(points):
        window = [value for _, value in points[max(0, at - reach) : at + reach + 1]]
        found.append((step, sum(window) / len(window)))
    return found


def _draw(raw: Sequence[tuple[float, float]], smooth: Sequence[tuple[float, float]]) -> list[str]:
    strong = smooth or raw
    parts = [f'<polyline class="curve faint" points="{_path(raw)}"/>'] if smooth else []
    parts.append(f'<polyline class="curve" points="{_path(strong)}"/>')
    if not smooth:
        parts.extend(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in raw)
    return parts


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _step_ticks(low: float, high: float) -> list[float]:
    """Whole numbers for an axis of steps, from at most `low` to at least `high`."""
    marks = ticks(low, high, about=5)
    if all(after - before >= 1 for before, after in pairwise(marks)):
        return marks
    first, last = math.floor(low), math.ceil(high)
    return [float(mark) for mark in range(first, max(last, first + 1) + 1)]


def _tick(mark: float) -> str:
    return f"{mark:g}".replace("-", "−")
