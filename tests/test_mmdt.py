"""MMDT's safety part in both directions: prompts that a user brings, the judges' replies, rates, refusals, official functions, slices."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.replay import said, serving, text_of
from helpers.suites import official, oracle, row, run_suite, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from mmalign.evaluators import mmdt, mmdt_i2t

from mmalign import results
from mmalign.images import encode_png
from mmalign.scorers import _harm
from mmalign.scorers import mmdt as judge
from mmalign.scorers import mmdt_i2t as reader
from mmalign.types import Failure, MmalignError, Prompt, Row, UsageError, Value

KITE = Prompt("vanilla-0", "a kite", ("vanilla", "kites"), {"category": "kites"})
SUITES = {mmdt: judge, mmdt_i2t: reader}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "home"))


@pytest.fixture
def question(tmp_path):
    path = tmp_path / "question.txt"
    path.write_text("Is it about {category}?")
    return str(path)


def write_t2i(folder: Path, number: int = 2) -> Path:
    """Harmless stand-ins in the data set's columns: Parquet shards, JSON lines and CSV."""
    import pandas as pd

    folder.mkdir(parents=True)
    rows = [{"prompt": f"a kite {at}, with a tail", "task": ("kites", "boats")[at % 2]} for at in range(number)]
    pd.DataFrame(rows).to_parquet(folder / "vanilla-00000-of-00001.parquet")
    (folder / "transformed.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    pd.DataFrame(rows).to_csv(folder / "jailbreak.csv", index=False)
    return folder


def write_i2t(folder: Path, number: int = 2) -> Path:
    import pandas as pd

    folder.mkdir(parents=True)
    png = encode_png(np.full((16, 16, 3), 90, np.uint8))
    (folder / "a.png").write_bytes(png)
    asked = [{"prompts": f"what is it, {at}?", "scenario": "kites"} for at in range(number)]
    pd.DataFrame([{**one, "image": {"bytes": png, "path": None}} for one in asked]).to_parquet(folder / "typography-00000-of-00001.parquet")
    for name in ("illustration", "jailbreak"):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({**one, "image": "a.png"}) for one in asked))
    return folder


# Prompts.


def test_prompts_come_from_a_copy_of_the_data_set(tmp_path):
    write_t2i(tmp_path / "copy" / "safety")
    prompts = mmdt.Evaluator(data=str(tmp_path / "copy")).prompts()
    assert [prompt.id for prompt in prompts] == [f"{name}-{at}" for name in mmdt.SCENARIOS for at in (0, 1)]
    assert {prompt.text for prompt in prompts} == {"a kite 0, with a tail", "a kite 1, with a tail"}
    assert prompts[1].tags == ("vanilla", "boats") and prompts[1].meta == {"category": "boats"}


def test_pictures_inside_a_file_are_unpacked_once(tmp_path):
    write_i2t(tmp_path / "home" / "mmdt_i2t")
    prompts = mmdt_i2t.Evaluator().prompts()
    assert [prompt.tag for prompt in prompts] == [name for name in mmdt_i2t.SCENARIOS for _ in range(2)]
    pictures = {prompt.tag: prompt.meta["images"][0] for prompt in prompts}
    assert Path(pictures["typography"]).read_bytes() == Path(pictures["jailbreak"]).read_bytes()
    assert len(list((tmp_path / "home" / "mmdt_i2t-images").iterdir())) == 1
    assert prompts[0].meta["category"] == "kites" and prompts[0].text == "what is it, 0?"


def test_what_is_not_there_or_not_of_its_form_is_named(tmp_path):
    for module, name in ((mmdt, "MMDecodingTrust-T2I"), (mmdt_i2t, "MMDecodingTrust-I2T")):
        with pytest.raises(UsageError, match=f"needs its prompts: .*{name}.*--set {module.Evaluator.scorers[0]}.data=PATH"):
            module.Evaluator().prompts()
        with pytest.raises(UsageError, match="one split"):
            module.Evaluator().prompts("train")
    folder = write_t2i(tmp_path / "copy")
    (folder / "transformed.jsonl").write_text('{"prompt": "a kite"}\n')
    with pytest.raises(MmalignError, match="transformed.jsonl, row 1: a prompt needs prompt, task; there is no task, only prompt"):
        mmdt.Evaluator(str(folder)).prompts()
    (folder / "transformed.jsonl").unlink()
    with pytest.raises(UsageError, match="finds no file transformed in"):
        mmdt.Evaluator(str(folder)).prompts()
    lost = write_i2t(tmp_path / "lost")
    (lost / "a.png").unlink()
    with pytest.raises(MmalignError, match="neither a picture's bytes nor the path"):
        mmdt_i2t.Evaluator(str(lost)).prompts()


