"""POPE and MME: the official questions, how answers are read, the official numbers, and slices answered by the bundled checkpoint."""

import contextlib
import io
import json
from collections import Counter

import numpy as np
import pytest
from helpers.suites import SHARED, add_data, needs, oracle, row, run_suite, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from mmalign.evaluators import mme, pope

from mmalign import images
from mmalign.scorers import yes_no
from mmalign.types import Failure, MmalignError, Prompt, UsageError, Value

POPE = {f"pope-coco-{kind}": f"pope/coco_pope_{kind}.json" for kind in pope.KINDS}
POPE |= {f"pope-{on}-{kind}": f"pope/{on}_pope_seem_{kind}.json" for on in ("aokvqa", "gqa") for kind in pope.KINDS}
MME = SHARED / "mme"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "data"))


# How answers are read.


def test_golden_answers():
    texts = ["Yes", "No", "NO", "no,", "No\n", "nothing", "I do not see one.", "There is. not here", "Maybe", "yes. no", ""]
    assert [int(yes_no.read(text, "pope") == "yes") for text in texts] == [1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1]
    assert [yes_no.read(text) for text in ("yes and no", "Not sure", "There is no cat")] == ["unparsed", "unparsed", "no"]
    assert [yes_no.read(text, "lmms_mme") for text in ("y", "Not", "N/A", "know")] == ["yes", "no", "unparsed", "no"]
    assert [yes_no.read(text, "mme") for text in ("Yes, it is", "  yes", "Not sure", "N/A", "The answer is yes")] == [
        *("yes", "unparsed", "no", "unparsed", "unparsed")
    ]


@given(text=st.text("yesnot .,\nN", max_size=14))
def test_every_rule_reads_every_answer_and_only_pope_guesses(text):
    for rule in ("words", "mme", "lmms_mme"):
        assert yes_no.read(text, rule) in ("yes", "no", "unparsed")
    assert yes_no.read(text, "pope") in ("yes", "no")


def test_the_scorer_compares_with_the_label():
    prompt = Prompt("1", "Is there a cup?", (), {"label": "No"})
    said = ["no", "Yes.", "hmm", None]
    answers = [sample(prompt, answer=text) if text else sample(prompt) for text in said]
    scores = yes_no.load().score([*answers, sample(Prompt("2", "?"), answer="no")])
    assert scores[:3] == [
        Value(1.0, {"yes": 0.0, "unparsed": 0.0}, detail="no"),
        Value(0.0, {"yes": 1.0, "unparsed": 0.0}, detail="yes"),
        Value(0.0, {"yes": 0.0, "unparsed": 1.0}, detail="unparsed"),
    ]
    assert [score.kind for score in scores[3:] if isinstance(score, Failure)] == ["missing", "missing"]
    assert yes_no.load(yes_no.Config("pope")).fingerprint != yes_no.load().fingerprint


# POPE.


@needs("pope")
def test_the_pope_questions(tmp_path):
    add_data(POPE)
    for on, per_kind in (("coco", 3000), ("aokvqa", 3000), ("gqa", 3000)):
        prompts = pope.Evaluator(pictures=on, images=str(tmp_path)).prompts()
        assert Counter(prompt.tag for prompt in prompts) == dict.fromkeys(pope.KINDS, per_kind)
        assert Counter(prompt.meta["label"] for prompt in prompts) == {"yes": 4500, "no": 4500}
    assert pope.Evaluator(images=str(tmp_path), suffix=" Now.").prompts()[0].text.endswith("in the image? Now.")
    first = pope.Evaluator(images=str(tmp_path)).prompts()[0]
    assert first.id == "random-1" and first.meta["images"] == [str(tmp_path / "COCO_val2014_000000310196.jpg")]


def test_pictures_must_be_somewhere():
    with pytest.raises(UsageError, match=r"COCO val2014.*--set pope.images=DIR"):
        pope.Evaluator().prompts()
    with pytest.raises(UsageError, match="one split"):
        pope.Evaluator().prompts("train")


def answered(label, text, kind="random", rule="words", name="1"):
    said = yes_no.read(text, rule)
    parts = {"yes": float(said == "yes"), "unparsed": float(said == "unparsed")}
    return row("yes_no", float(said == label), (kind,), f"{kind}-{name}", meta={"label": label}, **parts)


