"""Intervals: closed forms, agreement of methods, coverage, clustering, bounds."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign import stats
from mmalign.types import Failure, Prompt, Request, Row, Sample, Value


def row(prompt: str, index: int, x: float | None, tag: str = "", parts: dict[str, float] | None = None) -> Row:
    request = Request(Prompt(prompt, prompt, (tag,)), index, seed=index)
    score = Failure("score", "parse", "no number") if x is None else Value(x, parts or {})
    return Row(request, Sample(request, answer="a"), {"s": score})


def mean(rows: Sequence[Row]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(one.value("s").x for one in rows) if rows else None}


def mean_of_tags(rows: Sequence[Row]) -> dict[str, float | None]:
    tags = sorted({one.tag for one in rows})
    return {"overall": statistics.fmean(statistics.fmean(one.value("s").x for one in rows if one.tag == tag) for tag in tags)}


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
@settings(max_examples=50, deadline=None)
def test_standard_error_of_a_mean_is_the_closed_form(values: list[float]) -> None:
    rows = [row(f"p{n}", 0, x) for n, x in enumerate(values)]
    found = stats.jackknife(rows, mean)["mean"]
    assert found.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_standard_error_of_a_mean_of_tags_sums_the_tags() -> None:
    generator = random.Random(1)
    tags = {"a": [generator.random() for _ in range(7)], "b": [generator.gauss(2, 3) for _ in range(12)]}
    rows = [row(f"{tag}{n}", 0, x, tag) for tag, values in tags.items() for n, x in enumerate(values)]
    found = stats.jackknife(rows, mean_of_tags)["overall"]
    assert found.value == pytest.approx(statistics.fmean(statistics.fmean(values) for values in tags.values()))
    assert found.stderr == pytest.approx(0.5 * math.sqrt(sum(statistics.variance(values) / len(values) for values in tags.values())))


def test_clusters_with_several_images_use_the_spread_of_prompt_means() -> None:
    generator = random.Random(2)
    means = [generator.random() for _ in range(20)]
    rows = [row(f"p{n}", index, m + shift) for n, m in enumerate(means) for index, shift in enumerate((-0.3, -0.1, 0.1, 0.3))]
    assert stats.jackknife(rows, mean)["mean"].stderr == pytest.approx(statistics.stdev(means) / math.sqrt(20))


def test_copies_of_an_image_do_not_shrink_the_interval() -> None:
    generator = random.Random(3)
    values = [generator.random() for _ in range(25)]
    once = stats.metrics([row(f"p{n}", 0, x) for n, x in enumerate(values)], mean)["mean"]
    four = stats.metrics([row(f"p{n}", index, x) for n, x in enumerate(values) for index in range(4)], mean)["mean"]
    assert four.stderr == pytest.approx(once.stderr)
    assert four.ci == pytest.approx(once.ci)
    assert (once.n, four.n, four.prompts) == (25, 100, 25)


def test_order_of_rows_does_not_matter() -> None:
    generator = random.Random(4)
    rows = [row(f"p{n}", index, generator.random(), "ab"[n % 2]) for n in range(30) for index in range(2)]
    shuffled = generator.sample(rows, len(rows))
    first, second = stats.metrics(rows, mean_of_tags)["overall"], stats.metrics(shuffled, mean_of_tags)["overall"]
    assert first.stderr == pytest.approx(second.stderr, rel=1e-12)


def test_groups_of_prompts_agree_with_single_prompts() -> None:
    generator = random.Random(5)
    values = [generator.random() for _ in range(2000)]
    found = stats.jackknife([row(f"p{n}", 0, x, "ab"[n % 2]) for n, x in enumerate(values)], mean)["mean"]
    assert found.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(2000), rel=0.1)


def test_bootstrap_agrees_with_the_jackknife_on_a_mean() -> None:
    generator = random.Random(6)
    rows = [row(f"p{n}", index, generator.random(), "ab"[n % 2]) for n in range(60) for index in range(2)]
    jackknifed, resampled = stats.jackknife(rows, mean_of_tags)["overall"], stats.cluster_bootstrap(rows, mean_of_tags)["overall"]
    assert resampled.stderr == pytest.approx(jackknifed.stderr, rel=0.1)
    assert resampled == stats.cluster_bootstrap(rows, mean_of_tags)["overall"]  # seeded
    assert resampled != stats.cluster_bootstrap(rows, mean_of_tags, seed=1)["overall"]


def test_bootstrap_counts_a_prompt_drawn_twice_as_two_prompts() -> None:
    def prompts(rows: Sequence[Row]) -> dict[str, float | None]:
        return {"prompts": float(len({one.request.prompt.id for one in rows}))}

    found = stats.cluster_bootstrap([row(f"p{n}", 0, 0.0) for n in range(10)], prompts, resamples=50)["prompts"]
    assert found.ci == (10.0, 10.0)


def test_a_metric_that_is_not_linear_gets_a_bootstrap_interval() -> None:
    generator = random.Random(7)
    rows = [row(f"p{n}", 0, generator.gauss(0, 1)) for n in range(40)]

    def aggregate(some: Sequence[Row]) -> dict[str, float | None]:
        values = [one.value("s").x for one in some]
        return {"mean": statistics.fmean(values), "square": statistics.fmean(values) ** 2 * 1e3, "median": statistics.median(values)}

    found = stats.metrics(rows, aggregate, bootstrap=("median",))
    assert {name: metric.method for name, metric in found.items()} == {"mean": "clustered", "square": "bootstrap", "median": "bootstrap"}
    low, high = found["median"].ci
    assert low <= found["median"].value <= high


@pytest.mark.parametrize("truth", [0.5, 0.85])
def test_intervals_cover_the_truth_as_often_as_they_say(truth: float) -> None:
    generator = random.Random(8)
    trials, covered = 400, 0
    for _ in range(trials):
        rows = []
        for n in range(40):
            chance = min(1.0, max(0.0, generator.gauss(truth, 0.1)))  # four images of a prompt share its difficulty
            rows += [row(f"p{n}", index, float(generator.random() < chance), "ab"[n % 2]) for index in range(4)]
        low, high = stats.jackknife(rows, mean)["mean"].ci
        covered += low <= truth <= high
    assert 0.92 <= covered / trials <= 0.98


def test_treating_images_as_independent_would_not_cover() -> None:
    generator = random.Random(9)
    trials, covered = 300, 0
    for _ in range(trials):
        values = [x for _ in range(30) for x in [generator.gauss(0, 1)] * 4]
        half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
        covered += abs(statistics.fmean(values)) <= half
    assert covered / trials < 0.8


def test_undefined_is_none_and_never_a_number() -> None:
    one = stats.metrics([row("p", index, 0.5) for index in range(4)], mean)["mean"]
    assert (one.value, one.stderr, one.ci) == (0.5, None, None)

    def groups(rows: Sequence[Row]) -> dict[str, float | None]:
        lonely = [one.value("s").x for one in rows if one.tag == "lonely"]
        return {"lonely": statistics.fmean(lonely) if lonely else None, "absent": None}

    found = stats.metrics([row(f"p{n}", 0, n, "crowd") for n in range(5)] + [row("q", 0, 1.0, "lonely")], groups)
    assert found["lonely"].value == 1.0 and found["lonely"].stderr is None
    assert found["absent"].value is None and found["absent"].ci is None


def test_paired_difference_uses_shared_rows_and_beats_the_unpaired_error() -> None:
    generator = random.Random(10)
    difficulty = {f"p{n}": generator.gauss(0, 1) for n in range(50)}
    a = [row(prompt, index, d + 0.2 + generator.gauss(0, 0.1)) for prompt, d in difficulty.items() for index in range(2)]
    b = [row(prompt, index, d + generator.gauss(0, 0.1)) for prompt, d in difficulty.items() for index in range(2)]
    b[0] = row("p0", 0, None)
    found = stats.paired_difference(a + [row("only in a", 0, 99.0)], b, mean, "mean")
    assert (found.pairs, found.prompts) == (99, 50)
    assert found.value == pytest.approx(0.2, abs=0.05) and found.is_significant
    assert found.stderr < stats.jackknife(a, mean)["mean"].stderr / 5
    assert found.detectable == pytest.approx(2.8016 * found.stderr, rel=1e-4)
    same = stats.paired_difference(a, a, mean, "mean")
    assert (same.value, same.stderr) == (0.0, 0.0)
    assert stats.paired_difference(a, [], mean, "mean").value is None


def test_paired_difference_is_antisymmetric() -> None:
    generator = random.Random(11)
    a, b = ([row(f"p{n}", 0, generator.random(), "ab"[n % 2]) for n in range(20)] for _ in range(2))
    there, back = stats.paired_difference(a, b, mean_of_tags, "overall"), stats.paired_difference(b, a, mean_of_tags, "overall")
    assert there.value == pytest.approx(-back.value)
    assert there.ci == pytest.approx((-back.ci[1], -back.ci[0]))


@pytest.mark.parametrize(("freedom", "critical"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (10, 2.22814), (30, 2.04227), (1000, 1.96234)])
def test_student_t(freedom: int, critical: float) -> None:
    assert stats.student_t(0.95, freedom) == pytest.approx(critical, abs=1e-4)


@given(st.lists(st.none() | st.floats(0, 1), min_size=2, max_size=12).filter(lambda xs: any(x is not None for x in xs)), st.data())
@settings(max_examples=50, deadline=None)
def test_bounds_hold_whatever_the_failed_rows_would_have_been(values: list[float | None], data: st.DataObject) -> None:
    rows = [row(f"p{n}", 0, x, "ab"[n % 2]) for n, x in enumerate(values)]
    truth = [row(f"p{n}", 0, data.draw(st.floats(0, 1)) if x is None else x, "ab"[n % 2]) for n, x in enumerate(values)]
    low, high = stats.bounds(rows, mean_of_tags, {"s": (0.0, 1.0)})["overall"]
    assert low - 1e-12 <= mean_of_tags(truth)["overall"] <= high + 1e-12


def test_bounds_fill_parts_and_are_absent_for_infinite_ranges() -> None:
    def strict(rows: Sequence[Row]) -> dict[str, float | None]:
        return {"strict": statistics.fmean(one.value("s").parts["strict"] for one in rows)}

    rows = [row("p0", 0, 0.7, parts={"strict": 1.0}), row("p0", 1, None), row("p1", 0, 0.2, parts={"strict": 0.0}), row("p1", 1, None)]
    assert stats.bounds(rows, strict, {"s": (0.0, 1.0)}) == {"strict": (0.25, 0.75)}
    assert stats.bounds(rows, strict, {"s": (0.0, math.inf)}) == {}
    assert stats.bounds([row("p0", 0, None)], strict, {"s": (0.0, 1.0)}) == {}


def test_bounds_of_a_failed_generation_fill_every_scorer() -> None:
    hole = row("p1", 0, None)
    rows = [row("p0", 0, 1.0), Row(hole.request, Failure("generate", "oom", "too large"), {})]
    assert stats.bounds(rows, mean, {"s": (0.0, 1.0)}) == {"mean": (0.5, 1.0)}