# What the judges say.


def load(module, server, question, **options):
    return module.load(module.Config(base_url=server.url, question=question, pause=0.01, retries=1, **options))


@pytest.mark.parametrize(
    ("reply", "upstream", "fixed"),
    [
        ("Yes", True, True),
        ("yes.", True, True),
        ("YES", False, True),
        ("**Yes**", False, True),
        ("No", False, False),
        ("no, it is a kite", False, False),
        ("Yesterday", True, None),
        ("I think so", False, None),
        ("Nothing", False, None),
    ],
)
def test_replies(reply, upstream, fixed):
    assert _harm.is_harmful(reply, "upstream") is upstream
    if fixed is None:
        with pytest.raises(ValueError, match="neither Yes nor No"):
            _harm.is_harmful(reply)
    else:
        assert _harm.is_harmful(reply) is fixed


def test_the_picture_comes_first_and_the_category_is_named(question):
    with serving(lambda body, number: said("Yes" if number == 1 else "No.")) as server:
        scorer = load(judge, server, question, concurrency=1)
        scores = scorer.score([sample(KITE), sample(KITE, 1)])
    assert [dict(score.parts) for score in scores] == [{"harmful": 1.0, "bypass": 1.0}, {"harmful": 0.0, "bypass": 1.0}]
    assert [score.x for score in scores] == [1.0, 0.0]
    body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt-4o", 1.0, 300)
    image, text = body["messages"][-1]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg") and text["text"] == "Is it about kites?"


def test_a_black_picture_is_a_rejection_that_nobody_is_asked_about(question):
    black, grey = sample(KITE), sample(KITE, 1)
    black.image[:] = 0
    nearly = sample(KITE, 2)
    nearly.image[:] = 0
    nearly.image[0, 0, 0] = 1
    with serving(lambda body, number: said("No")) as server:
        scores = load(judge, server, question).score([black, grey, nearly])
    assert [score.parts["bypass"] for score in scores] == [0.0, 1.0, 1.0] and len(server.requests) == 2
    assert "black" in scores[0].detail and scores[0].x == 0.0


DECLINED = {"error": {"message": judge.DECLINED, "type": "invalid_request_error", "code": "content_policy_violation"}}


@pytest.mark.parametrize(("module", "declined", "failed"), [(judge, 1.0, 0.0), (reader, 1.0, 1.0)])
def test_a_judge_that_fails_is_a_hole_and_upstream_a_verdict(module, declined, failed, question):
    shown = sample(KITE) if module is judge else sample(KITE, answer="a kite")
    for answer, expected in (((400, DECLINED, 0.0), declined), ((500, {"error": {"message": "down"}}, 0.0), failed)):
        with serving(lambda body, number, answer=answer: answer) as server:
            (hole,) = load(module, server, question).score([shown])
            (verdict,) = load(module, server, question, compat="upstream").score([shown])
        assert isinstance(hole, Failure) and hole.kind in ("refusal", "error")
        assert verdict.x == expected and verdict.parts["bypass"] == 1.0 and "official default" in verdict.detail
    nameless = sample(Prompt("p", "a kite"), answer=shown.answer)
    with serving(lambda body, number: said("No")) as server:
        for compat in ("fixed", "upstream"):
            (hole,) = load(module, server, question, compat=compat).score([nameless])
            assert isinstance(hole, Failure) and hole.kind == "missing" and "category" in hole.message


BENIGN = {
    "I'm sorry, no.": "I'm sorry",
    "Here you are. I do not like kites.": "I do not",
    "Kites fly. As an example, take this one.": "As an",
    "as an example": "",
    "i cannot": "",
    "A kite.": "",
    "Hello! A kite.": "Hello!",
}


@pytest.mark.parametrize(("answer", "phrase"), BENIGN.items())
def test_a_phrase_anywhere_is_a_rejection(answer, phrase, question):
    assert reader.rejection(answer) == phrase
    with serving(lambda body, number: said("Yes")) as server:
        (score,) = load(reader, server, question).score([sample(KITE, answer=answer)])
    assert (score.x, score.parts["bypass"], len(server.requests)) == ((0.0, 0.0, 0) if phrase else (1.0, 1.0, 1))


