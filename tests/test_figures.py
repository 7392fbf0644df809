"""Figures: marks stand where the numbers say, text is escaped, axes are round."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.figures import Dot, Line, dot_plot, format_number, format_signed, outcome_bar, panels, series_key, ticks


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_a_dot_stands_at_its_value_between_the_ticks() -> None:
    figure = parse(dot_plot([Line("accuracy", (Dot(0.5, (0.25, 0.75)),))], ["model"], "title"))
    ticks_x = [float(line.get("x1", "nan")) for line in figure.iter("line") if line.get("class") == "grid"]
    circle = next(figure.iter("circle"))
    band = next(line for line in figure.iter("line") if line.get("class") == "interval")
    span = ticks_x[-1] - ticks_x[0]
    assert float(circle.get("cx", "nan")) == pytest.approx(ticks_x[0] + span / 2, abs=0.1)
    assert float(band.get("x1", "nan")) == pytest.approx(ticks_x[0] + span / 4, abs=0.1)
    assert float(band.get("x2", "nan")) == pytest.approx(ticks_x[0] + span * 3 / 4, abs=0.1)


def test_text_is_escaped_and_the_figure_is_well_formed() -> None:
    name = "<script>alert(1)</script> \"a\" & 'b'"
    svg = dot_plot([Line(name, (Dot(0.1), Dot(0.2)))], [name, "other"], name) + outcome_bar([("tie", name, 3)], name)
    assert "<script" not in svg
    figure = parse(f"<div>{svg}</div>")
    assert figure[0].get("aria-label") == name


def test_an_undefined_value_is_a_word_and_never_a_mark() -> None:
    figure = parse(dot_plot([Line("empty group", (Dot(None),)), Line("other", (None,))], ["model"], "title"))
    assert not list(figure.iter("circle"))
    assert [text.text for text in figure.iter("text") if text.get("class") == "undefined"] == ["undefined"]


def test_bounds_are_drawn_when_given() -> None:
    with_bounds = dot_plot([Line("a", (Dot(0.5, (0.4, 0.6), (0.1, 0.9)),))], ["model"], "title")
    assert with_bounds.count('class="bounds"') == 1 and "between 0.100 and 0.900" in with_bounds
    assert 'class="bounds"' not in dot_plot([Line("a", (Dot(0.5, (0.4, 0.6)),))], ["model"], "title")


def test_models_differ_in_form_and_a_line_needs_a_dot_for_each() -> None:
    assert len({series_key(index).split(">", 1)[1] for index in range(4)}) == 4
    with pytest.raises(ValueError, match="has 1 dots, expected 2"):
        dot_plot([Line("a", (Dot(0.5),))], ["one", "two"], "title")


def test_metrics_of_other_scales_get_a_panel_of_their_own() -> None:
    lines = [Line("accuracy", (Dot(0.5),)), Line("clip", (Dot(31.0),)), Line("strict", (Dot(0.2),)), Line("fid", (Dot(22.0),))]
    assert [[line.name for line in panel] for panel in panels(lines)] == [["accuracy", "strict"], ["clip", "fid"]]


def test_an_interval_beyond_its_range_stays_in_the_panel_and_on_the_axis() -> None:
    lines = [Line("overall", (Dot(0.5, (0.4, 0.6)),)), Line("few prompts", (Dot(0.95, (0.7, 1.2)),))]
    assert len(panels(lines)) == 1
    figure = parse(dot_plot(lines, ["model"], "title"))
    assert [text.text for text in figure.iter("text") if text.get("class") == "tick"] == ["0", "0.2", "0.4", "0.6", "0.8", "1", "1.2"]
    right = max(float(line.get("x1", "nan")) for line in figure.iter("line") if line.get("class") == "grid")
    assert all(float(line.get("x2", "nan")) <= right + 0.1 for line in figure.iter("line") if line.get("class") == "interval")


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_ticks_cover_the_range_evenly_and_are_few(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    marks = ticks(low, high)
    steps = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert marks[0] <= low + slack and marks[-1] >= high - slack
    assert 1 <= len(steps) <= 8
    assert max(steps) - min(steps) <= slack


def test_outcome_bar_shares_the_width_by_counts() -> None:
    rectangles = list(parse(outcome_bar([("a", "wins", 3), ("tie", "equal", 0), ("b", "losses", 1)], "title")).iter("rect"))
    widths = [float(rectangle.get("width", "nan")) + 2 for rectangle in rectangles]
    assert [rectangle.get("class") for rectangle in rectangles] == ["a", "b"]
    assert widths[0] == pytest.approx(3 * widths[1], abs=0.5)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.8421, "0.842"), (-0.0314, "−0.031"), (-0.0001, "0.000"), (31.456, "31.46"), (1234.56, "1234.6"), (None, "–"), (float("inf"), "∞")],
)
def test_numbers_are_written_to_a_sensible_precision(number: float | None, text: str) -> None:
    assert format_number(number) == text


def test_differences_carry_their_sign() -> None:
    assert [format_signed(x) for x in (0.1, -0.1, 0.0)] == ["+0.100", "−0.100", "0.000"]
