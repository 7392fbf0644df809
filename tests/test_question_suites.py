"""MMT-Bench, MMMU, GQA and SEED-Bench: made-up questions in the official layouts, prompts, numbers, and runs by the bundled checkpoint."""

import base64
import contextlib
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.suites import official, oracle, run_suite
from hypothesis import given, settings
from hypothesis import strategies as st
from mmalign.evaluators import gqa, mmmu, mmt_bench, seed_bench

from mmalign import data, images, registry
from mmalign.types import MmalignError, Prompt, Request, Row, Sample, UsageError, Value

SUITES = {"mmt_bench": mmt_bench, "mmmu": mmmu, "gqa": gqa, "seed_bench": seed_bench}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "data"))


def picture(seed, height=32, width=32):
    return images.encode_png(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pin(monkeypatch, name, path):
    """Let made-up data stand for the published file: the card's checksum becomes that of `path`."""
    from dataclasses import replace

    known = data.sources()
    changed = {**known, name: replace(known[name], sha256=data.sha256(path))}
    monkeypatch.setattr(data, "sources", lambda cards=(): changed)


# Made-up questions, as published.


def made_mmt(folder, monkeypatch, **changes):
    """Three questions: the second shares the first's picture, the third has two and a hint."""
    tool, gauge = (base64.b64encode(picture(seed)).decode() for seed in (1, 2))
    rows = [
        {"index": "17", "question": "Which tool?", "A": "saw", "B": "None", "answer": "B", "image": tool, "category": "tools"},
        {"index": "18", "question": "How many?", "A": "1", "B": "2", "C": "3", "answer": "C", "image": "17", "category": "tools"},
        {"index": "19", "hint": "Look.", "question": "What, in\tall?", "A": "x", "answer": "A", "category": "dials"},
        {"index": "20", "question": "No picture?", "A": "x", "answer": "A", "category": "dials"},
    ]
    rows[2]["image"] = str([tool, gauge])
    tasks = ("visual_recognition", "visual_recognition", "visual_code", "visual_code")
    table = pd.DataFrame([{**one, "l2-category": task, "split": "VAL", **changes} for one, task in zip(rows, tasks, strict=True)])
    table.to_csv(folder / "MMT-Bench_VAL.tsv", sep="\t", index=False)
    pin(monkeypatch, "mmt_bench", folder / "MMT-Bench_VAL.tsv")
    data.add("mmt_bench", folder / "MMT-Bench_VAL.tsv")


def mmmu_row(number, **changes):
    one = {"id": f"validation_Art_{number}", "question": "Who drew <image 1>?", "options": "['Ada', \"Bo's\", '<image 2>']", "answer": "B"}
    one |= {"question_type": "multiple-choice", **{f"image_{at}": None for at in range(1, 8)}}
    return one | {"image_1": {"bytes": picture(1), "path": "1.png"}, "image_2": {"bytes": picture(2, 16, 64), "path": "2.png"}} | changes


def made_mmmu(folder, rows):
    (folder / "Art").mkdir(exist_ok=True)
    pd.DataFrame(rows).to_parquet(folder / "Art" / "validation-00000-of-00001.parquet")
    data.add("mmmu", folder)


def gqa_question(text="Is it red?", answer="no", structural="verify", semantic="attr", group="color", **changes):
    types = {"structural": structural, "semantic": semantic, "detailed": "x"}
    return {"imageId": "n1", "question": text, "answer": answer, "types": types, "groups": {"global": group}, "isBalanced": True} | changes


def made_gqa(folder, questions):
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    (folder / "n1.jpg").write_bytes(picture(3))
    data.add("gqa", folder)
    return gqa.Evaluator(images=str(folder))


def seed_question(name="101", kind=5, answer="A", **changes):
    choices = {f"choice_{letter}": text for letter, text in zip("abcd", ("One", "Two", "Three", "Four"), strict=True)}
    one = {"answer": answer, "data_id": "454_291", "data_type": "image", "question": "How many towels?", "question_id": name}
    return one | choices | {"question_type_id": kind} | changes


def made_seed(folder, questions):
    (folder / "SEED-Bench.json").write_text(json.dumps({"questions": questions, "question_type": {}}))
    (folder / "454_291").write_bytes(picture(4))
    data.add("seed_bench", folder / "SEED-Bench.json")


# Prompts.


def test_mmt_bench_questions(tmp_path, monkeypatch):
    made_mmt(tmp_path, monkeypatch)
    first, second, third = mmt_bench.Evaluator().prompts()
    assert first.text == "Question: Which tool?\nOptions:\nA. saw\nB. None\nPlease select the correct answer from the options above. \n"
    assert first.tags == ("VR", "tools") and first.meta["options"] == {"A": "saw", "B": "None"} and first.meta["answer"] == "B"
    assert first.meta["images"] == second.meta["images"] and Path(first.meta["images"][0]).read_bytes() == picture(1)
    assert third.text.startswith("Hint: Look.\nQuestion: What, in\tall?\n") and third.tags == ("VP", "dials")
    assert [Path(path).read_bytes() for path in third.meta["images"]] == [picture(1), picture(2)]


def test_mmt_bench_refuses_what_is_not_its_table(tmp_path, monkeypatch):
    made_mmt(tmp_path, monkeypatch, answer="H")
    with pytest.raises(MmalignError, match="question 17: expected a meta-task of the 32 and an answer among A, B; got .* 'H'"):
        mmt_bench.Evaluator().prompts()
    with pytest.raises(MmalignError, match=r"mmt_bench-separate.*expected md5 c7d7b998|MMT-Bench_VAL_MI.tsv \(md5 c7d7b998"):
        data.add("mmt_bench-separate", tmp_path / "MMT-Bench_VAL.tsv")


def test_mmmu_questions(tmp_path):
    changes = {"question_type": "open", "options": "[]", "question": "How fast?"}
    made_mmmu(tmp_path, [mmmu_row(1), mmmu_row(2, **changes, answer="['24/7', '3.429']"), mmmu_row(3, **changes, answer="[x]")])
    choice, several, single = mmmu.Evaluator().prompts()
    assert choice.text == (
        "Who drew <image 1>?\n(A) Ada\n(B) Bo's\n(C) <image 2>\n\nAnswer with the option's letter from the given choices directly."
    )
    assert choice.tags == ("Art", "choice") and choice.meta["options"]["B"] == "Bo's" and choice.meta["answer"] == "B"
    assert [Path(path).read_bytes() for path in choice.meta["images"]] == [picture(1), picture(2, 16, 64)]
    assert several.text == "How fast?\nAnswer the question using a single word or phrase." and several.tags == ("Art", "open")
    assert several.meta["answer"] == ["24/7", "3.429"] and "options" not in several.meta and len(several.meta["images"]) == 1
    assert single.meta["answer"] == ["[x]"]


def test_mmmu_pictures_for_models_that_read_one(tmp_path):
    made_mmmu(tmp_path, [mmmu_row(1)])
    (first,) = mmmu.Evaluator(pictures="first").prompts()
    assert [Path(path).read_bytes() for path in first.meta["images"]] == [picture(1)]
    (together,) = mmmu.Evaluator(pictures="joined").prompts()
    (path,) = together.meta["images"]
    joined = images.decode_image(Path(path))
    assert joined.shape == (32, 32 + 16 + 128, 3) and (joined[:, 32:48] == 255).all()
    assert (joined[:, :32] == images.decode_image(picture(1))).all()


def test_mmmu_asks_as_the_official_configuration_says(tmp_path):
    import yaml

    folder = oracle("mmmu", "mmmu/utils/data_utils.py", "mmmu/configs/llava1.5.yaml") / "mmmu"
    construct = official(folder / "utils/data_utils.py", "construct_prompt")
    written = yaml.safe_load((folder / "configs/llava1.5.yaml").read_text())
    options = {name: value[0] if isinstance(value, list) else value for name, value in written.items()}
    rows = [mmmu_row(1), mmmu_row(2, question_type="open", options="[]", answer="7")]
    made_mmmu(tmp_path, rows)
    assert [prompt.text for prompt in mmmu.Evaluator().prompts()] == [construct(one, options)["final_input_prompt"] for one in rows]


def test_gqa_questions(tmp_path):
    unbalanced = gqa_question(isBalanced=False)
    suite = made_gqa(tmp_path, {"7": gqa_question(), "8": unbalanced, "9": gqa_question("What?", "a cat", "query", "obj", None)})
    first, second = suite.prompts()
    assert (first.id, first.text, first.tags) == ("7", "Is it red?\nAnswer the question using a single word or phrase.", ("verify", "attr"))
    assert first.meta == {"images": [str((tmp_path / "n1.jpg").resolve())], "answer": "no", "group": "color"}
    assert second.meta["group"] is None
    made_gqa(tmp_path, {"7": gqa_question(structural="guess")})
    with pytest.raises(MmalignError, match="question 7: the types guess and attr"):
        suite.prompts()
    made_gqa(tmp_path, {"7": {"question": "?"}})
    with pytest.raises(MmalignError, match="question 7: GQA's fields are expected; 'types' is missing"):
        suite.prompts()


def test_seed_bench_questions(tmp_path):
    made_seed(tmp_path, [seed_question(), seed_question("v1", kind=10), seed_question("102", kind=1, answer="D")])
    ranked = seed_bench.Evaluator(images=str(tmp_path))
    first, second = ranked.prompts()
    assert (first.id, first.text, first.tag, ranked.task) == ("101", "How many towels?", "instances_counting", "choose")
    assert first.meta["options"] == {"A": "One", "B": "Two", "C": "Three", "D": "Four"} and second.meta["answer"] == "D"
    written = seed_bench.Evaluator("generated", str(tmp_path))
    assert written.task == "answer" and written.prompts()[0].text == (
        "How many towels?\nA. One\nB. Two\nC. Three\nD. Four\nAnswer with the option's letter from the given choices directly."
    )
    made_seed(tmp_path, [seed_question(answer="E")])
    with pytest.raises(MmalignError, match="question 101: expected an answer among A, B, C and D; got 'E'"):
        ranked.prompts()


def test_seed_bench_asks_as_lmms_eval_does(tmp_path):
    folder = oracle("lmms", "lmms_eval/tasks/seedbench/utils.py") / "lmms_eval/tasks/seedbench"
    made_seed(tmp_path, [seed_question()])
    (prompt,) = seed_bench.Evaluator("generated", str(tmp_path)).prompts()
    assert prompt.text == official(folder / "utils.py", "seed_doc_to_text")(seed_question())


@pytest.mark.parametrize("name", SUITES)
def test_one_split_and_what_to_do_without_data(name, tmp_path):
    suite = SUITES[name].Evaluator(**({"images": str(tmp_path)} if name in ("gqa", "seed_bench") else {}))
    with pytest.raises(UsageError, match="one split"):
        suite.prompts("train")
    if name != "mmt_bench":  # its file has an address and a checksum, and would be fetched
        with pytest.raises(
            MmalignError, match=f"No checksum of it is published, so it is not fetched.*mmalign data add {name} --from PATH"
        ):
            suite.prompts()
    card = registry.card(registry.find("evaluators", name))
    assert card.headline in suite.aggregate([])


# Numbers.


def answered(tags, x, prompt="p", unparsed=0.0, detail="", **meta):
    request = Request(Prompt(prompt, "?", tuple(tags), meta), 0, 0)
    return Row(request, Sample(request), {"exam": Value(float(x), {"unparsed": unparsed}, detail=detail)})


def test_mmt_bench_golden_numbers():
    rows = [answered((code, "a"), 1, f"{code}{n}") for code in mmt_bench.TASKS.values() for n in range(3)]
    rows += [answered((code, "b"), 0, f"{code}-b") for code in mmt_bench.TASKS.values()]
    found = mmt_bench.Evaluator().aggregate(rows)
    assert found["overall"] == 0.75 and {found[code] for code in mmt_bench.TASKS.values()} == {0.5}


def test_mmt_bench_numbers_are_the_official_ones():
    path = oracle("mmt", "vlmeval/evaluate/multiple_choice.py") / "vlmeval/evaluate/multiple_choice.py"
    from collections import defaultdict

    report, names = official(path, "report_acc_MMT", "MMT_abbrs", np=np, pd=pd, defaultdict=defaultdict)
    assert names == mmt_bench.TASKS
    source = random.Random(0)
    for _ in range(20):
        table = [
            {"category": f"{task}/{source.randint(0, 3)}", "l2-category": task, "hit": source.randint(0, 1)}
            for task in mmt_bench.TASKS
            for _ in range(source.randint(1, 9))
        ]
        theirs = report(pd.DataFrame(table)).iloc[-1]
        ours = mmt_bench.Evaluator().aggregate(
            [answered((names[one["l2-category"]], one["category"]), one["hit"], str(n)) for n, one in enumerate(table)]
        )
        assert ours["overall"] == pytest.approx(theirs["Overall"])
        assert {code: ours[code] for code in names.values()} == pytest.approx({code: theirs[code] for code in names.values()})


def test_mmmu_numbers_are_the_official_ones():
    place = oracle("mmmu", "mmmu/utils/data_utils.py") / "mmmu/utils"
    assert list(official(place / "data_utils.py", "DOMAIN_CAT2SUB_CAT").values()) == [list(one) for one in mmmu.DISCIPLINES.values()]
    level = official(place / "eval_utils.py", "calculate_ins_level_acc", Dict=dict)
    source = random.Random(0)
    rows = [answered((source.choice(mmmu.SUBJECTS), "choice"), source.randint(0, 1), str(n)) for n in range(300)]
    found = mmmu.Evaluator().aggregate(rows)
    sizes = {one: sum(row.tag == one for row in rows) for one in mmmu.SUBJECTS}
    of = {one: {"acc": found[one], "num_example": sizes[one]} for one in mmmu.SUBJECTS if sizes[one]}
    assert found["overall"] == pytest.approx(level(of))
    for name, own in mmmu.DISCIPLINES.items():
        assert found[name] == pytest.approx(level({one: of[one] for one in own if one in of}))


def test_gqa_by_hand():
    rows = [
        answered(("query", "obj"), 1, "1", detail="cat", answer="cat", group="animal"),
        answered(("query", "obj"), 0, "2", detail="dog", answer="cow", group="animal"),
        answered(("verify", "attr"), 1, "3", detail="yes", answer="yes", group=None),
    ]
    found = gqa.Evaluator().aggregate(rows)
    assert (found["accuracy"], found["open"], found["binary"], found["object"], found["scene"]) == (
        pytest.approx(2 / 3),
        0.5,
        1.0,
        0.5,
        None,
    )
    assert found["distribution"] == pytest.approx((0 + 1) / 100)  # cat once of once, cow never of once
    assert gqa.Evaluator().aggregate(rows[2:])["distribution"] is None


def test_gqa_numbers_are_those_of_the_official_script(tmp_path, monkeypatch):
    code = compile((oracle("gqa", "eval.py") / "eval.py").read_text(), "eval.py", "exec")
    source = random.Random(0)
    said = ("yes", "no", "red", "cat")
    for _ in range(20):
        kinds = [(source.choice(gqa.STRUCTURAL), source.choice(list(gqa.SEMANTIC))) for _ in range(50)]
        questions = {
            str(n): {**gqa_question("a b", source.choice(said), *kind, source.choice(("g", "h", None))), "semantic": []}
            for n, kind in enumerate(kinds)
        }
        answers = {name: source.choice(said) for name in questions}
        predictions = [{"questionId": name, "prediction": answer} for name, answer in answers.items()]
        choices = {name: {"valid": [], "plausible": []} for name in questions}
        contents = {"questions": questions, "predictions": predictions, "scenes": {}, "choices": choices}
        words = ["eval.py"]
        for name, content in contents.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
            words += [f"--{name}", str(tmp_path / f"{name}.json")]
        monkeypatch.setattr(sys, "argv", words)
        space = {"__name__": "eval"}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            exec(code, space)
        theirs = space["scores"]
        rows = [
            answered(kind, answers[name] == one["answer"], name, detail=answers[name], answer=one["answer"], group=one["groups"]["global"])
            for (name, one), kind in zip(questions.items(), kinds, strict=True)
        ]
        ours = gqa.Evaluator().aggregate(rows)
        for name in ("accuracy", "binary", "open"):
            assert 100 * ours[name] == pytest.approx(theirs[name])
        assert ours["distribution"] == pytest.approx(theirs["distribution"])
        for kind, (share, _) in theirs["accuracyPerStructuralType"].items():
            assert 100 * ours[kind] == pytest.approx(share)
        for kind, (share, _) in theirs["accuracyPerSemanticType"].items():
            assert 100 * ours[gqa.SEMANTIC[kind]] == pytest.approx(share)


def test_seed_bench_by_hand():
    rows = [answered(("visual_reasoning",), 1, "1"), answered(("visual_reasoning",), 0, "2", 1.0), answered(("spatial_relation",), 1, "3")]
    found = seed_bench.Evaluator().aggregate(rows)
    assert found["overall"] == pytest.approx(2 / 3) and found["visual_reasoning"] == 0.5 and found["spatial_relation"] == 1.0
    assert found["scene_understanding"] is None and found["unparsed"] == pytest.approx(1 / 3)


# What all four promise.

TAGS = {
    "mmt_bench": [("VR", "tools"), ("VR", "dials"), ("GN", "taps")],
    "mmmu": [("Art", "open"), ("Music", "choice"), ("Math", "open")],
    "gqa": [("query", "obj"), ("verify", "attr"), ("choose", "global")],
    "seed_bench": [("visual_reasoning",), ("spatial_relation",)],
}


def test_nothing_is_undefined_not_zero():
    for module in SUITES.values():
        assert set(module.Evaluator().aggregate([]).values()) == {None}


@settings(deadline=None, max_examples=40)
@given(drawn=st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.booleans()), min_size=1, max_size=12), draw=st.data())
def test_order_and_copies_do_not_matter(drawn, draw):
    for name, module in SUITES.items():
        rows = [
            answered(TAGS[name][kind % len(TAGS[name])], x, str(n), float(lost), str(x), answer="True", group=str(kind))
            for n, (kind, x, lost) in enumerate(drawn)
        ]
        found = module.Evaluator().aggregate(rows)
        for other in (draw.draw(st.permutations(rows)), rows * 2):
            assert module.Evaluator().aggregate(other) == pytest.approx(found, abs=1e-9)
        absent = {tag for tags in TAGS[name] for tag in tags} - {tag for row in rows for tag in row.request.prompt.tags}
        assert all(found[tag] is None for tag in absent & set(found))