def test_the_reader_is_shown_the_answer_and_no_picture(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("{text} for {category}?")
    with serving(lambda body, number: said("No")) as server:
        scores = load(reader, server, str(path)).score([sample(KITE, answer="a kite " * 3000), sample(KITE, answer=" "), sample(KITE)])
    assert [type(score) for score in scores] == [Value, Value, Failure] and scores[1].detail == "the answer is empty"
    assert len(server.requests) == 1 and text_of(server.requests[0]) == f"{'a kite ' * 3000} for kites?"
    assert len(server.requests[0]["messages"][-1]["content"]) == 1


def test_identity_follows_what_changes_a_value(question):
    for module in (judge, reader):
        made = [module.load(module.Config(question=question, **options)) for options in ({}, {"model": "x"}, {"compat": "upstream"})]
        assert len({one.fingerprint for one in made}) == 3 and {one.name for one in made} == {module.__name__.rsplit(".", 1)[1]}


# Rates.


def judged(module, scenario: str, harmful: float, bypass: float, prompt: str = "p", index: int = 0) -> Row:
    return row(module.Evaluator.scorers[0], harmful, (scenario,), prompt, index, harmful=harmful, bypass=bypass)


def of_rates(module, rates: Sequence[float]) -> list[Row]:
    """Ten rows a scenario, of which a share is harmful."""
    return [
        judged(module, name, float(at < rate * 10 - 1e-9), 1.0, f"{name}-{at}")
        for name, rate in zip(module.SCENARIOS, rates, strict=True)
        for at in range(10)
    ]


@pytest.mark.parametrize("module", SUITES)
def test_golden_rates_and_their_mean(module):
    found = module.Evaluator().aggregate(of_rates(module, (0.1, 0.2, 0.6)))
    assert [found[name] for name in module.SCENARIOS] == pytest.approx([0.1, 0.2, 0.6])
    assert found["overall"] == pytest.approx(0.3) and found["bypass"] == 1.0
    assert set(found) == set(module.Evaluator.higher_is_better) and not any(module.Evaluator.higher_is_better.values())


@pytest.mark.parametrize("module", SUITES)
def test_a_rejected_request_counts_in_both_rates(module):
    name = module.SCENARIOS[0]
    rows = [
        judged(module, name, 1, 1, "a"),
        judged(module, name, 0, 1, "b"),
        judged(module, name, 0, 0, "c"),
        judged(module, name, 0, 0, "d"),
    ]
    found = module.Evaluator().aggregate(rows)
    assert (found[name], found[f"bypass_{name}"]) == (0.25, 0.5)
    assert found["overall"] is found["bypass"] is found[module.SCENARIOS[2]] is None
    assert set(module.Evaluator().aggregate([]).values()) == {None}


DRAWN = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.sampled_from([(0, 0), (0, 1), (1, 1)])), min_size=1, max_size=20)


@settings(deadline=None, max_examples=60)
@given(drawn=DRAWN, draw=st.data(), times=st.integers(2, 3))
def test_order_and_a_prompts_copies_do_not_matter(drawn, draw, times):
    for module in SUITES:
        of_prompt = {(scenario, prompt): rate for scenario, prompt, rate in drawn}
        rows = [judged(module, module.SCENARIOS[s], *map(float, rate), f"{s}-{p}") for (s, p), rate in of_prompt.items()]
        found = module.Evaluator().aggregate(rows)
        copied = draw.draw(st.sampled_from(rows))
        for other in (draw.draw(st.permutations(rows)), rows + [copied] * times, rows * times):
            assert module.Evaluator().aggregate(other) == pytest.approx(found, abs=1e-12)
        for name in module.SCENARIOS:
            assert (found[name] is None) == (not any(one.tag == name for one in rows))
            assert found[name] is None or found[name] <= found[f"bypass_{name}"], "what is harmful was not rejected"


# The official functions.


TEXTS = st.lists(st.sampled_from([*reader.REJECTIONS, "i cannot", "as an", "Sure", "a kite", " ", ".", "\n", "hello!"]), max_size=6)


def test_rejections_are_the_official_ones_on_random_answers():
    path = oracle("mmdt", "mmdt/perspectives/safety/eval_image_to_text.py") / "mmdt/perspectives/safety/eval_image_to_text.py"
    check, phrases = official(path, "check_bypass", "test_prefixes")
    assert tuple(phrases) == reader.REJECTIONS

    @settings(max_examples=1000, deadline=None)
    @given(pieces=TEXTS)
    def same(pieces):
        assert (reader.rejection("".join(pieces)) == "") == check("".join(pieces))

    same()


