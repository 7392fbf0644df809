"""DPG-Bench: question graphs, both sets of means, answers by BLIP, by a server and by a VLM judge, and slices from end to end."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny_questions
from helpers.replay import said, serving, text_of
from helpers.suites import SHARED, add_data, needs, official, oracle, row, run_suite, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from mmalign.evaluators import _dpg
from mmalign.evaluators import dpg as suite

from mmalign import data, registry, remote, serve
from mmalign.scorers import _question_graph as graph
from mmalign.scorers import dpg, dpg_judge
from mmalign.types import Failure, MmalignError, Prompt
from mmalign.worker import Recipe

CHAIN = [graph.Asked(1, "Is there a drum?"), graph.Asked(2, "Is there a lamp?", (1,)), graph.Asked(3, "Is it on it?", (1, 2))]
LABELS = ("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple")
HEADER = (*LABELS, "question_natural_language")
TUPLES = ("entity - whole (drum)", "attribute - color (lamp, teal)", "relation - spatial (lamp, drum, on)", "global - (photo)")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "data"))


def meta(questions=CHAIN, categories=("entity - whole", "attribute - color", "relation - spatial")):
    rows = zip(questions, categories, strict=True)
    return {"questions": [{"number": one.number, "text": one.text, "parents": list(one.parents), "category": kind} for one, kind in rows]}


# The rule.


def test_golden_dependencies():
    assert graph.score(CHAIN, {1: 0.0, 2: 1.0, 3: 1.0}) == 0.0
    assert graph.score(CHAIN, {1: 1.0, 2: 1.0, 3: 1.0}) == 1.0
    chain = [graph.Asked(1, ""), graph.Asked(2, "", (1,)), graph.Asked(3, "", (2,))]
    answers = {1: 0.0, 2: 1.0, 3: 1.0}
    assert graph.score(chain, answers, is_cascading=False) == pytest.approx(1 / 3) and graph.score(chain, answers) == 0.0
    assert answers == {1: 0.0, 2: 1.0, 3: 1.0}


def test_golden_images():
    """Root no on one of two images: 0.5, and the last image's categories are all yes; on both: 0, and the other questions stay yes."""
    for first, last, overall, upstream in ((0.0, 1.0, 50.0, (100, 100, 100)), (0.0, 0.0, 0.0, (0, 100, 100))):
        rows = []
        for index, root in enumerate((first, last)):
            answers = {1: root, 2: 1.0, 3: 1.0}
            rows.append(row("dpg", graph.score(CHAIN, answers), ("entity",), "p", index, meta(), **graph.parts(answers)))
        clean, compat = _dpg.means(rows, "dpg", "fixed"), _dpg.means(rows, "dpg", "upstream")
        assert clean["overall"] == compat["overall"] == overall
        assert (compat["entity"], compat["attribute-color"], compat["relation-spatial"]) == upstream
        assert clean["entity-whole"] == 100 * (first + last) / 2 and clean["global"] is None


ANSWERS = st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 8), max_size=3)), min_size=1, max_size=8)


def drawn_graph(drawn):
    known = {n: [p for p in sorted(set(parents)) if p <= len(drawn) and p != n] for n, (_, parents) in enumerate(drawn, 1)}
    questions = [graph.Asked(n, f"q{n}?", tuple(parents)) for n, parents in known.items()]
    return questions, {n: float(answer) for n, (answer, _) in enumerate(drawn, 1)}


@settings(deadline=None)
@given(drawn=ANSWERS)
def test_dependencies_only_take_away_and_cascading_takes_no_less(drawn):
    questions, answers = drawn_graph(drawn)
    plain = sum(answers.values()) / len(answers)
    assert 0 <= graph.score(questions, answers) <= graph.score(questions, answers, is_cascading=False) <= plain


