"""WISE in both protocols: the files, what replies say, the weighted means, and a slice of each from end to end."""

import json
import re
from collections import Counter

import pytest
from helpers.replay import said, serving, text_of
from helpers.suites import add_data, needs, official, oracle, row, run_suite, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from mmalign.evaluators import wise as suite
from mmalign.evaluators import wise_verified as verified_suite

from mmalign.scorers import _official, wise, wise_verified
from mmalign.types import Failure, MmalignError, Prompt, UsageError, Value

NAMES = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
LEGACY = {name: f"wise/legacy/{file}.json" for name, file in zip(suite.FILES, NAMES, strict=True)}
REWRITTEN = {f"{name}-rewritten": f"wise/legacy/{file}_rewrite.json" for name, file in zip(suite.FILES, NAMES, strict=True)}
VERIFIED = {name: f"wise/verified/{file}_verified.json" for name, file in zip(verified_suite.FILES, NAMES, strict=True)}
GOOD = "Consistency: 2\nRealism: 1\nAesthetic Quality: 0"
PROMPT = Prompt("12", "the tool a beekeeper uses", ("culture",), {"explanation": "a smoker"})


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "data"))


@pytest.fixture
def question(tmp_path):
    path = tmp_path / "question.txt"
    path.write_text("Rate {prompt}, that is {explanation}.")
    return str(path)


# What replies say.


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_golden_replies(compat):
    read = wise.ratings_of
    assert read("Consistency 1/2, Realism 2", compat) == {"consistency": 1.0, "realism": 2.0}
    with pytest.raises(ValueError, match="no aesthetic quality"):
        wise.whole(read("Consistency 1/2, Realism 2", compat))
    assert list(read("2\n1\n0", compat).values()) == [2.0, 1.0, 0.0]
    assert read(GOOD, compat) == {"consistency": 2.0, "realism": 1.0, "aesthetic_quality": 0.0}
    assert wise_verified.score_of("score 1.", compat) == 1.0
    assert wise_verified.score_of("<think>Score: 0</think>\nScore: 1", compat) == 1.0
    for unclear in ("Score: 10", "0\n1", "", "very good"):
        with pytest.raises(ValueError, match="no score"):
            wise_verified.score_of(unclear, compat)


def test_what_the_official_parser_cannot_read_and_ours_can():
    marked = "**Consistency:** 2\n**Realism：** 1\n*Aesthetic Quality (0-2)*: 0"
    assert wise.ratings_of(marked) == {"consistency": 2.0, "realism": 1.0, "aesthetic_quality": 0.0}
    assert set(wise.ratings_of("**Realism:** 1", "upstream")) == set()
    assert wise.ratings_of("Consistency: 25", "upstream") == {"consistency": 2.0}  # one digit is read
    for wrong in ("Consistency: 25", "Realism: 3", "Realism: 1.5"):
        with pytest.raises(ValueError, match="not 0, 1 or 2"):
            wise.ratings_of(wrong)
    assert wise_verified.score_of("**Score:** 0") == 0.0
    with pytest.raises(ValueError):
        wise_verified.score_of("**Score:** 0", "upstream")


def test_the_wiscore_is_summed_in_the_official_order():
    assert wise.wiscore({"consistency": 2, "realism": 1, "aesthetic_quality": 0}) == 0.7999999999999999


PIECES = ["Consistency", "realism", "Aesthetic Quality", "**", "*", ":", "：", " ", "\n", "0", "1", "2", "7", "score", "Score", "."]
REPLIES = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)


