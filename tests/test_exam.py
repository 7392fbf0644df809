"""How answers to questions are read: by hand, on the golden texts, and on random ones beside the official parsers."""

import random
import re
import string
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.suites import official, oracle, sample
from hypothesis import given
from hypothesis import strategies as st

from mmalign.scorers import _choices, _open_answers, exam
from mmalign.types import Failure, Prompt, Value

METALS = dict(zip("ABCD", ("tin", "zinc", "iron", "gold"), strict=True))
CHOICE_RULES = ("mmmu", "lmms_mmmu", "lmms_mmt", "can_infer", "vlmevalkit", "first")
ROUNDS = 1000


# Reading a letter.


def test_golden_choices():
    texts = ("Answer: D.", "DNA is here", "The metal in the picture must be zinc", "A or B")
    assert [_choices.read(text, METALS, "lmms_mmmu") for text in texts] == ["D", "A", "B", "B"]
    assert [_choices.read(text, METALS, "mmmu") for text in texts] == ["D", None, "B", "B"], "MMMU's own asks for a blank before the letter"


@pytest.mark.parametrize(
    ("rule", "text", "letter"),
    [
        ("mmmu", "(C) or rather (A)", "A"),
        ("mmmu", "It is zinc", None),  # too short for an option's text to count
        ("mmmu", "I think that gold is not it, tin is", "A"),
        ("lmms_mmt", "The metal in the picture must be zinc", None),
        ("lmms_mmmu", "maybeB.then", "B"),
        ("can_infer", "The answer is: B!", "B"),
        ("can_infer", "A or B", None),
        ("can_infer", "it is Zinc", "B"),
        ("can_infer", "zinc or tin", None),
        ("can_infer", "Z", None),
        ("can_infer", "Z, not zinc", None),
        ("can_infer", "Cannot determine the answer, zinc?", None),
        ("can_infer", "B is what I would call it", "B"),
        ("vlmevalkit", "B is what I would call it", None),
        ("vlmevalkit", "The answer is **B** for reasons that take many words to tell", "B"),
        ("vlmevalkit", "zinc", "B"),
        ("vlmevalkit", "zinc, which is long known to us all by now", None),
        ("first", " b) zinc", "B"),
        ("first", "Dog", "D"),
        ("first", "zinc", None),
        ("first", "", None),
    ],
)
def test_rules_by_hand(rule, text, letter):
    assert _choices.read(text, METALS, rule) == letter


@given(text=st.text("ABCDZ().,: *isnwert", max_size=30))
def test_a_letter_read_is_an_option_or_none(text):
    for rule in CHOICE_RULES:
        assert _choices.read(text, METALS, rule) in (*METALS, None)
    assert _choices.read("", METALS, "mmmu") is None


# Reading an open answer.


@pytest.mark.parametrize(
    ("answer", "right", "is_right"),
    [
        ("Therefore, the speed is 7 feet.", ["7"], True),
        ("x = 3.4289", ["24/7", "3.43"], True),
        ("1,234", ["1234"], True),
        ("The answer is 1.2e3", ["1200"], True),
        ("it is MgS", ["$MgS$", "MgS"], True),
        ("the capital", ["a"], False),  # a single letter counts as a word alone
        ("option c is", ["C"], True),
        ("17", ["7"], False),
        ("", ["7"], False),
        ("so it is 5\nfinal answer 6", ["5"], True),
        ("so it is :", ["7"], False),
    ],
)
def test_open_answers_of_mmmu(answer, right, is_right):
    assert _open_answers.is_right(answer, right, "mmmu") is is_right


@pytest.mark.parametrize(
    ("rule", "right_ones", "wrong_ones"),
    [
        ("exact", ["yes"], ["Yes", "yes.", " yes"]),
        ("llava", ["yes", "Yes.", " YES.. "], ["yes!", "yes it is"]),
        ("lmms", ["yes", "Yes.", "Y,es!"], [" yes", "a yes"]),
        ("vlmevalkit", ["Yes", " YES "], ["yes."]),
    ],
)
def test_short_answers(rule, right_ones, wrong_ones):
    assert [_open_answers.is_right(text, ["yes"], rule) for text in (*right_ones, *wrong_ones)] == [True] * len(right_ones) + [False] * len(
        wrong_ones
    )


# The scorer.


def asked(answer, text, **meta):
    return sample(Prompt("1", "Which?", (), {"answer": answer, **meta}), answer=text)


def test_the_scorer_compares_letters_and_words():
    scorer = exam.load()
    found = scorer.score([asked("B", "(B)", options=METALS), asked("B", "hm", options=METALS), asked(["7", "seven"], "it is seven")])
    assert found == [
        Value(1.0, {"unparsed": 0.0}, detail="B"),
        Value(0.0, {"unparsed": 1.0}, detail="unparsed"),
        Value(1.0, {"unparsed": 0.0}, detail="it is seven"),
    ]
    assert scorer.score([asked("7", " . ")]) == [Value(0.0, {"unparsed": 1.0}, detail="")]
    assert exam.load(exam.Config("can_infer")).fingerprint != scorer.fingerprint


def test_what_is_no_question_is_a_failure():
    one = [asked("E", "(B)", options=METALS), asked("", "x"), asked(None, "x"), asked("B", None, options=METALS)]
    scores = exam.load().score(one)
    assert [score.kind for score in scores if isinstance(score, Failure)] == ["missing"] * 4
    assert "letter among its options" in scores[0].message and "holds no answer" in scores[3].message