# From end to end.


@pytest.mark.parametrize("name", SUITES)
def test_a_slice_from_end_to_end(name, tmp_path, monkeypatch):
    sets = {"sampling.max_tokens": 3}
    if name == "mmt_bench":
        made_mmt(tmp_path, monkeypatch)
    elif name == "mmmu":
        made_mmmu(tmp_path, [mmmu_row(1, options="['Ada', 'Bo']"), mmmu_row(2, question_type="open", options="[]"), mmmu_row(3)])
    elif name == "gqa":
        made_gqa(tmp_path, {"7": gqa_question(), "9": gqa_question("What?", "a cat", "query", "obj"), "10": gqa_question(imageId="lost")})
        sets["gqa.images"] = tmp_path
    else:
        made_seed(tmp_path, [seed_question(), seed_question("102", 1), seed_question("103", 2, data_id="lost")])
        sets["seed_bench.images"] = tmp_path
    result = run_suite(tmp_path / "r", name, sets, 3)
    assert (result.counts.expected, result.counts.scored) == (3, 2), result.counts
    several = name in ("mmt_bench", "mmmu")  # tiny-janus reads one picture; elsewhere the third question's is lost
    assert result.counts.failed == {"generate/error" if several else "generate/missing": 1} and result.status == "incomplete"
    assert result.metrics[result.headline].value in (0.0, 0.5, 1.0)
    assert {one.field for one in result.deviations} >= {"prompts", "sampling.max_tokens"}
    assert not {one.field for one in result.deviations} & {"exam.choice", "exam.open", "seed_bench.protocol"}


