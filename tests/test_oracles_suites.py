"""Whole official scripts and functions beside our rules and means, on random input: GenEval, WISE, T2I-CompBench, MME, yes or no."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import string
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.suites import official, oracle, row
from hypothesis import given, settings
from hypothesis import strategies as st
from mmalign.evaluators import _compbench, _geneval, mme, wise, wise_verified

from mmalign.scorers import blip_vqa, yes_no
from mmalign.scorers import wise as wise_rule
from mmalign.scorers._geneval_verdict import keep
from mmalign.types import Row


def printed(path: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What an official script says."""
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(path), run_name="__main__")
    return said.getvalue()


# GenEval.


def test_kept_detections_are_the_official_ones() -> None:
    path = oracle("geneval", "evaluation/evaluate_images.py") / "evaluation" / "evaluate_images.py"
    seen: dict[str, Any] = {}
    space = {"np": np, "json": json, "inference_detector": lambda *_: ([seen["boxes"]],), "object_detector": None, "classnames": ["cup"]}
    space |= {"Image": SimpleNamespace(open=lambda _: None), "ImageOps": SimpleNamespace(exif_transpose=lambda image: image)}
    limits = {"THRESHOLD": 0.3, "COUNTING_THRESHOLD": 0.9, "MAX_OBJECTS": 16, "NMS_THRESHOLD": 1.0}
    judge, _ = official(path, "evaluate_image", "compute_iou", **space, **limits, evaluate=lambda *_: (True, ""))
    edges = [0.3, 0.9, float(np.nextafter(np.float32(0.3), np.float32(1))), 0.0, 1.0]

    @settings(max_examples=1000, deadline=None)
    @given(scores=st.lists(st.one_of(st.floats(0, 1, width=32), st.sampled_from(edges)), max_size=40, unique=True), counts=st.booleans())
    def same(scores: list[float], counts: bool) -> None:
        boxes = np.zeros((len(scores), 5), np.float32)
        boxes[:, 0], boxes[:, 4] = np.arange(len(scores)), scores
        seen["boxes"] = boxes
        found = judge("a.png", {"tag": "counting" if counts else "colors", "prompt": "p"})
        kept = [int(box[0]) for box in json.loads(found["details"]).get("cup", [])]
        assert keep(boxes[:, 4], 0.9 if counts else 0.3) == kept

    same()


