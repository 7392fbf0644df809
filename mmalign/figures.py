"""Figures as hand-written SVG: dots with intervals, a shared-outcome bar. No dependency, no script; they print.

Colours and fonts come from the page's style sheet by class name (`series-0`, `axis`, `muted`, ...), so a figure follows
the reader's light or dark setting. All text is escaped here; the strings returned are safe to place into a page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760  # user units; the page scales the figure to its column
LABEL_WIDTH = 210
VALUE_WIDTH = 74
LINE_HEIGHT = 26
LANE_HEIGHT = 15  # the height of one model's lane when several share a line
SERIES_STYLES = 6  # how many distinct classes series-0 ... the style sheet has
CORNERS: tuple[tuple[tuple[float, float], ...], ...] = (
    (),  # a circle
    ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
    ((-4, -4), (4, -4), (4, 4), (-4, 4)),
    ((0, -5.2), (5, 4), (-5, 4)),
)


@dataclass(frozen=True)
class Dot:
    """One measurement: its value (None: undefined), its interval, and the bounds that failures allow."""

    value: float | None
    interval: tuple[float, float] | None = None
    bounds: tuple[float, float] | None = None

    @property
    def level(self) -> tuple[float, ...]:
        """The finite numbers that tell the metric's scale: value and bounds. An interval may reach beyond what the metric can be."""
        return tuple(x for x in (self.value, *(self.bounds or ())) if x is not None and math.isfinite(x))

    @property
    def numbers(self) -> tuple[float, ...]:
        """All finite numbers that the axis has to hold."""
        return *self.level, *(x for x in self.interval or () if math.isfinite(x))


@dataclass(frozen=True)
class Line:
    """One line of a dot plot: a metric with one dot per model (None: that model has no such metric)."""

    name: str
    dots: tuple[Dot | None, ...]
    is_headline: bool = False


