"""The suite quality: DrawBench's prompts or any file's, the scorers asked for, their means, and a slice with all of them end to end."""

from __future__ import annotations

import pytest
from helpers.every_scorer import Cases
from helpers.suites import add_data, needs, row, run_suite
from hypothesis import given, settings
from hypothesis import strategies as st
from mmalign.evaluators import quality

from mmalign import config, registry, results
from mmalign.types import MmalignError, Prompt, Request, Row, Sample, UsageError, Value

DRAWBENCH = {"drawbench": "drawbench/diffusionnft_test.txt"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "home"))


@needs("drawbench")
def test_the_drawbench_prompts():
    from helpers.suites import SHARED

    add_data(DRAWBENCH)
    prompts = quality.Evaluator().prompts()
    unique = (SHARED / "drawbench" / "drawbench_200_unique.txt").read_text().splitlines()
    assert [prompt.text for prompt in prompts] == [line.strip() for line in unique] and len(prompts) == 200
    assert prompts[0].id == "00000" and prompts[-1].id == "00199" and not any(prompt.tags for prompt in prompts)
    card = registry.card(registry.find("evaluators", "quality"))
    assert card.prompts * card.images_per_prompt == 1000
    with pytest.raises(UsageError, match="one split"):
        quality.Evaluator().prompts("train")


def test_any_file_of_prompts(tmp_path):
    (tmp_path / "sheet.csv").write_text('Prompts,Category\n"A red car, parked",Colors\nTwo dogs,Counting\nTwo dogs,Counting\n')
    (tmp_path / "list.txt").write_text("A red car, parked\n\n  Two dogs \n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "A red car, parked"}\n{"prompt": "Two dogs", "category": null}\n')
    sheet = quality.Evaluator(data=str(tmp_path / "sheet.csv")).prompts()
    assert [(prompt.text, prompt.tags) for prompt in sheet] == [("A red car, parked", ("Colors",)), ("Two dogs", ("Counting",))]
    for name in ("list.txt", "rows.jsonl"):
        prompts = quality.Evaluator(data=str(tmp_path / name)).prompts()
        assert [(prompt.id, prompt.text, prompt.tags) for prompt in prompts] == [(one.id, one.text, ()) for one in sheet]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(MmalignError, match="row 2: there is no prompt"):
        quality.Evaluator(data=str(tmp_path / "rows.jsonl")).prompts()
    for wrong, words in (("absent.txt", "there is no such file"), ("x.docx", "is of no form")):
        (tmp_path / "x.docx").write_text("a")
        with pytest.raises(UsageError, match=words):
            quality.Evaluator(data=str(tmp_path / wrong)).prompts()


def test_scorers_are_asked_for_by_name():
    made = config.build(quality.Evaluator, {"scorers": "HPSv2, ocr,hpsv2"}, "quality")
    assert made.scorers == ("hpsv2", "ocr") and made.headline == "hpsv2"
    every = config.build(quality.Evaluator, {"scorers": "all"}, "quality").scorers
    assert every == quality.EVERY and set(every) <= set(registry.entries("scorers"))
    assert registry.card(registry.find("evaluators", "quality")).headline == quality.Evaluator().headline == "pickscore"
    with pytest.raises(UsageError, match="scorers names none"):
        config.build(quality.Evaluator, {"scorers": ()}, "quality")


def scored(values: dict[str, Value], prompt: str = "p", index: int = 0) -> Row:
    request = Request(Prompt(prompt, "t"), index, index)
    return Row(request, Sample(request), values)


def test_means_of_scorers_and_of_their_ratings():
    evaluator = quality.Evaluator(("unipercept", "pickscore"))
    ratings = [{"aesthetics": 10.0, "quality": 20.0, "structure": 60.0}, {"aesthetics": 20.0, "quality": 20.0, "structure": 20.0}]
    rows = [
        scored({"unipercept": Value(sum(one.values()) / 3, one), "pickscore": Value(0.2 + at, {"other": 1.0})}, str(at))
        for at, one in enumerate(ratings)
    ]
    expected = {"unipercept": 25.0, "unipercept_aesthetics": 15.0, "unipercept_quality": 20.0, "unipercept_structure": 40.0}
    assert evaluator.aggregate(rows) == pytest.approx({**expected, "pickscore": 0.7})
    assert evaluator.aggregate([]) == {"unipercept": None, "pickscore": None}


@settings(deadline=None, max_examples=50)
@given(drawn=st.lists(st.floats(-20, 30), min_size=1, max_size=20), draw=st.data(), times=st.integers(2, 3))
def test_order_and_copies_do_not_matter(drawn, draw, times):
    evaluator = quality.Evaluator(("hpsv3",))
    rows = [row("hpsv3", x, (), str(at)) for at, x in enumerate(drawn)]
    found = evaluator.aggregate(rows)
    for other in (draw.draw(st.permutations(rows)), rows * times):
        assert evaluator.aggregate(other) == pytest.approx(found, abs=1e-9)


@needs("drawbench")
def test_a_slice_with_every_scorer_from_end_to_end(tmp_path):
    add_data(DRAWBENCH)
    with Cases(tmp_path / "weights") as cases:
        sets = {f"{name}.{option}": value for name in quality.EVERY for option, value in cases[name].options.items()}
        result = run_suite(
            tmp_path / "r", "quality", {"quality.scorers": "all", **sets}, 2, "--images-per-prompt", "1", "--executor", "inline"
        )
    assert result.counts.scored == 2 and result.headline == "pickscore" and tuple(result.scorers) == quality.EVERY
    assert all(result.metrics[name].value is not None for name in (*quality.EVERY, "unipercept_structure"))
    told = {one.field for one in result.deviations}
    assert {"limit", "images_per_prompt", "hpsv2.weights", "pickscore.model", "aesthetic.head"} <= told
    assert not {"quality.scorers", "prompts"} & told, "asking for scorers is no deviation"
    assert "hpsv3.base=" in results.paste_line(result)


@needs("drawbench")
def test_another_file_and_another_headline_are_named(tmp_path):
    (tmp_path / "mine.txt").write_text("a red car\ntwo dogs\n")
    sets = {"quality.scorers": "jpeg_size", "quality.data": tmp_path / "mine.txt"}
    result = run_suite(tmp_path / "r", "quality", sets, 2, "--images-per-prompt", "1", "--executor", "inline")
    told = {one.field: one for one in result.deviations}
    assert result.headline == "jpeg_size" and result.status == "complete"
    assert told["prompts"].used == "2" and told["quality.data"].used.endswith("mine.txt") and "limit" not in told