def test_the_official_script_agrees_on_random_graphs(tmp_path):
    path = oracle("ella", "dpg_bench/compute_dpg_bench.py") / "dpg_bench" / "compute_dpg_bench.py"
    import os

    state = {}
    picture = SimpleNamespace(crop=lambda box: box[:2])
    crops = {(0, 0): 0, (8, 0): 1, (0, 8): 2, (8, 8): 3}
    vqa = SimpleNamespace(vqa=lambda crop, question: "yes" if state["answers"][crops[crop]][int(question[1:-1])] else "no")
    _, compute = official(path, "crop_image", "compute_dpg_one_sample", osp=os.path, Image=SimpleNamespace(open=lambda path: picture))
    arguments = SimpleNamespace(pic_num=4, res_path=str(tmp_path / "r.txt"))

    @settings(max_examples=1000, deadline=None)
    @given(drawn=ANSWERS, more=st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=3, max_size=3))
    def agree(drawn, more):
        questions, answers = drawn_graph(drawn)
        state["answers"] = [answers, *({n: float(some[n - 1]) for n in answers} for some in more)]
        asked = {
            "qid2tuple": {one.number: TUPLES[one.number % 4] for one in questions},
            "qid2dependency": {one.number: list(one.parents) or [0] for one in questions},
            "qid2question": {one.number: one.text for one in questions},
        }
        total, _, raw = compute(arguments, {"p": asked}, "x/p.png", vqa, 8)
        scores = [graph.score(questions, image) for image in state["answers"]]
        assert sum(scores) / 4 == pytest.approx(total) and raw == state["answers"][3]

    agree()


# Reading.


def write(tmp_path, rows, texts):
    file = tmp_path / "questions.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([HEADER, *rows])
    folder = tmp_path / "checkout" / "dpg_bench" / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    source = SimpleNamespace(file="prompts.jsonl", url="https://github.com/o/n/tree/c/dpg_bench/prompts/*.txt")
    return data._join(source, tmp_path / "checkout", tmp_path), file


def question(item, number, parents, text="Is there a drum?"):
    return (item, "t", "k", number, parents, "b", "d", TUPLES[(number - 1) % 4], text)


def test_questions_meet_their_prompts_and_the_first_row_is_kept(tmp_path):
    rows = [question("b2", 1, "0"), question("b2", 2, "1"), question("b2", 3, "1,2"), question("a1", 1, "0"), question("a1", 4, "0")]
    files = write(tmp_path, rows, {"b2": " a drum \n", "a1": "a lamp", "c3": "a cup"})
    with pytest.raises(MmalignError, match="item c3 has no questions"):
        _dpg.read(*files, "fixed")
    (tmp_path / "checkout" / "dpg_bench" / "prompts" / "c3.txt").unlink()
    files = write(tmp_path, rows, {})
    prompts = _dpg.read(*files, "fixed")
    assert [(prompt.id, prompt.text, prompt.tag) for prompt in prompts] == [("a1", "a lamp", "entity"), ("b2", "a drum", "entity")]
    assert [(one["number"], one["parents"], one["category"]) for one in prompts[1].meta["questions"]] == [
        (1, [], "entity - whole"),
        (2, [1], "attribute - color"),
        (3, [1, 2], "relation - spatial"),
    ]
    assert prompts[0].meta["questions"][1]["category"] == "global"
    assert [prompt.id for prompt in _dpg.read(*files, "upstream")] == ["a1"]  # b2 depends on the dropped row


@pytest.mark.parametrize(("rows", "words"), [([], "expected the columns"), ([question("a", 1, "x")], "row 2: expected whole numbers")])
def test_broken_question_files_are_named(tmp_path, rows, words):
    files = write(tmp_path, rows, {"a": "x"})
    with pytest.raises(MmalignError, match=words):
        _dpg.read(*files, "fixed")