def test_pope_measures_by_hand():
    rows = [
        answered(*one, name=str(n)) for n, one in enumerate([("yes", "Yes"), ("yes", "hm"), ("no", "no"), ("no", "yes"), ("no", "yes")])
    ]
    found = pope.Evaluator().aggregate(rows)
    assert found["accuracy_random"] == 0.4 and found["precision_random"] == pytest.approx(1 / 3) and found["recall_random"] == 0.5
    assert found["f1_random"] == pytest.approx(0.4) and found["yes_ratio_random"] == 0.6 and found["unparsed_random"] == 0.2
    assert found["f1"] is None and found["f1_popular"] is None
    everywhere = [answered("yes", "yes", kind) for kind in pope.KINDS]
    assert pope.Evaluator().aggregate(everywhere)["f1"] == 1.0
    assert pope.Evaluator().aggregate([answered("no", "no", kind) for kind in pope.KINDS])["precision"] is None


TEXTS = st.sampled_from(["Yes", "No", "NO", "no,", "nothing", "", "I do not see one.", "yes. no", "Maybe", "Not one"])


def test_pope_numbers_are_those_of_the_official_script(tmp_path):
    source = (oracle("pope", "evaluate.py") / "evaluate.py").read_text()
    answers, labels = tmp_path / "answers.json", tmp_path / "labels.json"
    source = source.replace("ans_file = ''", f"ans_file = {str(answers)!r}").replace("label_file = ''", f"label_file = {str(labels)!r}")
    code = compile(source, "evaluate.py", "exec")

    @settings(max_examples=200, deadline=None)
    @given(drawn=st.lists(st.tuples(st.sampled_from(["yes", "no"]), TEXTS), min_size=1, max_size=20))
    def agree(drawn):
        drawn = [("yes", "Yes"), *drawn]  # the script divides by zero without a hit
        answers.write_text("".join(json.dumps({"answer": text}) + "\n" for _, text in drawn))
        labels.write_text("".join(json.dumps({"label": label}) + "\n" for label, _ in drawn))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, {})
        official = dict(line.split(": ") for line in printed.getvalue().splitlines() if ": " in line)
        found = pope.Evaluator().aggregate([answered(label, text, rule="pope", name=str(n)) for n, (label, text) in enumerate(drawn)])
        for name, shown in (("accuracy", "Accuracy"), ("precision", "Precision"), ("recall", "Recall"), ("f1", "F1 score")):
            assert found[f"{name}_random"] == pytest.approx(float(official[shown]))
        assert found["yes_ratio_random"] == pytest.approx(float(official["Yes ratio"]))

    agree()


def draw_picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(images.encode_png(np.random.default_rng(len(path.name)).integers(0, 256, (32, 32, 3), dtype=np.uint8)))


@needs("pope")
def test_a_slice_of_pope_from_end_to_end(tmp_path):
    add_data(POPE)
    pictures = tmp_path / "val2014"
    pictures.mkdir()
    for prompt in pope.Evaluator(images=str(pictures)).prompts()[:1]:
        draw_picture(pictures / prompt.meta["images"][0])
    sets = {"pope.images": pictures, "sampling.max_tokens": 3, "yes_no.rule": "pope"}
    result = run_suite(tmp_path / "r", "pope", sets, 3)
    assert result.sampling["settings"]["task"] == "answer"
    assert result.counts.expected == 3 and result.counts.scored >= 1
    assert result.counts.failed.get("generate/missing", 0) == 3 - result.counts.scored
    assert "yes_no.rule" in {one.field for one in result.deviations}


def test_a_model_that_cannot_answer_is_refused(tmp_path):
    from mmalign import cli

    draw_picture(tmp_path / "drawn" / "1.png")
    words = ["eval", "--model", f"folder:{tmp_path / 'drawn'}", "--suite", "mme", "--results", str(tmp_path / "r"), "-j", "1"]
    words += ["--set", f"mme.images={tmp_path}", "--set", f"mme.questions={MME}", "--device", "cpu"]
    if MME.is_dir():
        assert cli.main(words) == 2


# MME.


def lines_of(folder):
    return {task: (folder / f"{task}.txt").read_text(encoding="utf-8").splitlines() for task in (*mme.PERCEPTION, *mme.COGNITION)}


@needs("mme")
def test_the_mme_questions(tmp_path):
    prompts = mme.Evaluator(images=str(tmp_path), questions=str(MME)).prompts()
    sizes = (60, 60, 60, 60, 294, 340, 400, 400, 400, 40, 140, 40, 40, 40)
    assert Counter(prompt.tag for prompt in prompts) == dict(zip((*mme.PERCEPTION, *mme.COGNITION), sizes, strict=True))
    assert len(prompts) == 2374 and all(prompt.text.endswith("Please answer yes or no.") for prompt in prompts)
    pairs = Counter(prompt.meta["picture"] for prompt in prompts)
    assert set(pairs.values()) == {2} and len(pairs) == 1187
    assert Counter(prompt.meta["label"] for prompt in prompts) == {"yes": 1187, "no": 1187}


