"""The GroundingDINO reward: phrase scores by plain loops, the rules and their official defects, batches and failures."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import tiny_questions as tiny

from mmalign.scorers import _grounding, groundingdino
from mmalign.scorers._grounding import Found, judge, relation
from mmalign.types import Failure, Value

LEFT, RIGHT, TOP, BOTTOM = (0.0, 0.4, 0.2, 0.6), (0.8, 0.4, 1.0, 0.6), (0.4, 0.0, 0.6, 0.2), (0.4, 0.8, 0.6, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.grounding_dino(tmp_path_factory.mktemp("dino"))


def make(folder, **options):
    return groundingdino.load(groundingdino.Config(**{"model": str(folder), "resolution": 96, "threshold": 0.5} | options))


def nouns_of(texts):
    return [tiny.sample(" ".join(nouns), seed, nouns=nouns) for seed, nouns in enumerate(texts)]


TEXTS = (["car"], ["red car", "dog"], ["cat", "dog"], ["hot dog stand", "car"], ["ball"], ["green ball", "cat", "car"], ["dog"])


def test_phrase_scores_are_those_of_plain_loops(folder):
    scorer = make(folder, threshold=1e-12)
    words, model = scorer.words, scorer.model
    for sample in nouns_of(TEXTS)[:4]:
        nouns = sample.request.prompt.meta["nouns"]
        text = " . ".join(nouns) + "."
        tokens = words(text, return_offsets_mapping=True)
        from transformers import GroundingDinoImageProcessorPil

        processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160})
        pixels = processor(images=sample.image, return_tensors="pt").pixel_values
        with torch.no_grad():
            output = model(pixel_values=pixels, input_ids=torch.tensor([tokens.input_ids]))
        expected = []
        at = 0
        for noun in nouns:
            parts = noun.split(" ")
            spans = {(at, at + len(parts[0])), (at + len(noun) - len(parts[-1]), at + len(noun))}
            at += len(noun) + 3
            chosen = [
                index
                for index, (start, end) in enumerate(tokens.offset_mapping)
                if end > start and any(start >= low and end <= high for low, high in spans)
            ]
            row = []
            for query in range(output.logits.shape[1]):
                total = sum(1 / (1 + math.exp(-float(output.logits[0, query, token]))) for token in chosen)
                row.append(total / (len(chosen) + 1e-6))
            expected.append(row)
        question = scorer._question(groundingdino.Item(sample, sample.image, "x"), tuple(nouns))
        (found,) = scorer._detect([question])
        assert [item.scores for item in found] == [pytest.approx(row, abs=1e-5) for row in expected]
        assert found[0].boxes[0] == pytest.approx(output.pred_boxes[0, 0].tolist(), abs=1e-5)


def test_batches_agree_and_keep_the_order(folder):
    scorer = make(folder)
    samples = nouns_of(TEXTS)
    alone = [scorer.score([sample])[0] for sample in samples]
    assert all(isinstance(score, Value) for score in alone)
    for size in (3, 7):
        scorer.config = dataclasses.replace(scorer.config, batch_size=size)
        together = scorer.score(samples)
        assert [(score.x, score.parts) for score in together] == [(score.x, score.parts) for score in alone]
    details = [
        scorer._detect([scorer._question(groundingdino.Item(sample, sample.image, "x"), ("cat", "dog"))])[0] for sample in samples[:2]
    ]
    assert details[0] != details[1], "a detector that sees the same in everything tests nothing"


def test_failures_are_typed_and_in_place(folder):
    scorer = make(folder)
    samples = [
        tiny.sample("", 1),
        tiny.sample("car", 2, image=None),
        tiny.sample("car", 3, size=(1, 1)),
        tiny.sample("car", 4, nouns=["car"] * 60),
        tiny.sample("car", 5, nouns=["car"], task_type="spatial"),
        tiny.sample("car", 6, nouns=["car"], task_type="spatial", spatial_info={"obj1": "car", "obj2": "dog", "locality": "above"}),
        tiny.sample("car", 7, image=b"x"),
        tiny.sample("c" * 10_000, 8),
    ]
    kinds = [score.kind for score in scorer.score(samples) if isinstance(score, Failure)]
    assert kinds == ["missing", "missing", "error", "error", "missing", "missing", "error", "error"]
    assert scorer.score([tiny.sample("x", 1, nouns=[])])[0] == Value(1.0, detail="the prompt names no thing")
    with torch.no_grad():
        next(scorer.model.parameters()).fill_(math.nan)
        for tensor in scorer.model.parameters():
            tensor.fill_(math.nan)
    (score,) = scorer.score([tiny.sample("car", 1, nouns=["car"])])
    assert isinstance(score, Failure) and score.kind == "nonfinite"


def test_nouns_come_from_the_text_without_determiners(folder):
    assert list(make(folder).score([tiny.sample("a red car and the dog", 1)])[0].parts) == ["red car", "dog"]


@pytest.mark.parametrize(
    ("size", "expected"), [((600, 800), (800, 1066)), ((800, 600), (1066, 800)), ((400, 1200), (444, 1332)), ((384, 384), (800, 800))]
)
def test_the_detectors_size_is_detrs(size, expected):
    assert groundingdino.detector_size(size, 800) == expected


def found(*boxes, score=0.9):
    return Found([box for box in boxes], [score - 0.1 * at for at in range(len(boxes))])


def no_nms(boxes, scores, overlap):
    return range(len(boxes))


def spatial(locality, compat, first=(0.1, 0.5, 0.1, 0.1), second=(0.9, 0.5, 0.1, 0.1)):
    meta = {"task_type": "spatial", "spatial_info": {"obj1": "a", "obj2": "b", "locality": locality}}
    return judge({"a": found(first), "b": found(second)}, meta, ["a", "b"], compat, no_nms)[0]


@pytest.mark.parametrize("words", ["above", "on top of"])
def test_above_is_nothing_upstream_and_holds_when_fixed(words):
    over, under = (0.5, 0.1, 0.1, 0.1), (0.5, 0.9, 0.1, 0.1)
    assert spatial(words, "upstream", over, under) == pytest.approx(0.4)
    assert spatial(words, "fixed", over, under) == pytest.approx(1.0)
    assert spatial(words, "fixed", under, over) == pytest.approx(0.4)
    assert spatial("on the top of", "upstream", over, under) == pytest.approx(0.9), "0.2 + 0.2 + 0.5 is the official most"


def test_next_to_always_holds_upstream_and_measures_when_fixed():
    assert relation("next to", LEFT, RIGHT, "upstream") == 1.0
    assert relation("next to", LEFT, RIGHT, "fixed") == 1.0, "they are level: a distance along one axis is small"
    apart = (0.0, 0.0, 0.2, 0.2), (0.8, 0.8, 1.0, 1.0)
    assert relation("near", *apart, "upstream") == 1.0
    assert relation("near", *apart, "fixed") == pytest.approx(150 / 512 / 0.8)


@pytest.mark.parametrize("compat", ["upstream", "fixed"])
@pytest.mark.parametrize(
    ("words", "first", "second"),
    [("on the left of", LEFT, RIGHT), ("right of", RIGHT, LEFT), ("below", BOTTOM, TOP), ("on the top of", TOP, BOTTOM)],
)
def test_directions_hold_one_way(words, first, second, compat):
    assert relation(words, first, second, compat) == 1.0 and relation(words, second, first, compat) == 0.0


def test_overlap_lowers_a_direction():
    a, b = (0.0, 0.0, 0.6, 0.4), (0.4, 0.0, 1.0, 0.4)
    inner, union = 0.2 * 0.4, 2 * 0.6 * 0.4 - 0.2 * 0.4
    assert relation("left of", a, b, "fixed") == pytest.approx(0.1 / (inner / union))


def test_duplicates_are_suppressed_on_corners_only_when_fixed():
    twice = found((0.5, 0.5, 0.3, 0.3), (0.51, 0.5, 0.3, 0.3))
    meta = {"task_type": "numeracy", "numeracy_info": [{"num": 1, "obj_name": "cat"}, {"num": 2, "obj_name": "dog"}]}
    pair = found((0.2, 0.2, 0.2, 0.2), (0.8, 0.8, 0.2, 0.2))
    both = {"cat": twice, "dog": pair}
    assert judge(both, meta, ["cat", "dog"], "fixed", groundingdino._nms) == (1.0, {"cat found": 1.0, "dog found": 2.0})
    assert judge(both, meta, ["cat", "dog"], "upstream", groundingdino._nms)[0] == pytest.approx((0.2 + 1) / 2)
    assert judge({"cat": found(), "dog": pair}, meta, ["cat", "dog"], "fixed", no_nms)[0] == pytest.approx(0.5)


def test_official_suppression_keeps_every_box_whose_centre_is_beyond_its_size():
    """Read as corners, such a box (centre, size) has negative sides, and nothing overlaps it."""
    draw = np.random.default_rng(0)
    boxes = np.concatenate([draw.uniform(0.5, 0.6, (8, 2)), draw.uniform(0.35, 0.4, (8, 2))], axis=1)
    scores = list(np.linspace(0.9, 0.5, 8))
    assert len(groundingdino._nms([tuple(box) for box in boxes], scores, 0.5)) == 8
    assert len(groundingdino._nms([_grounding.corners(box) for box in boxes.tolist()], scores, 0.5)) == 1


def test_presence_is_the_share_of_nouns():
    assert judge({"a": found((0.5, 0.5, 0.1, 0.1)), "b": found()}, {}, ["a", "b"], "fixed", no_nms) == (0.5, {"a": 1.0, "b": 0.0})


def test_a_noun_of_three_words_is_never_found_upstream(folder):
    sample = tiny.sample("x", 1, nouns=["hot dog stand"])
    assert [make(folder, compat=compat, threshold=0.001).score([sample])[0].x for compat in ("upstream", "fixed")] == [0.0, 1.0]


def test_every_locality_of_the_training_data_is_known():
    official = {"on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of"}
    official |= {"on top of", "right of", "left of", "below", "above"}
    assert official <= _grounding.known_localities("fixed")
    assert official - _grounding.known_localities("upstream") == {"above", "on top of"}
