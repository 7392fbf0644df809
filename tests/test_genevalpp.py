"""GenEval++: the official prompts and checklist, verdicts, the mean of tasks, and a slice from end to end."""

import json
import re
from collections import Counter

import pytest
from helpers.replay import said, serving, text_of
from helpers.suites import add_data, needs, official, oracle, row, run_suite, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from mmalign.evaluators.genevalpp import TASKS, Evaluator

from mmalign import data
from mmalign.scorers import genevalpp
from mmalign.types import MmalignError, Prompt, UsageError

FILE = "test_scripts/Eval-gpt-4.1-geneval++.py"
META = {
    "tag": "size_spatial_attr",
    "include": [
        {"class": "drum", "count": 1, "size": "larger", "region": "left", "color": "red"},
        {"class": "glass", "count": 3},
    ],
    "exclude": [{"class": "glass", "count": 4}],
    "prompt": "a drum and glasses",
}
PROMPT = Prompt("1", "a drum and glasses", ("size_spatial_attr",), META)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "data"))


@pytest.fixture
def question(tmp_path):
    (tmp_path / "q.txt").write_text("{prompt}?\n{checklist}")
    return str(tmp_path / "q.txt")


def test_the_checklist_has_a_line_for_every_clause():
    assert genevalpp.checklist(META).splitlines() == [
        "This image should contain:",
        "- red-colored larger 1 drum located in the left part of the image.",
        "- 3 glasss present in the image.",
        "- No more than 3 glasss should appear.",
    ]


@pytest.mark.parametrize(
    ("reply", "fixed", "upstream"),
    [
        ('{"correct": 1, "reason": "all there"}', 1.0, 1.0),
        ('```json\n{"correct": 0, "reason": "no {drum}"}\n```', 0.0, 0.0),
        ('I looked closely. {"correct": 1, "reason": ""} Done.', 1.0, 1.0),
        ('{"correct": 1, "reason": "the drum stands', 1.0, 0.0),
        ('{"correct": "1"}', 1.0, 0.0),
        ('{"correct": true}', 1.0, 1.0),
        ('{"correct": 2}', None, 0.0),
        ('{"reason": "fine"}', None, 0.0),
        ("It is correct.", None, 0.0),
    ],
)
def test_verdicts(reply, fixed, upstream):
    assert genevalpp.verdict(reply, "upstream") == upstream
    if fixed is None:
        with pytest.raises(ValueError, match="no verdict"):
            genevalpp.verdict(reply)
    else:
        assert genevalpp.verdict(reply) == fixed