@pytest.mark.parametrize("seed", range(5))
def test_geneval_means_are_those_of_the_official_script(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = oracle("geneval", "evaluation/summary_scores.py", "evaluation/object_names.txt") / "evaluation" / "summary_scores.py"
    random = np.random.default_rng(seed)
    lines, rows = [], []
    for number in range(60):
        tag, prompt = _geneval.TASKS[number % 6], f"p{number}"
        for index in range(4):
            is_right = bool(random.random() < 0.4)
            lines.append({"filename": "f", "tag": tag, "prompt": prompt, "correct": is_right, "reason": "", "metadata": prompt})
            rows.append(row("geneval", float(is_right), (tag,), prompt, index, correct=float(is_right), strict=0.0, soft=0.0))
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = printed(path, str(tmp_path / "results.jsonl"), monkeypatch=monkeypatch)
    found = _geneval.means(rows)
    assert f"Overall score (avg. over tasks): {found['overall']:.5f}" in said
    assert f"% correct images: {found['images']:.2%}" in said and f"% correct prompts: {found['prompts']:.2%}" in said
    assert all(f"{task:<16} = {found[task]:.2%} (" in said for task in _geneval.TASKS)


# WISE.


def of(module: Any, number: int, x: float, **parts: float) -> Row:
    group = next(name for name, group in module.GROUPS.items() if group.first <= number <= group.last)
    return row(module.Evaluator.scorers[0], x, (group,), str(number), **parts)


@pytest.mark.parametrize(("module", "file"), [(wise, "WISE_legacy/Calculate.py"), (wise_verified, "calculate_verified.py")])
def test_wise_totals_are_those_of_the_official_scripts(module: Any, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, random = oracle("wise", file) / file, np.random.default_rng(7)
    lines, rows = [], []
    for number in map(int, random.permutation(np.arange(1, 1001))):
        if module is wise:
            ratings = {name: int(random.integers(0, 3)) for name in wise.RATINGS}
            lines.append({"prompt_id": number, **ratings})
            rows.append(of(module, number, wise_rule.wiscore(ratings), **{name: rating / 2 for name, rating in ratings.items()}))
        else:
            score = int(random.integers(0, 2))
            lines.append({"prompt_id": number, "score": score})
            rows.append(of(module, number, float(score)))
    (tmp_path / "all_scores.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = printed(path, str(tmp_path / "all_scores.jsonl"), monkeypatch=monkeypatch)
    found = module.Evaluator().aggregate(rows)
    last = said.strip().splitlines()[-1].split()
    assert last == [f"{found[name]:.2f}" for name in (*module.GROUPS, "overall")]


# T2I-CompBench.


def test_questions_are_cleaned_as_officially() -> None:
    path = oracle("t2icb", "BLIPvqa_eval/data/utils.py") / "BLIPvqa_eval" / "data" / "utils.py"
    clean = official(path, "pre_question", re=re)

    @settings(max_examples=1000, deadline=None)
    @given(phrase=st.text(string.ascii_letters + '.!"()*#:;~ -?', max_size=60))
    def same(phrase: str) -> None:
        assert blip_vqa.question_of(phrase) == clean(f"{phrase}?", blip_vqa.MAX_WORDS)

    same()


def test_three_in_one_is_that_of_the_official_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = oracle("t2icb", "3_in_1_eval/3_in_1.py", "examples/dataset/complex_val_action.txt")
    random, lists = np.random.default_rng(3), home / "examples" / "dataset"
    prompts = (lists / "complex_val.txt").read_text().splitlines()
    places = {"attribute": "annotation_blip", "spatial": "labels/annotation_obj_detection_2d", "action": "annotation_clip"}
    scores = {aspect: random.random(10 * len(prompts)) for aspect in places}
    for aspect, place in places.items():
        (tmp_path / place).mkdir(parents=True)
        answers = [{"question_id": at, "answer": str(x)} for at, x in enumerate(scores[aspect])]
        (tmp_path / place / "vqa_result.json").write_text(json.dumps(answers))
    printed(home / "3_in_1_eval" / "3_in_1.py", "--outpath", str(tmp_path), "--data_path", str(lists), monkeypatch=monkeypatch)
    expected = [one["answer"] for one in json.loads((tmp_path / "annotation_3_in_1" / "vqa_result.json").read_text())]
    kinds = {kind: _compbench._members((lists / f"complex_val_{kind}.txt").read_text().splitlines()) for kind in ("spatial", "action")}
    for at, prompt in enumerate(prompts):
        aspects = ("attribute", *_compbench._asked("complex", prompt.strip(), {}, kinds)["aspects"])
        for image in range(10 * at, 10 * at + 10):
            assert np.mean([scores[aspect][image] for aspect in aspects]) == pytest.approx(expected[image])
    assert len(expected) == 3000


# MME, and yes or no.


PIECES = st.lists(st.sampled_from(["yes", "Yes", "no", "No", "y", "n", " ", ".", "N/A", "not", "know", "a cat", ","]), max_size=4).map(
    "".join
)


def test_mme_points_are_those_of_the_official_tool(tmp_path: Path) -> None:
    path = oracle("mme", "eval_tool/calculation.py") / "eval_tool" / "calculation.py"
    metrics = pytest.importorskip("sklearn.metrics", reason="the official tool needs scikit-learn")
    import os

    names = ("accuracy_score", "precision_score", "recall_score", "confusion_matrix")
    space = {"os": os, **{name: getattr(metrics, name) for name in names}}
    tool, _ = official(path, "calculate_metrics", "eval_type_dict", **space)
    random = np.random.default_rng(5)
    said = ("Yes", "no", "Yes, it is", "no way", "Not sure", "  yes", "N/A", "perhaps", "know")
    rows = []
    for task in (*mme.PERCEPTION, *mme.COGNITION):
        lines = []
        for picture in range(40):
            for question, label in (("a?", "Yes"), ("b?", "No")):
                answer = said[int(random.integers(len(said)))]
                lines.append(f"{picture}.jpg\t{question}\t{label}\t{answer}\n")
                read = yes_no.read(answer + "\n", "mme")
                meta = {"label": label.lower(), "picture": f"{task}/{picture}.jpg"}
                parts = {"yes": float(read == "yes"), "unparsed": float(read == "unparsed")}
                rows.append(row("yes_no", float(read == label.lower()), (task,), f"{task}-{picture}{question}", meta=meta, **parts))
        (tmp_path / f"{task}.txt").write_text("".join(lines))
    spoken = io.StringIO()
    with contextlib.redirect_stdout(spoken):
        tool().process_result(str(tmp_path))
    text, found = spoken.getvalue(), mme.Evaluator().aggregate(rows)
    totals = [float(number) for number in re.findall(r"total score: (\S+)", text)]
    assert totals == pytest.approx([found["perception"], found["cognition"]])
    own = {task: float(points) for task, points in re.findall(r"(\w+)\s+score: (\S+)", text) if task != "total"}
    assert own == pytest.approx({task: found[task] for task in own}) and len(own) == 14


@pytest.mark.parametrize(
    ("place", "name", "rule", "words"),
    [
        ("mme/eval_tool/calculation.py", "calculate_metrics", "mme", {"yes": "yes", "no": "no", "other": "unparsed"}),
        ("lmms/lmms_eval/tasks/mme/utils.py", "parse_pred_ans", "lmms_mme", {"yes": "yes", "no": "no", "other": "unparsed"}),
    ],
)
def test_answers_are_read_as_officially(place: str, name: str, rule: Any, words: dict[str, str]) -> None:
    home, _, file = place.partition("/")
    found = official(oracle(home, file) / file, name)
    read = (lambda text: found().parse_pred_ans(text.lower())) if rule == "mme" else found

    @settings(max_examples=1000, deadline=None)
    @given(text=PIECES)
    def same(text: str) -> None:
        assert yes_no.read(text, rule) == words[read(text)]

    same()


def test_words_are_read_as_by_vlmevalkit() -> None:
    """Words with blanks between them; ours also parts words at a full stop or apostrophe inside them, where VLMEvalKit joins them."""
    home = oracle("vlmek", "vlmeval/smp/misc.py", "vlmeval/dataset/utils/yorn.py") / "vlmeval"
    strip = official(home / "smp" / "misc.py", "process_punctuation", re=re)
    extract = official(home / "dataset" / "utils" / "yorn.py", "YOrN_Extraction", process_punctuation=strip)
    said = {"Yes": "yes", "No": "no", "Unknown": "unparsed"}

    @settings(max_examples=1000, deadline=None)
    @given(words=st.lists(st.sampled_from(["yes", "Yes,", "NO", "no.", "not", "nothing", "(yes)", "know", "sure!", "cat"]), max_size=6))
    def same(words: list[str]) -> None:
        assert yes_no.read(" ".join(words), "words") == said[extract(" ".join(words))]

    same()
