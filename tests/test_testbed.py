"""The shapes world: prompts state what scenes fulfil, pictures read back exactly, splits hold what they promise."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from mmalign.scorers import shapes
from mmalign.testbed import corpus, oracle, world
from mmalign.testbed.render import render
from mmalign.types import Failure, Prompt, Request, Sample, Value


def scenes(number: int, kinds=world.KINDS, seed: int = 0):
    return [item for _, item in zip(range(number), world.sample_prompts("test", kinds, seed), strict=False)]


def test_oracle_reads_its_own_renders_exactly():
    drawn = [scene for _, _, scene in scenes(10_000)]
    readings = oracle.read(render(drawn))
    assert all(reading == oracle.Reading(scene, 0) for reading, scene in zip(readings, drawn, strict=True))


@pytest.mark.parametrize("blur, least", [(0.5, 1.0), (0.8, 0.99), (1.0, 0.95)])
def test_oracle_tolerates_soft_edges_and_noise(blur, least):
    drawn = [scene for _, _, scene in scenes(400, seed=1)]
    noise = np.random.default_rng(0).normal(0, 6, (400, 32, 32, 3))
    soft = gaussian_filter(render(drawn).astype(np.float32), (0, blur, blur, 0)) + noise
    right = np.mean([reading == oracle.Reading(scene, 0) for reading, scene in zip(oracle.read(soft), drawn, strict=True)])
    assert right >= least


def test_oracle_reads_enlarged_pictures_and_names_what_it_cannot_read():
    drawn = [scene for _, _, scene in scenes(20, seed=2)]
    large = render(drawn).repeat(3, axis=1).repeat(3, axis=2)
    assert [reading.scene for reading in oracle.read(large)] == drawn
    smear = np.full((1, 32, 32, 3), 236, np.uint8)
    smear[:, 2:30, 4:6] = (0, 255, 255)  # a cyan bar: a colour and a shape that the world has not
    (reading,) = oracle.read(smear)
    assert reading.scene == () and reading.unclear >= 1


@pytest.mark.parametrize("kind", world.KINDS)
def test_every_kind_states_facts_that_its_scene_fulfils(kind):
    for _, clauses, scene in scenes(50, (kind,)):
        verdicts = world.facts(clauses, scene)
        assert all(verdicts.values()) and world.strict(clauses, scene)
        if kind.startswith("dense"):
            assert len(verdicts) == int(kind[-1])
        assert not world.strict(clauses, scene, unclear=1)
        assert not world.strict(clauses, scene[1:])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000))
def test_a_spoiled_scene_differs_in_one_thing(seed):
    rng = Random(seed)
    _, clauses, scene = scenes(1, seed=seed)[0]
    spoiled = world.spoil(scene, rng)
    assert spoiled != scene
    assert len(set(scene) - set(spoiled)) <= 1 and len(set(spoiled) - set(scene)) <= 1


def test_splits_are_disjoint_where_they_can_be_and_test_alone_asks_for_novel_pairs():
    prompts = {split: world.prompts(split, 12) for split in ("train", "val", "test")}
    divided = {split: {p.text for p in items if p.tag not in world.SHARED_KINDS} for split, items in prompts.items()}
    assert not divided["train"] & divided["test"] and not divided["val"] & divided["test"] and not divided["train"] & divided["val"]
    assert not any("novel" in p.tags for split in ("train", "val") for p in prompts[split])
    assert any("novel" in p.tags for p in prompts["test"])
    shown = [(t.shape, t.color) for drawing in corpus.drawings(5, 2000, 0.4, 0.3) for t in drawing.scene]
    assert not set(shown) & world.HELD_OUT


def test_prompts_are_stable_and_survive_json():
    import json

    few, many = world.prompts("test", 4), {p.id: p for p in world.prompts("test", 16)}
    for prompt in few:
        assert many[prompt.id] == prompt
        again = Prompt(prompt.id, prompt.text, prompt.tags, json.loads(json.dumps(prompt.meta)))
        assert world.text_of(world.clauses_of(again)) == prompt.text


def test_positions_mean_what_they_say():
    circle, square = world.Clause("circle"), world.Clause("square", position=("left of", 0))
    assert world.text_of((circle, square)) == "a photo of a square left of a circle"
    left, right = world.Thing(0, 0, "square", "red", "small"), world.Thing(2, 2, "circle", "red", "small")
    assert world.strict((circle, square), (left, right))
    swapped = (world.Thing(0, 0, "circle", "red", "small"), world.Thing(2, 2, "square", "red", "small"))
    assert world.facts((circle, square), swapped) == {"circle count": True, "square count": True, "square position": False}


def sample(clauses, image):
    from dataclasses import asdict

    return Sample(Request(Prompt("p", world.text_of(clauses), (), {"include": [asdict(c) for c in clauses]}), 0, 0), image=image)


def test_scorer_gives_the_share_of_facts_and_says_what_is_wrong():
    clauses = (world.Clause("circle", color="red"), world.Clause("square"))
    picture = render([(world.Thing(0, 0, "circle", "blue", "large"), world.Thing(1, 1, "square", "red", "small"))])[0]
    (value,) = shapes.load().score([sample(clauses, picture)])
    assert isinstance(value, Value) and value.x == pytest.approx(2 / 3) and value.parts["strict"] == 0 and "circle color" in value.detail
    (strict,) = shapes.load(shapes.Config("strict")).score([sample(clauses, picture)])
    assert isinstance(strict, Value) and strict.x == 0.0


def test_the_exact_form_sees_what_was_not_asked_for():
    clauses = (world.Clause("circle", color="red"),)
    circle = world.Thing(0, 0, "circle", "red", "large")
    strange = world.Thing(2, 2, "square", "blue", "large")
    pictures = render([(circle,), (circle, strange), (strange,)])
    values = {
        form: [value.x for value in shapes.load(shapes.Config(form)).score([sample(clauses, picture) for picture in pictures])]
        for form in ("share", "strict", "exact")
    }
    assert values["share"] == [1, 1, 0] and values["strict"] == [1, 0, 0] and values["exact"] == pytest.approx([1, 2 / 3, 0])


def test_scorer_reports_a_prompt_without_facts_as_a_hole():
    picture = render([()])[0]
    (score,) = shapes.load().score([Sample(Request(Prompt("p", "a dog"), 0, 0), image=picture)])
    assert isinstance(score, Failure) and "include" in score.message


def test_the_painter_keeps_the_facts_and_has_habits():
    rng, places = Random(3), {}
    for _, clauses, scene in scenes(600, seed=4):
        shown = corpus.arrange(clauses, scene, rng)
        assert world.strict(clauses, shown)
        assert sorted((t.shape, t.color, t.size) for t in shown) == sorted((t.shape, t.color, t.size) for t in scene)
        if not any(clause.region or clause.position for clause in clauses):
            places.setdefault(len(shown), set()).add(tuple((t.row, t.column) for t in shown))
    assert {1, 2, 3, 4, 5} <= places.keys() and all(len(places[number]) == 2 for number in (1, 2, 3, 4, 5))


def test_corpus_is_wrong_as_often_as_it_says_and_reproducible():
    first, again = corpus.drawings(7, 500, 0.35, 0.3), corpus.drawings(7, 500, 0.35, 0.3)
    assert first == again
    right = [scene for _, _, scene in zip(range(500), range(500), [d.scene for d in corpus.drawings(7, 500, 0.0, 0.3)], strict=False)]
    wrong = np.mean([drawing.scene != scene for drawing, scene in zip(first, right, strict=True)])
    assert 0.27 < wrong < 0.43
    for question in corpus.questions(1, 300):
        if question.question == corpus.LIST:
            assert question.answer == world.plan_of(question.scene)