@needs("dpg_bench")
def test_joined_texts_are_the_pinned_file(tmp_path):
    add_data({"dpg": "dpg_bench/prompts.jsonl"})
    folder = tmp_path / "prompts"
    folder.mkdir()
    for item in data.load_json_lines(SHARED / "dpg_bench" / "prompts.jsonl"):
        (folder / f"{item['item_id']}.txt").write_text(item["prompt"], newline="")
    assert data.add("dpg", folder).read_bytes() == (SHARED / "dpg_bench" / "prompts.jsonl").read_bytes()
    (folder / "vrd2.txt").write_text("another caption")
    with pytest.raises(MmalignError, match="not the pinned data 'dpg'"):
        data.add("dpg", folder)


def test_what_cannot_be_fetched_says_what_to_clone():
    with pytest.raises(MmalignError, match=r"Clone https://github.com/TencentQQGYLab/ELLA, then run: mmalign data add dpg --from PATH"):
        data.data_path("dpg")


def test_a_git_blob_id_pins_a_file(tmp_path):
    file = tmp_path / "dpg_bench.csv"
    file.write_text("other")
    with pytest.raises(MmalignError, match="expected git blob 98457fc99.*, got [0-9a-f]{40}"):
        data.add("dpg-questions", file)
    source = data.sources()["dpg-questions"]
    file.write_bytes(b"hello\n")
    assert data._hash(source, file) == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object


# The scorers.


def samples():
    prompts = [Prompt("a", "a drum", (), meta()), Prompt("b", "a cup"), Prompt("c", "x", (), meta(CHAIN[:2], ("e", "f")))]
    return [sample(prompt, seed) for seed, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    folder = str(tiny_questions.blip(tmp_path_factory.mktemp("blip")))
    return {"vqa": "blip", "blip": folder, "processor": folder, "resolution": 32}


def test_blip_answers_and_says_that_it_is_another_judge(blip):
    scorer = dpg.load(dpg.Config(**blip))
    scores = scorer.score(samples())
    assert isinstance(scores[1], Failure) and "no question graph" in scores[1].message
    answers = {int(name[1:]): answer for name, answer in scores[0].parts.items()}
    assert set(answers) == {1, 2, 3} and scores[0].x == graph.score(CHAIN, answers) and set(answers.values()) <= {0.0, 1.0}
    assert scorer.metric_name == "dpg-blip" and scorer.deviations[0].field == "dpg.vqa"
    many = [graph.Asked(n, f"Is there a thing {n}?") for n in range(1, 12)]
    (value,) = scorer.score([sample(Prompt("m", "m", (), meta(many, ["e"] * 11)))])
    assert len(value.parts) == 11


@pytest.mark.parametrize("broken", [{"questions": []}, {"questions": [{"number": 1, "text": "?", "parents": [9]}]}])
def test_broken_graphs_are_holes(blip, broken):
    (hole,) = dpg.load(dpg.Config(**blip)).score([sample(Prompt("a", "a", (), broken))])
    assert hole.kind == "missing" and "broken" in hole.message


def test_mplug_answers_behind_its_server(monkeypatch):
    asked = {}

    def pipeline(task, **options):
        asked.update(options, task=task)
        return lambda given: {"text": "no" if "lamp" in given["question"] else "yes"}

    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "modelscope.pipelines", SimpleNamespace(pipeline=pipeline))
    tasks = SimpleNamespace(visual_question_answering="vqa")
    monkeypatch.setitem(sys.modules, "modelscope.utils", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "modelscope.utils.constant", SimpleNamespace(Tasks=tasks))
    adapter = Path(remote.__file__).parent / "adapters" / "mplug_server.py"
    served = {"mplug_server": Recipe(registry.find("scorers", "mplug_server", [adapter]))}
    with serve.Server(served, serve.Settings(port=0)) as running:
        scorer = dpg.load(dpg.Config(url=running.url))
        scores = scorer.score(samples())
    assert asked["model"] == "damo/mplug_visual-question-answering_coco_large_en" and asked["task"] == "vqa"
    assert [scores[0].x, scores[2].x] == [pytest.approx(1 / 3), 0.5] and scores[0].parts == {"q1": 1.0, "q2": 0.0, "q3": 1.0}
    assert scorer.metric_name == "dpg" and scorer.deviations == ()