def test_parsers_agree_with_the_official_ones_on_random_replies():
    folder = oracle("wise", "WISE_legacy/gpt_eval.py", "vllm_eval.py")

    legacy = official(folder / "WISE_legacy" / "gpt_eval.py", "extract_scores", re=re, Dict=dict)
    binary = official(folder / "vllm_eval.py", "extract_scores", re=re, Dict=dict)
    weigh = official(folder / "WISE_legacy" / "Calculate.py", "calculate_wiscore")

    @settings(max_examples=1000, deadline=None)
    @given(text=REPLIES)
    def agree(text):
        assert wise.ratings_of(text, "upstream") == legacy(text)
        try:
            mine = {"score": wise_verified.score_of(text, "upstream")}
        except ValueError:
            mine = {}
        assert mine == binary(text.strip())

    agree()
    for ratings in ((a, b, c) for a in range(3) for b in range(3) for c in range(3)):
        assert wise.wiscore(dict(zip(wise.RATINGS, ratings, strict=True))) == weigh(*ratings)


# The scorers, against a real local server.


def make(module, server, question, **options):
    return module.load(module.Config(base_url=server.url, question=question, pause=0.01, retries=1, **options))


def test_the_judge_sees_the_question_then_the_image_as_in_the_official_request(question):
    with serving(lambda body, number: said(GOOD)) as server:
        (value,) = make(wise, server, question).score([sample(PROMPT)])
    assert value.x == 0.7999999999999999 and value.parts == {"consistency": 1.0, "realism": 0.5, "aesthetic_quality": 0.0}
    assert "judge-2026-01-01" in value.detail and value.detail.endswith(GOOD[-20:])
    (body,) = server.requests
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt-4o-2024-05-13", 0.0, 2000)
    assert [part["type"] for part in body["messages"][-1]["content"]] == ["text", "image_url"]
    assert text_of(body) == "Rate the tool a beekeeper uses, that is a smoker."
    with serving(lambda body, number: said("Score: 1")) as server:
        (value,) = make(wise_verified, server, question).score([sample(PROMPT)])
    assert value.x == 1.0
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": False} and server.requests[0]["max_tokens"] == 500


def test_a_reply_that_cannot_be_read_is_asked_for_again_and_then_is_a_hole(question):
    with serving(lambda body, number: said(GOOD if number == 3 else "Consistency: 2")) as server:
        assert make(wise, server, question).score([sample(PROMPT)])[0].x == 0.7999999999999999
    with serving(lambda body, number: said("I'm sorry, I can't assist with that.")) as server:
        (hole,) = make(wise, server, question).score([sample(PROMPT)])
    assert (hole.kind, len(server.requests)) == ("refusal", 3) and "can't assist" in hole.message
    with serving(lambda body, number: said("nice", finish="length")) as server:
        (hole,) = make(wise, server, question, tries=1).score([sample(PROMPT)])
    assert (hole.kind, len(server.requests)) == ("parse", 1) and "cut at max_tokens" in hole.message


def test_order_is_kept_and_a_prompt_without_explanation_is_a_hole(question):
    def answer(body, number):
        return said("2\n2\n2" if "prompt 1" in text_of(body) else "0\n0\n0")

    prompts = [Prompt(str(n), f"prompt {n}", (), {"explanation": "x"} if n != 2 else {}) for n in range(4)]
    with serving(answer) as server:
        scores = make(wise, server, question).score([sample(prompt) for prompt in prompts])
    assert [score.x if isinstance(score, Value) else score.kind for score in scores] == [0.0, pytest.approx(1), "missing", 0.0]
    assert isinstance(scores[2], Failure) and "explanation" in scores[2].message


