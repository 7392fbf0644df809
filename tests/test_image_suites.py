"""Suites on scorers that were there before them: visual text, GenAI-Bench, GenEval with long prompts. Prompts, means, slices end to end."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from helpers import tiny_questions
from helpers.suites import add_data, needs, official, oracle, row, run_suite
from helpers.tiny_geneval import make_clip, make_detector
from hypothesis import given, settings
from hypothesis import strategies as st
from mmalign.evaluators import genai_bench, geneval, geneval_long, ocr_text

from mmalign import data
from mmalign.scorers import ocr
from mmalign.types import MmalignError, UsageError

GENAI = {
    f"genai_bench{infix}{part}": f"genai_bench/genai{size}/genai_{file}.json"
    for size, infix in (("1600", ""), ("527", "-527"))
    for part, file in (("", "image"), ("-skills", "skills"))
}
LONG = {"geneval": "geneval/evaluation_metadata.jsonl", "geneval-rewritten": "geneval/bagel_evaluation_metadata_long.jsonl"}
MODULES = (ocr_text, genai_bench, geneval_long)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "data"))


# Visual text.


@needs("flow_grpo")
def test_the_ocr_prompts():
    add_data({"ocr_text": "flow_grpo/ocr_test.txt"})
    prompts = ocr_text.Evaluator().prompts()
    assert len(prompts) == 1018 and prompts[-1].id == "01017"
    assert all(ocr.target_of(prompt.text) == ocr.plain(prompt.meta["target"]) != "" for prompt in prompts)
    assert Counter(prompt.tag for prompt in prompts).most_common(1)[0][0] == "words_3"
    letters = [len(ocr.plain(prompt.meta["target"])) for prompt in prompts]
    assert max(letters) == 27 and sum(letters) / 1018 == pytest.approx(14.8, abs=0.05)


def test_a_line_without_one_quoted_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "data_path", lambda name: tmp_path / "x.txt")
    for line in ("no text", 'two "a" and "b"', 'empty ""'):
        (tmp_path / "x.txt").write_text(f'good "one"\n{line}\n')
        with pytest.raises(MmalignError, match="line 2: expected one text"):
            ocr_text.Evaluator().prompts()


def test_the_accuracy_is_a_mean_over_images():
    rows = [row("ocr", x, (tag,), str(n)) for n, (x, tag) in enumerate([(1.0, "words_1"), (0.5, "words_1"), (0.0, "words_5+")])]
    found = ocr_text.Evaluator().aggregate(rows)
    assert found["accuracy"] == 0.5 and found["exact"] == pytest.approx(1 / 3)
    assert (found["words_1"], found["words_2"], found["words_5+"]) == (0.75, None, 0.0)


@pytest.mark.parametrize(
    ("lines", "share"), [(["0pen", "late!!"], 0.625), (["Open Late"], 1.0), ([], 0.0), (["Say Open Late now"], 1.0), (["late"], 0.5)]
)
def test_golden_readings_of_open_late(lines, share):
    assert ocr.accuracy(ocr.plain("".join(lines)), ocr.target_of('a sign that reads "Open Late"'))[0] == share


def test_the_rule_is_the_official_one_on_random_texts():
    path = oracle("flowgrpo", "flow_grpo/ocr.py") / "flow_grpo" / "ocr.py"
    import typing

    import numpy as np
    from PIL import Image
    from rapidfuzz.distance import Levenshtein

    read: list[str] = []
    reader = SimpleNamespace(ocr=lambda image, cls: [[(None, (line, 0.9)) for line in read]] if read else [None])
    torch = SimpleNamespace(no_grad=lambda: lambda function: function, Tensor=())
    space = {"np": np, "Image": Image, "torch": torch, "PaddleOCR": lambda **_: reader, "distance": Levenshtein.distance}
    scorer = official(path, "OcrScorer", **space, **{name: getattr(typing, name) for name in ("List", "Union", "Tuple")})()

    @settings(max_examples=1000, deadline=None)
    @given(lines=st.lists(st.text("abO l0", min_size=1, max_size=6), max_size=3), target=st.text("abOl 0", min_size=1, max_size=8))
    def same(lines, target):
        if not target.strip():
            return
        read[:] = lines
        (official_reward,) = scorer([np.zeros((8, 8, 3), np.uint8)], [f'a sign "{target}"'])
        assert ocr.accuracy(ocr.plain("".join(lines)), ocr.plain(target))[0] == pytest.approx(official_reward)

    same()


@needs("flow_grpo")
def test_a_slice_of_visual_text_from_end_to_end(tmp_path):
    add_data({"ocr_text": "flow_grpo/ocr_test.txt"})
    result = run_suite(tmp_path / "r", "ocr_text", {}, 5)
    assert result.counts.scored == 5 and 0 <= result.metrics["accuracy"].value <= 1


# GenAI-Bench.


@needs("genai_bench")
def test_the_genai_prompts():
    add_data(GENAI)
    prompts = genai_bench.Evaluator().prompts()
    assert [prompt.id for prompt in prompts] == [f"{number:05d}" for number in range(1600)]
    sizes = dict(zip(genai_bench.SKILLS, (722, 871, 553, 360, 386, 467, 195, 340, 162, 296, 347, 147), strict=True))
    assert Counter(tag for prompt in prompts for tag in prompt.tags) == {**sizes, "untagged": 7}
    assert not any({"basic", "advanced"} <= set(prompt.tags) for prompt in prompts)
    assert len(prompts[0].meta["ratings"]) == 6
    small = genai_bench.Evaluator(size="527").prompts()
    assert len(small) == 527 and small[0].id == "00001" and small[-1].id == "00527"
    assert Counter(prompt.tag for prompt in small) == {"basic": 214, "advanced": 313}
    with pytest.raises(UsageError, match="one split"):
        genai_bench.Evaluator().prompts("train")


def test_all_is_over_prompts_with_a_skill():
    rows = [
        row("vqascore", x, tags, str(n))
        for n, (x, tags) in enumerate([(0.9, ("basic", "scene")), (0.5, ("advanced",)), (0.1, ("untagged",))])
    ]
    found = genai_bench.Evaluator().aggregate(rows)
    assert found["all"] == pytest.approx(0.7) and found["every"] == pytest.approx(0.5) and found["basic"] == found["scene"] == 0.9
    assert found["spatial_relation"] is None


def test_skill_means_are_those_of_the_official_script(tmp_path, capsys):
    path = oracle("t2v", "genai_bench/evaluate.py") / "genai_bench" / "evaluate.py"
    import numpy as np
    import torch

    groups, show = official(path, "tag_groups", "show_performance_per_skill", json=json)
    generator = np.random.default_rng(0)
    skills = {skill: sorted(generator.choice(40, 9, replace=False).tolist()) for skill in genai_bench.SKILLS}
    (tmp_path / "genai_skills.json").write_text(json.dumps(skills))
    values = torch.rand(40, generator=torch.Generator().manual_seed(0))
    stub = SimpleNamespace(root_dir=str(tmp_path), dataset=dict.fromkeys(f"{number:05d}" for number in range(40)))
    show(values, stub, gen_model="ours")
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    tags = [tuple(skill for skill in skills if n in skills[skill]) or ("untagged",) for n in range(40)]
    found = genai_bench.Evaluator().aggregate([row("vqascore", float(values[n]), tags[n], str(n)) for n in range(40)])
    expected = [f"{found[name.replace(' ', '_')]:.2f}" for group in groups.values() for name in group]
    assert [word for line in printed if line[0] == "ours" for word in line[1:]] == expected


@needs("genai_bench")
def test_a_slice_of_genai_bench_from_end_to_end(tmp_path):
    add_data(GENAI)
    model, vision = tiny_questions.clip_t5(tmp_path / "t5")
    sets = {"vqascore.model": model, "vqascore.vision": vision, "vqascore.tokenizer": model, "vqascore.dtype": "float32"}
    result = run_suite(tmp_path / "r", "genai_bench", sets, 6)
    assert result.counts.scored == 6 and 0 < result.metrics["all"].value < 1
    (told,) = [one for one in result.deviations if one.field == "vqascore.model"]
    assert told.official == "zhiqiulin/clip-flant5-xxl" and told.used == str(model)


# GenEval with long prompts.


@needs("geneval")
def test_long_prompts_ask_for_the_same_things_in_more_words():
    add_data(LONG)
    short, long = geneval.Evaluator().prompts(), geneval_long.Evaluator().prompts()
    assert [prompt.tag for prompt in long] == [prompt.tag for prompt in short] and len(long) == 553
    assert [prompt.meta["include"] for prompt in long] == [prompt.meta["include"] for prompt in short]
    assert sum(len(a.text) < len(b.text) for a, b in zip(short, long, strict=True)) > 545
    with pytest.raises(UsageError, match="'geneval_long' has one split"):
        geneval_long.Evaluator().prompts("val")


@needs("geneval")
def test_a_slice_of_long_geneval_from_end_to_end(tmp_path):
    add_data({"geneval-rewritten": LONG["geneval-rewritten"]})
    sets = {"detector": make_detector(tmp_path / "d"), "clip": make_clip(tmp_path / "c"), "resolution": 64}
    result = run_suite(
        tmp_path / "r", "geneval_long", {f"geneval.{name}": value for name, value in sets.items()}, 6, "--images-per-prompt", "1"
    )
    assert result.counts.scored == 6 and result.metrics["overall"].value is not None and result.suite["title"] == "GenEval, long prompts"


# What all means promise.


def test_nothing_is_undefined_not_zero():
    for module in MODULES:
        assert set(module.Evaluator().aggregate([]).values()) == {None}, module.__name__


TAGS = {
    ocr_text: [(f"words_{count}",) for count in ("1", "2", "5+")],
    genai_bench: [("basic", "scene"), ("advanced",), ("untagged",)],
    geneval_long: [(task,) for task in geneval.TASKS],
}


@settings(deadline=None, max_examples=50)
@given(drawn=st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), min_size=1, max_size=20), draw=st.data(), times=st.integers(2, 3))
def test_order_and_copies_do_not_matter(drawn, draw, times):
    for module in MODULES:
        scorer = module.Evaluator.scorers[0]
        rows = [
            row(scorer, x, TAGS[module][n % len(TAGS[module])], str(at), correct=x, strict=x, soft=x) for at, (n, x) in enumerate(drawn)
        ]
        found = module.Evaluator().aggregate(rows)
        for other in (draw.draw(st.permutations(rows)), rows * times):
            assert module.Evaluator().aggregate(other) == pytest.approx(found, abs=1e-12)