def format_number(x: float | None) -> str:
    """Three decimals below 10, two below 100, one above; an en dash for a number that is undefined."""
    if x is None:
        return "–"
    if not math.isfinite(x):
        return "∞" if x > 0 else "−∞" if x < 0 else "nan"
    decimals = 3 if abs(x) < 10 else 2 if abs(x) < 100 else 1
    text = f"{x:.{decimals}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def format_signed(x: float) -> str:
    """A difference: as format_number, with its sign."""
    return f"+{format_number(x)}" if x > 0 else format_number(x)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, in steps of 1, 2 or 5 times a power of ten."""
    if not high - low > 1e-9 * max(1.0, abs(low), abs(high)):  # one value, or as good as one
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def panels(lines: Sequence[Line]) -> list[list[Line]]:
    """Split lines so that a shared axis can be read: shares in [0, 1] together, others by order of magnitude.

    Panels and the lines inside them keep the order in which they came.
    """
    grouped: dict[int | None, list[Line]] = {}
    for line in lines:
        largest = max((abs(x) for dot in line.dots if dot for x in dot.level), default=0.0)
        magnitude = None if _is_share([line]) else math.ceil(math.log10(max(largest, 1e-9)))
        grouped.setdefault(magnitude, []).append(line)
    return list(grouped.values())


def _is_share(lines: Sequence[Line]) -> bool:
    return all(0.0 <= x <= 1.0 for line in lines for dot in line.dots if dot for x in dot.level)


def dot_plot(lines: Sequence[Line], series: Sequence[str], title: str) -> str:
    """A dot per metric and model on a shared axis: thick line = interval, thin line = bounds that failures allow.

    One SVG element; with one model the numbers stand at the right. Raises ValueError if a line has not one dot per model.
    """
    for line in lines:
        if len(line.dots) != len(series):
            raise ValueError(f"the line {line.name!r} has {len(line.dots)} dots, expected {len(series)} (one per model)")
    numbers = [x for line in lines for dot in line.dots if dot for x in dot.numbers]
    marks = ticks(min([0.0, *numbers]), max([1.0, *numbers]), about=6) if _is_share(lines) else ticks(min(numbers), max(numbers))
    is_single = len(series) == 1
    left, right = LABEL_WIDTH, WIDTH - (VALUE_WIDTH if is_single else 16)
    line_height = LINE_HEIGHT if is_single else LANE_HEIGHT * len(series) + 12
    top = 8
    bottom = top + line_height * len(lines)

    def x_of(value: float) -> float:
        return left + (right - left) * (value - marks[0]) / (marks[-1] - marks[0])

    body = []
    for mark in marks:
        x = x_of(mark)
        body.append(f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_tick_text(mark)}</text>')
    for position, line in enumerate(lines):
        middle = top + line_height * (position + 0.5)
        weight = " strong" if line.is_headline else ""
        body.append(
            f'<text class="label{weight}" x="{left - 14}" y="{middle + 4:.1f}" text-anchor="end">'
            f"{escape(_shorten(line.name, 30))}<title>{escape(line.name)}</title></text>"
        )
        for lane, dot in enumerate(line.dots):
            y = middle + (lane - (len(series) - 1) / 2) * LANE_HEIGHT
            if dot is None:
                continue
            if not is_single:
                description = f"{series[lane]}: {line.name} {_describe(dot)}"
            else:
                description = f"{line.name} {_describe(dot)}"
            body.append(f'<g class="series-{lane % SERIES_STYLES}"><title>{escape(description)}</title>')
            body.extend(_draw(dot, lane, x_of, y, left))
            body.append("</g>")
            if is_single:
                body.append(
                    f'<text class="value{weight}" x="{WIDTH - 4}" y="{middle + 4:.1f}" text-anchor="end">{format_number(dot.value)}</text>'
                )
    return _svg(bottom + 28, title, body)


def outcome_bar(parts: Sequence[tuple[str, str, int]], title: str) -> str:
    """One bar split by counts: `parts` are (class name, label, count). Empty parts take no room."""
    total = sum(count for _, _, count in parts)
    body, x = [], 0.0
    for name, label, count in parts:
        if count == 0:
            continue
        width = WIDTH * count / total
        share = f"{label}: {count} of {total}"
        body.append(
            f'<rect class="{escape(name)}" x="{x:.1f}" y="0" width="{max(width - 2, 1):.1f}" height="14" rx="2">'
            f"<title>{escape(share)}</title></rect>"
        )
        x += width
    return _svg(14, title, body)


def series_key(index: int) -> str:
    """The mark of one model, for a legend in the page."""
    mark = _marker(index, 8.0, 8.0)
    return f'<svg class="key series-{index % SERIES_STYLES}" viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">{mark}</svg>'


def _svg(height: float, title: str, body: Sequence[str]) -> str:
    opening = f'<svg class="figure" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return "\n".join([opening, *body, "</svg>"])


def _draw(dot: Dot, lane: int, x_of: Callable[[float], float], y: float, left: float) -> Iterator[str]:
    if dot.bounds and all(map(math.isfinite, dot.bounds)):
        low, high = (x_of(bound) for bound in dot.bounds)
        yield f'<line class="bounds" x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}"/>'
        for x in (low, high):
            yield f'<line class="bounds-end" x1="{x:.1f}" y1="{y - 4:.1f}" x2="{x:.1f}" y2="{y + 4:.1f}"/>'
    if dot.value is None or not math.isfinite(dot.value):
        yield f'<text class="undefined" x="{left + 6:.1f}" y="{y + 4:.1f}">undefined</text>'
        return
    if dot.interval and all(map(math.isfinite, dot.interval)):
        low, high = (x_of(end) for end in dot.interval)
        yield f'<line class="interval" x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}"/>'
    yield _marker(lane, x_of(dot.value), y)


def _marker(index: int, x: float, y: float) -> str:
    """Circle, diamond, square, triangle: models differ in form as well as in colour, so grey prints can be read."""
    if index % len(CORNERS) == 0:
        return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in CORNERS[index % len(CORNERS)])
    return f'<polygon class="dot" points="{points}"/>'


def _describe(dot: Dot) -> str:
    text = "undefined" if dot.value is None else format_number(dot.value)
    if dot.interval:
        text += f" [{format_number(dot.interval[0])}, {format_number(dot.interval[1])}]"
    if dot.bounds:
        text += f", between {format_number(dot.bounds[0])} and {format_number(dot.bounds[1])} whatever the failures hide"
    return text


def _tick_text(mark: float) -> str:
    return f"{mark:g}".replace("-", "−")


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