def test_identity_follows_what_changes_a_value(question, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("{prompt}")
    configs = [{}, {"model": "x"}, {"max_tokens": 9}, {"compat": "upstream"}, {"question": str(other)}, {"image": "jpeg"}]
    prints = [wise.load(wise.Config(**{"question": question, **options})).fingerprint for options in configs]
    assert len(set(prints)) == len(prints)
    assert wise.load(wise.Config(question=question, timeout=1.0, concurrency=2, base_url="http://x")).fingerprint == prints[0]


def test_questions_of_ones_own_must_be_there_and_fit(tmp_path):
    with pytest.raises(UsageError, match=r"no such file.*\{prompt\}, \{explanation\}"):
        wise.load(wise.Config(question=str(tmp_path / "absent")))
    (tmp_path / "q").write_text("Rate {image}")
    with pytest.raises(UsageError, match=r"fields out of .*got \{image\}"):
        wise.load(wise.Config(question=str(tmp_path / "q")))


def test_wording_is_read_from_a_file_without_running_it(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(
        "raise SystemExit\nRULES = 'be kind'\ndef build(row):\n    return [{'type': 'text', 'text': 'a'}, "
        "{'text': f'''see {row['Prompt']} and {{this}}'''}]\n"
    )
    first, second = _official.texts(path, "build", {"row['Prompt']": "prompt"})
    assert first.fill({}) == "a" and second.fill({"prompt": "the moon"}) == "see the moon and {this}" and second.names == ("prompt",)
    assert _official.constant(path, "RULES") == "be kind"
    for call in (
        lambda: _official.texts(path, "make", {}),
        lambda: _official.texts(path, "build", {}),
        lambda: _official.constant(path, "x"),
    ):
        with pytest.raises(MmalignError, match="not the official file"):
            call()


def test_official_wording_reaches_the_judge(monkeypatch):
    folder = oracle("wise", "WISE_legacy/gpt_eval.py", "vllm_eval.py")
    import typing

    for module, file, source in ((wise, "WISE_legacy/gpt_eval.py", "wise-judge"), (wise_verified, "vllm_eval.py", "wise-verified-judge")):
        from mmalign import data

        data.add(source, folder)
        build = official(folder / file, "build_evaluation_messages", Dict=dict, List=list, Any=typing.Any)
        with serving(lambda body, number: said("2\n1\n0\nScore: 1")) as server:
            module.load(module.Config(base_url=server.url)).score([sample(PROMPT)])
        messages = build({"Prompt": PROMPT.text, "Explanation": "a smoker"}, "")
        assert text_of(server.requests[0]) == messages[-1]["content"][0]["text"]
        assert server.requests[0]["messages"][0]["content"] == messages[0]["content"][0]["text"]


# The suites.


@needs("wise")
def test_the_official_prompts():
    add_data(LEGACY | REWRITTEN | VERIFIED)
    legacy, verified = suite.Evaluator().prompts(), verified_suite.Evaluator().prompts()
    sizes = (400, 167, 133, 100, 100, 100)
    assert Counter(prompt.tag for prompt in legacy) == dict(zip(suite.GROUPS, sizes, strict=True))
    assert Counter(prompt.tag for prompt in verified) == dict(zip(suite.GROUPS, (400, *[120] * 5), strict=True))
    assert [prompt.id for prompt in legacy] == [prompt.id for prompt in verified] == [str(number) for number in range(1, 1001)]
    assert len({prompt.text for prompt in verified} - {prompt.text for prompt in legacy}) == 487
    subjects = Counter(prompt.tags[1] for prompt in legacy if prompt.tag == "culture")
    assert (subjects["Plant"], subjects["Festival"], subjects["Life"]) == (71, 22, 48)
    rewritten = suite.Evaluator(rewritten=True).prompts()
    assert rewritten[0].text == "Mooncakes." and rewritten[0].meta == legacy[0].meta and rewritten[0].meta["prompt"] == legacy[0].text


@needs("wise")
def test_weights_are_the_shares_of_the_prompts():
    for module in (suite, verified_suite):
        assert sum(group.weight for group in module.GROUPS.values()) == pytest.approx(1)
        assert all(group.weight == pytest.approx((group.last - group.first + 1) / 1000) for group in module.GROUPS.values())


def test_files_that_are_no_wise_prompts_are_named(tmp_path):
    from mmalign.evaluators._wise import read

    good = {"Prompt": "p", "Explanation": "e", "Category": "c", "Subcategory": "s", "prompt_id": 5}
    path = tmp_path / "w.json"
    for rows, words in (
        ([{**good, "prompt_id": "5"}], "a whole number"),
        ([good, good], "comes twice"),
        ([{**good, "prompt_id": 1001}], "no group"),
        ([{}], "needs Prompt"),
    ):
        path.write_text(json.dumps(rows))
        with pytest.raises(MmalignError, match=words):
            read([path], suite.GROUPS)
    with pytest.raises(UsageError, match="one split"):
        suite.Evaluator().prompts("train")


def of(module, number, score, **parts):
    group = next(name for name, group in module.GROUPS.items() if group.first <= number <= group.last)
    scorer = module.Evaluator.scorers[0]
    return row(scorer, score, (group,), str(number), **(parts or dict.fromkeys(suite.RATINGS, 0.0)))


def test_golden_totals():
    def rated(number):
        best = 2 if number <= 400 else 1
        ratings = {"consistency": best, "realism": 1, "aesthetic_quality": 0}
        return of(suite, number, wise.wiscore(ratings), **{name: rating / 2 for name, rating in ratings.items()})

    found = suite.Evaluator().aggregate([rated(number) for number in range(1, 1001)])
    assert (round(found["culture"], 2), round(found["time"], 2), round(found["overall"], 2)) == (0.80, 0.45, 0.59)
    assert found["consistency"] == pytest.approx(0.7) and found["unweighted"] == pytest.approx((0.8 + 5 * 0.45) / 6)
    found = verified_suite.Evaluator().aggregate([of(verified_suite, number, float(number <= 520)) for number in range(1, 1001)])
    assert (found["culture"], found["time"], found["space"], found["overall"]) == (1.0, 1.0, 0.0, pytest.approx(0.52))


@pytest.mark.parametrize("module", [suite, verified_suite])
def test_an_empty_group_is_undefined_and_so_is_the_overall(module):
    rows = [of(module, number, 1.0) for number in range(1, 900)]
    found = module.Evaluator().aggregate([one for one in rows if one.tag != "physics"])
    assert found["physics"] is found["overall"] is found["unweighted"] is None and found["culture"] == 1.0
    assert set(module.Evaluator().aggregate([]).values()) == {None}


@settings(deadline=None, max_examples=50)
@given(drawn=st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 1)), min_size=1, max_size=30), draw=st.data(), times=st.integers(2, 3))
def test_order_and_copies_do_not_matter(drawn, draw, times):
    for module in (suite, verified_suite):
        rows = [of(module, number, score) for number, score in drawn]
        found = module.Evaluator().aggregate(rows)
        for other in (draw.draw(st.permutations(rows)), rows * times):
            again = module.Evaluator().aggregate(other)
            assert {name: value is None for name, value in again.items()} == {name: value is None for name, value in found.items()}
            assert all(value == pytest.approx(again[name], abs=1e-12) for name, value in found.items() if value is not None)


@needs("wise")
@pytest.mark.parametrize("name", ["wise", "wise_verified"])
def test_a_slice_from_end_to_end(name, tmp_path, question):
    add_data(LEGACY | VERIFIED)
    reply = GOOD if name == "wise" else "Score: 1"
    with serving(lambda body, number: said("?" if "Rate Traditional food" in text_of(body) else reply)) as server:
        sets = {f"{name}.base_url": server.url, f"{name}.question": question, f"{name}.pause": 0.01}
        result = run_suite(tmp_path / "results", name, sets, 13)
    assert result.counts.expected == 13 and result.counts.failed == ({"score/parse": 1} if name == "wise" else {})
    metric = result.metrics["overall"]
    assert metric.value == pytest.approx(0.8 if name == "wise" else 1.0)
    assert metric.bounds is None or metric.bounds[0] < 0.8 < metric.bounds[1]
    assert {f"{name}.question", "limit"} <= {one.field for one in result.deviations}