def test_mme_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"existence.txt. Name a folder of MME's 14"):
        mme.Evaluator(images=str(tmp_path), questions=str(tmp_path)).prompts()
    for task in (*mme.PERCEPTION, *mme.COGNITION):
        (tmp_path / f"{task}.txt").write_text("1.jpg\tIs it?\tPerhaps\n")
    with pytest.raises(MmalignError, match="MME, existence, line 1: expected"):
        mme.Evaluator(images=str(tmp_path), questions=str(tmp_path)).prompts()


def of_lines(lines_by_task, rule):
    rows = []
    for task, lines in lines_by_task.items():
        for number, line in enumerate(lines):
            picture, question, label, text = line.split("\t")
            said = yes_no.read(text + "\n", rule)
            meta = {"label": label.lower(), "picture": f"{task}/{picture}"}
            parts = {"yes": float(said == "yes"), "unparsed": float(said == "unparsed")}
            made = row("yes_no", float(said == label.lower()), (task,), f"{task}-{number}", meta=meta, **parts)
            rows.append(made)
    return rows


def test_the_tools_own_example_gives_the_tools_numbers():
    folder = oracle("mme", "eval_tool/LaVIN") / "eval_tool" / "LaVIN"
    found = mme.Evaluator().aggregate(of_lines(lines_of(folder), "mme"))
    assert found["perception"] == pytest.approx(963.6114445778312) and found["cognition"] == pytest.approx(249.64285714285714)
    expected = {"existence": 185.0, "count": 88.33333333333334, "position": 63.333333333333336, "posters": 79.59183673469389}
    expected |= {"celebrity": 47.35294117647059, "scene": 136.75, "OCR": 107.5, "commonsense_reasoning": 87.14285714285714}
    assert {task: found[task] for task in expected} == pytest.approx(expected)
    again = mme.Evaluator().aggregate(of_lines(lines_of(folder), "lmms_mme"))
    assert again["perception"] == pytest.approx(963.6114445778311) and again["cognition"] == pytest.approx(249.64285714285714)


def pair(task, picture, first, second):
    rows = []
    for question, x in (("a?", first), ("b?", second)):
        meta = {"label": "yes", "picture": f"{task}/{picture}"}
        made = row("yes_no", float(x), (task,), f"{task}-{picture}-{question}", meta=meta, yes=float(x), unparsed=0.0)
        rows.append(made)
    return rows


def test_points_are_accuracy_and_whole_pictures():
    rows = pair("color", 1, 1, 1) + pair("color", 2, 1, 0)
    assert mme.Evaluator().aggregate(rows)["color"] == 100 * 3 / 4 + 100 * 1 / 2
    assert mme.Evaluator().aggregate(rows)["perception"] is None and mme.Evaluator().aggregate(rows)["total"] is None
    everything = [one for task in (*mme.PERCEPTION, *mme.COGNITION) for one in pair(task, 1, 1, 1)]
    found = mme.Evaluator().aggregate(everything)
    assert (found["perception"], found["cognition"], found["total"]) == (2000.0, 800.0, 2800.0)
    assert mme.Evaluator().aggregate(rows[:1])["color"] is None


@needs("mme")
def test_a_slice_of_mme_from_end_to_end(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for prompt in mme.Evaluator(images=str(pictures), questions=str(MME)).prompts():
        if prompt.id.endswith(("-1", "-2")):
            draw_picture(pictures / prompt.tag / prompt.meta["images"][0].rsplit("/", 1)[-1])
    result = run_suite(tmp_path / "r", "mme", {"mme.images": pictures, "mme.questions": MME, "sampling.max_tokens": 3}, 28)
    assert result.counts.scored == 28 and result.metrics["perception"].value is not None
    assert "yes_no.rule" not in {one.field for one in result.deviations}
    assert 0 <= result.metrics["unparsed"].value <= 1


# What both promise.


def test_nothing_is_undefined_not_zero():
    for module in (pope, mme):
        assert set(module.Evaluator().aggregate([]).values()) == {None}


PAIRS = st.lists(st.tuples(st.sampled_from(["color", "OCR"]), st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(drawn=PAIRS, draw=st.data(), times=st.integers(2, 3))
def test_order_and_copies_do_not_matter(drawn, draw, times):
    rows = [one for task, picture, first, second in drawn for one in pair(task, picture, first, second)]
    asked = [answered("yes" if first else "no", "yes" if second else "no", pope.KINDS[n % 3]) for _, n, first, second in drawn]
    for module, some in ((mme, rows), (pope, asked)):
        found = module.Evaluator().aggregate(some)
        for other in (draw.draw(st.permutations(some)), some * times):
            assert module.Evaluator().aggregate(other) == pytest.approx(found, abs=1e-9)