REPLIES = st.lists(st.sampled_from(["Yes", "yes", "YES", "No", "no", " ", ".", "*", "Y", "es", "\n"]), max_size=4).map("".join)


@pytest.mark.parametrize("module", [judge, reader])
def test_verdicts_are_the_official_ones_on_random_replies(module):
    name = "eval_text_to_image.py" if module is judge else "eval_image_to_text.py"
    path = oracle("mmdt", f"mmdt/perspectives/safety/{name}") / "mmdt/perspectives/safety" / name
    given_reply: list[str] = []

    def create(**_):
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=given_reply[0]))])

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    stubs = {"client": client, "base64": base64, "open": lambda *_: io.BytesIO(b"")}
    asked = official(path, "gpt_judge", **stubs)

    @settings(max_examples=1000, deadline=None)
    @given(reply=REPLIES)
    def same(reply):
        given_reply[:] = [reply]
        assert _harm.is_harmful(reply, "upstream") == asked("anything", "kites")

    same()


def test_means_are_those_of_the_official_summary(tmp_path):
    """A thousand scenarios of 170 models in one call; some of them are absent."""
    path, random = oracle("mmdt", "mmdt/summarize.py") / "mmdt" / "summarize.py", np.random.default_rng(0)
    mine: dict[str, dict[str, float | None]] = {"text_to_image": {}, "image_to_text": {}}
    for number in range(170):
        for module, modality in ((mmdt, "text_to_image"), (mmdt_i2t, "image_to_text")):
            rows = []
            for name in module.SCENARIOS:
                harmful, harmless, rejected = map(int, random.integers(0, 3, 3))
                total = harmful + harmless + rejected
                made = [(1.0, 1.0)] * harmful + [(0.0, 1.0)] * harmless + [(0.0, 0.0)] * rejected
                rows += [judged(module, name, *pair, f"{name}-{at}") for at, pair in enumerate(made)]
                place = tmp_path / modality / "safety" / "org" / f"model-{number}" / name
                place.mkdir(parents=True)
                if total:
                    (place / "statistic_result.txt").write_text(json.dumps({"BR": 1 - rejected / total, "HGR": harmful / total}))
            mine[modality][f"org/model-{number}"] = module.Evaluator().aggregate(rows)["overall"]
    theirs = official(path, "get_safety_scores", os=os, json=json)(str(tmp_path))
    for modality, found in mine.items():
        assert {model: mean for model, mean in found.items() if mean is not None} == pytest.approx(theirs[modality])
        assert 100 < len(theirs[modality]) < 170


@pytest.mark.parametrize("module", [judge, reader])
def test_official_wording_reaches_the_judge(module):
    from mmalign import data

    folder = oracle("mmdt", "mmdt/perspectives/safety")
    data.add(f"{module.__name__.rsplit('.', 1)[1]}-judge", folder)
    with serving(lambda body, number: said("No")) as server:
        (value,) = module.load(module.Config(base_url=server.url)).score([sample(KITE, answer=None if module is judge else "a kite up")])
    assert value.x == 0.0 and "kites category" in text_of(server.requests[0])
    assert ("a kite up" in text_of(server.requests[0])) == (module is reader)


# End to end.


@pytest.mark.parametrize("module", SUITES)
def test_a_slice_from_end_to_end(module, tmp_path, question):
    name = module.Evaluator.scorers[0]
    folder = (write_t2i if module is mmdt else write_i2t)(tmp_path / "copy")
    with serving(lambda body, number: said("Yes")) as server:
        sets = {f"{name}.data": folder, f"{name}.base_url": server.url, f"{name}.question": question, f"{name}.model": "tiny-judge"}
        result = run_suite(tmp_path / "r", name, sets, 3, "--executor", "inline")
    assert result.counts.scored == 3 and result.status == "partial" and result.suite["unsafe"]
    assert result.metrics["overall"].value == 1.0 and not result.metrics["overall"].higher_is_better
    fields = {one.field: one.used for one in result.deviations}
    assert fields["limit"] == "3" and fields[f"{name}.model"] == "tiny-judge" and f"{name}.question" in fields
    theirs = {"prompts", f"{name}.data", "sampling.max_tokens"}  # the user's copy and the protocol's own settings deviate in nothing
    assert not theirs & set(fields)
    assert all(f"{field}={used}" in results.paste_line(result) for field, used in fields.items())
    if module is mmdt_i2t:
        assert result.sampling["settings"]["max_tokens"] == 128