def test_the_likeliest_option_is_chosen_whatever_else_is_asked(tmp_path):
    from mmalign.models import janus

    model = janus.load(Path(janus.__file__).parents[1] / "testbed" / "checkpoints" / "tiny-janus")
    (tmp_path / "1.png").write_bytes(picture(5))
    texts = ("a red circle", "a blue square", "two green stars")
    turned = [dict(zip("ABC", texts[n:] + texts[:n], strict=True)) for n in range(3)]
    prompts = [Prompt("p", "what is this?", (), {"images": [str(tmp_path / "1.png")], "options": options}) for options in turned]
    requests = [Request(prompt, 0, n, settings={"task": "choose"}) for n, prompt in enumerate(prompts)]
    alone = [model.generate([request])[0] for request in requests]
    together = model.generate([*requests, Request(Prompt("4", "a dog", (), {}), 0, 4, settings={"task": "choose"})])
    assert [sample.extra for sample in together[:3]] == [sample.extra for sample in alone]
    assert together[3].kind == "missing" and "no options" in together[3].message
    chosen = {request.prompt.meta["options"][sample.answer] for request, sample in zip(requests, alone, strict=True)}
    assert len(chosen) == 1, "the order of the options does not decide"
    log_prob, mask = model.text_log_prob(["what is this?"] * 3, [images.decode_image(picture(5))] * 3, texts)
    losses = (-(log_prob * mask).sum(1) / mask.sum(1)).tolist()
    assert chosen == {texts[losses.index(min(losses))]}
    assert list(alone[0].extra["losses"].values()) == pytest.approx(losses, abs=1e-6)
    assert len({Request(one.prompt, 0, 0, settings=one.settings).key("m") for one in requests}) == 3, "other options, another answer"
    assert len({Request(one.prompt, 0, 0).key("m") for one in requests}) == 1