def test_the_judge_is_asked_every_question_and_one_hole_is_a_hole_of_the_image():
    def answer(body, number):
        text = text_of(body)
        return said("Perhaps" if "lamp" in text and body["max_tokens"] == 7 else "**No**, none." if "on it" in text else "Yes.")

    with serving(answer) as server:
        config = {"base_url": server.url, "pause": 0.01}
        scores = dpg_judge.load(dpg_judge.Config(**config)).score(samples())
        assert [scores[0].x, scores[2].x] == [pytest.approx(2 / 3), 1.0] and scores[1].kind == "missing"
        (hole, _, _) = dpg_judge.load(dpg_judge.Config(**config, max_tokens=7)).score(samples())
        assert hole.kind == "parse" and "neither yes nor no" in hole.message


@pytest.mark.parametrize(("text", "answer"), [("Yes", 1), (" no.", 0), ("**Yes**", 1), ("NO\n", 0), ('"yes"', 1)])
def test_replies(text, answer):
    assert dpg_judge.yes_or_no(text) == answer
    for other in ("Nothing", "yesterday", "", "I see yes"):
        with pytest.raises(ValueError):
            dpg_judge.yes_or_no(other)


# The suite.


PARTS = st.lists(st.tuples(st.integers(0, 5), st.tuples(*[st.booleans()] * 3)), min_size=1, max_size=16)


@settings(deadline=None, max_examples=50)
@given(drawn=PARTS, draw=st.data(), times=st.integers(2, 3))
def test_order_and_copies_do_not_matter(drawn, draw, times):
    rows = []
    for at, (prompt, answers) in enumerate(drawn):
        said_ = {n: float(answer) for n, answer in enumerate(answers, 1)}
        rows.append(row("dpg", graph.score(CHAIN, said_), ("entity",), str(prompt), at, meta(), **graph.parts(said_)))
    for compat in ("fixed", "upstream"):
        found = suite.Evaluator(compat).aggregate(rows)
        for other in (draw.draw(st.permutations(rows)), rows * times):
            assert suite.Evaluator(compat).aggregate(other) == pytest.approx(found, abs=1e-9)


def test_nothing_is_undefined_not_zero():
    assert set(suite.Evaluator().aggregate([]).values()) == {None}


@needs("dpg_bench")
@pytest.mark.parametrize("name", ["dpg", "dpg_judge"])
def test_a_slice_from_end_to_end(name, tmp_path, monkeypatch, blip):
    add_data({"dpg": "dpg_bench/prompts.jsonl"})
    items = data.load_json_lines(SHARED / "dpg_bench" / "prompts.jsonl")
    rows = [question(item["item_id"], n, p, f"Is there a thing {n}?") for item in items for n, p in ((1, "0"), (2, "1"), (3, "1,2"))]
    _, file = write(tmp_path, rows, {})
    real = data.data_path
    monkeypatch.setattr(data, "data_path", lambda source: file if source == "dpg-questions" else real(source))
    with serving(lambda body, number: said("No" if "thing 2" in text_of(body) else "Yes")) as server:
        options = blip if name == "dpg" else {"base_url": server.url}
        sets = {f"{name}.{key}": value for key, value in options.items()}
        result = run_suite(tmp_path / "r", name, sets, 3, "--images-per-prompt", "2")
    assert result.counts.scored == 6 and 0 <= result.metrics["overall"].value <= 100
    if name == "dpg":
        assert any(one.field == "dpg.vqa" and "dpg-blip" in one.why for one in result.deviations)
    else:
        assert result.metrics["overall"].value == pytest.approx(100 / 3) and result.metrics["attribute"].value == 0.0