def test_upstream_guesses_from_the_requests_own_seed_and_says_so():
    prompt = Prompt("1", "Which?", (), {"answer": "B", "options": METALS})
    samples = [sample(prompt, seed, answer="hm") for seed in range(400)]
    scorer = exam.load(exam.Config(compat="upstream"))
    scores = scorer.score(samples)
    assert scores == scorer.score(samples) and all(score.parts == {"unparsed": 1.0} and score.detail == "unparsed" for score in scores)
    assert 60 < sum(score.x for score in scores) < 140  # a quarter, give or take four standard deviations
    matched = exam.load(exam.Config("can_infer", compat="upstream")).score(samples)
    assert sum(score.x for score in matched) == 0, "exact matching does not guess upstream either"


# Beside the official parsers.

WORDS = ("A", "B.", "(C)", "(A)", "D:", "a", "Z", "the", "is", "answer", "correct answer is **B**", "zinc", "Iron,", "gold", "tin", "so ")
WORDS += (
    "therefore",
    "=",
    "3.14",
    "1,000",
    "1e3",
    "-2",
    ".5",
    "\n",
    ". ",
    "could be ",
    "final ",
    "result ",
    "'",
    "!",
    "?",
    "DNA",
    "BA.",
    "x",
)


def drawn(seed):
    """Random answers made of what the parsers look for, and options for each."""
    source = random.Random(seed)
    for _ in range(ROUNDS):
        text = source.choice(("", " ")).join(source.choices(WORDS, k=source.randint(0, 9)))
        count = source.randint(2, 6)
        yield (
            text,
            dict(
                zip(string.ascii_uppercase, source.choices(("tin", "zinc", "Iron", "gold", "x", "red zinc", "3.14"), k=count), strict=False)
            ),
        )


def unguessed(path, name, **given):
    """An official parser whose random choice says nothing."""
    return official(path, name, random=SimpleNamespace(choice=lambda letters: None), np=np, **given)


def test_mmmus_parser():
    parse = unguessed(oracle("mmmu", "mmmu/utils/eval_utils.py") / "mmmu/utils/eval_utils.py", "parse_multi_choice_response")
    for text, options in drawn(1):
        assert _choices.read(text, options, "mmmu") == parse(text, list(options), options), (text, options)


def test_mmmus_open_parser():
    names = ("parse_open_response", "eval_open", "extract_numbers", "normalize_str", "check_is_number")
    parse, agrees, *_ = official(oracle("mmmu", "mmmu/utils/eval_utils.py") / "mmmu/utils/eval_utils.py", *names, re=re)
    source = random.Random(2)
    for text, _ in drawn(2):
        right = source.choices(("zinc", "3.14", "1000", "a", "x", "-2", "1,000", "gold", "is"), k=source.randint(1, 2))
        claims = parse(text)
        assert set(_open_answers.said(text)) == set(claims), text
        assert _open_answers.is_right(text, right, "mmmu") == agrees(right, claims), (text, right)


def test_lmms_evals_parsers():
    folder = oracle("lmms", "lmms_eval/tasks/_task_utils/mmmu_mcq_utils.py", "lmms_eval/tasks/mmt/utils.py") / "lmms_eval/tasks"
    mmmu = unguessed(folder / "_task_utils/mmmu_mcq_utils.py", "parse_mmmu_multi_choice_response")
    mmt = unguessed(folder / "mmt/utils.py", "parse_multi_choice_response")
    process, share = official(folder / "seedbench/utils.py", "seed_process_result", "seed_aggregation_result")
    for text, options in drawn(3):
        assert _choices.read(text, options, "lmms_mmmu") == mmmu(text, list(options), options), (text, options)
        assert _choices.read(text, options, "lmms_mmt") == mmt(text, list(options)), (text, options)
        judged = process({"answer": "B", "data_type": "image", "question_id": "1"}, [text])["seed_all"]
        assert float(_choices.read(text, options, "first") == "B") == share([judged]), text


def test_lmms_evals_exact_match():
    folder = oracle("lmms", "lmms_eval/api/metrics.py")
    match = official(folder / "lmms_eval/api/metrics.py", "exact_match_hf_evaluate", np=np, string=string)
    golden = [("Yes.", "yes"), ("a cat", "cat")]
    assert match(*map(list, zip(*golden, strict=True)), ignore_case=True, ignore_punctuation=True)["exact_match"] == 0.5
    assert [_open_answers.is_right(text, [right], "lmms") for text, right in golden] == [True, False]
    for text, options in drawn(4):
        right = options["A"]
        found = match([text], [right], ignore_case=True, ignore_punctuation=True)["exact_match"]
        assert _open_answers.is_right(text, [right], "lmms") == bool(found), (text, right)


@pytest.mark.parametrize(
    ("name", "path", "rule"),
    [("mmt", "vlmeval/utils/matching_util.py", "can_infer"), ("vlmek", "vlmeval/utils/matching_util.py", "vlmevalkit")],
)
def test_vlmevalkits_matching(name, path, rule):
    import copy
    import os

    wanted = ["can_infer", "can_infer_option", "can_infer_text"] + (["_VERBOSE_ANSWER_RE"] if rule == "vlmevalkit" else [])
    infer, *_ = official(oracle(name, path) / path, *wanted, cp=copy, os=os, re=re, string=string)
    for text, options in drawn(5):
        found = infer(text, dict(options))
        assert _choices.read(text, options, rule) == (found if found in options else None), (text, options)


def test_vlmevalkits_accuracy():
    place = oracle("vlmek", "vlmeval/dataset/utils/vqa_eval.py") / "vlmeval/dataset/utils/vqa_eval.py"
    process = official(place, "process_line", istype=lambda text, kind: False, np=np)
    for text in ("Yes", "yes.", " YES ", "no", "yes it is"):
        (found,) = process({"answer": "yes", "prediction": text}, method="accuracy")["match"]
        assert _open_answers.is_right(text, ["yes"], "vlmevalkit") == bool(found), text