def test_the_request_is_the_official_one_and_holes_are_holes(question):
    answers = iter(['{"correct": 1, "reason": "x', "nothing", "nothing", "nothing"])
    with serving(lambda body, number: said(next(answers))) as server:
        scorer = genevalpp.load(genevalpp.Config(base_url=server.url, question=question, concurrency=1, pause=0.01))
        assert scorer.score([sample(PROMPT)])[0].x == 1.0
        (hole,) = scorer.score([sample(PROMPT)])
        assert hole.kind == "parse" and "nothing" in hole.message
        (missing,) = scorer.score([sample(Prompt("2", "a drum"))])
        assert missing.kind == "missing" and "GenEval++ metadata" in missing.message
    body = server.requests[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("gpt-4.1", 200, 0.0)
    text, image = body["messages"][-1]["content"]
    assert text["text"].startswith("a drum and glasses?\nThis image") and image["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_upstream_counts_an_unreadable_reply_as_wrong(question):
    with serving(lambda body, number: said("nothing")) as server:
        scorer = genevalpp.load(genevalpp.Config(base_url=server.url, question=question, compat="upstream"))
        assert scorer.score([sample(PROMPT)])[0].x == 0.0
    assert len(server.requests) == 1


CLAUSES = st.fixed_dictionaries(
    {"class": st.sampled_from(["cup", "glass", "traffic light"]), "count": st.integers(1, 5)},
    optional={
        "color": st.sampled_from(["red", "blue"]),
        "size": st.sampled_from(["larger", "smaller"]),
        "region": st.sampled_from(["left", "above"]),
    },
)
PIECES = ['{"correct"', ": ", "1", "0", '"1"', "true", ', "reason": "x"', "}", "{", "```json\n", "\n```", " ok "]


def test_agrees_with_the_official_functions_on_random_input():
    path = oracle("echo4o", FILE) / FILE
    explain, extract = official(path, "metadata_to_explanation", "extract_json_from_response", re=re, json=json)

    @settings(max_examples=1000, deadline=None)
    @given(include=st.lists(CLAUSES, min_size=1, max_size=4), exclude=st.lists(CLAUSES, max_size=2))
    def same_checklists(include, exclude):
        assert genevalpp.checklist({"include": include, "exclude": exclude}) == explain({"include": include, "exclude": exclude})

    @settings(max_examples=1000, deadline=None)
    @given(text=st.lists(st.sampled_from(PIECES), max_size=10).map("".join))
    def same_verdicts(text):
        try:
            right = float(extract(text).get("correct", 0) == 1)
        except ValueError:
            right = 0.0
        assert genevalpp.verdict(text, "upstream") == right

    same_checklists()
    same_verdicts()


def test_the_official_wording_reaches_the_judge():
    folder = oracle("echo4o", FILE)
    data.add("genevalpp-judge", folder / FILE)
    with serving(lambda body, number: said('{"correct": 1}')) as server:
        genevalpp.load(genevalpp.Config(base_url=server.url)).score([sample(PROMPT)])
    assert server.requests[0]["messages"][0]["content"] == official(folder / FILE, "SYSTEM_PROMPT")
    assert text_of(server.requests[0]) == f"Instruction:\n{PROMPT.text}\n\nExpectation checklist:\n{genevalpp.checklist(META)}"


# The suite.


@needs("geneval_plus_plus")
def test_the_official_prompts():
    add_data({"genevalpp": "geneval_plus_plus/Geneval++.jsonl"})
    prompts = Evaluator().prompts()
    assert Counter(prompt.tag for prompt in prompts) == dict.fromkeys(TASKS, 40)
    assert [prompt.id for prompt in prompts] == [str(number) for number in range(1, 281)]
    from helpers.suites import SHARED

    assert [prompt.text for prompt in prompts] == data.load_lines(SHARED / "geneval_plus_plus" / "Geneval++.txt")
    assert {prompt.tag for prompt in prompts if prompt.meta.get("exclude")} == {"counting"}
    assert all(genevalpp.checklist(prompt.meta).count("\n") >= 1 for prompt in prompts)
    with pytest.raises(UsageError, match="one split"):
        Evaluator().prompts("train")


def test_a_file_of_other_prompts_is_refused(monkeypatch, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"tag": "taste", "include": [1], "prompt": "x"}\n')
    monkeypatch.setattr(data, "data_path", lambda name: tmp_path / "x.jsonl")
    with pytest.raises(MmalignError, match="line 1: expected a tag of GenEval"):
        Evaluator().prompts()


def test_overall_is_the_mean_of_tasks_and_rounds_on_request():
    rows = [row("genevalpp", float(n == 0), (TASKS[0],), str(n)) for n in range(3)] + [row("genevalpp", 1.0, (TASKS[6],), "x")]
    found = Evaluator().aggregate(rows)
    assert found["overall"] == pytest.approx(2 / 3) and found["images"] == 0.5 and found["color_count_attr"] is None
    assert Evaluator(is_rounded=True).aggregate(rows)["overall"] == round((0.3333 + 1) / 2, 4)
    assert set(Evaluator().aggregate([]).values()) == {None}


@settings(deadline=None)
@given(drawn=st.lists(st.tuples(st.sampled_from(TASKS), st.booleans()), min_size=1, max_size=30), draw=st.data(), times=st.integers(2, 3))
def test_order_and_copies_do_not_matter(drawn, draw, times):
    rows = [row("genevalpp", float(right), (task,), str(n)) for n, (task, right) in enumerate(drawn)]
    found = Evaluator().aggregate(rows)
    for other in (draw.draw(st.permutations(rows)), rows * times):
        assert Evaluator().aggregate(other) == pytest.approx(found, abs=1e-12)


@needs("geneval_plus_plus")
def test_a_slice_from_end_to_end(tmp_path, question):
    add_data({"genevalpp": "geneval_plus_plus/Geneval++.jsonl"})
    with serving(lambda body, number: said(json.dumps({"correct": int("No more than" in text_of(body)), "reason": ""}))) as server:
        result = run_suite(tmp_path / "r", "genevalpp", {"genevalpp.base_url": server.url, "genevalpp.question": question}, 7)
    assert result.counts.scored == 7 and result.metrics["counting"].value == 1.0
    assert result.metrics["overall"].value == pytest.approx(1 / 7)
