"""T2I-CompBench: what prompts ask, the rules on boxes, the scorer on tiny networks, the judged variant, means, slices end to end."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import tiny_questions
from helpers.replay import said, serving, text_of
from helpers.suites import SHARED, add_data, needs, official, oracle, row, run_suite, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from mmalign.evaluators import _compbench
from mmalign.evaluators import t2i_compbench as suite
from mmalign.evaluators import t2i_compbench_judge as judged_suite

from mmalign.hub import CHECKPOINTS
from mmalign.scorers import _compbench_rules as rules
from mmalign.scorers import _grounding, t2i_compbench, t2i_compbench_judge
from mmalign.types import Failure, MmalignError, Prompt, Value

FILES = {category: f"{category}_val.txt" for category in _compbench.CATEGORIES["++"]} | {
    "objects": "new_objects.txt",
    "complex-spatial": "complex_val_spatial.txt",
    "complex-action": "complex_val_action.txt",
}
DATA = {f"t2i_compbench-{name}": f"t2i_compbench/{file}" for name, file in FILES.items()}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "data"))


# What prompts ask.


@needs("t2i_compbench")
def test_the_official_prompts():
    add_data(DATA)
    prompts = suite.Evaluator().prompts()
    assert Counter(prompt.tag for prompt in prompts) == dict.fromkeys(_compbench.CATEGORIES["++"], 300)
    assert len(suite.Evaluator("1").prompts()) == 1800
    of = {category: [prompt for prompt in prompts if prompt.tag == category] for category in FILES}
    relations = Counter(prompt.meta["relation"] for prompt in of["spatial"])
    assert (relations["on the top of"], relations["on the right of"], relations["on side of"], relations["near"]) == (56, 56, 37, 24)
    assert Counter(prompt.meta["relation"] for prompt in of["3d_spatial"]) == {"hidden": 115, "in front of": 102, "behind": 83}
    assert Counter(tuple(prompt.meta["aspects"]) for prompt in of["complex"]) == {
        ("action",): 212,
        ("spatial",): 58,
        ("spatial", "action"): 30,
    }
    assert all(len(prompt.meta["pair"]) == 2 for prompt in of["spatial"] + of["3d_spatial"])
    assert all(prompt.meta["counts"] for prompt in of["numeracy"])
    assert (SHARED / "t2i_compbench").is_dir() and prompts[0].id == "color-000"


@pytest.mark.parametrize(
    ("text", "relation", "pair"),
    [
        ("a girl on the top of a frog", "on the top of", ("person", "frog")),
        ("a traffic light on side of an airplane", "on side of", ("traffic light", "airplane")),
        ("The red hat was on top of the brown coat rack.", "on top of", ("red hat", "brown coat rack")),
        ("a sofa and a cup next to a lamp, at night", "next to", ("cup", "lamp")),
    ],
)
def test_relations(text, relation, pair):
    assert _compbench.relation_of(text) == (relation, pair)


def test_relations_in_depth_and_none():
    assert _compbench.relation_of("a chair hidden by a mouse", _compbench.RELATIONS_3D) == ("hidden", ("chair", "mouse"))
    assert _compbench.relation_of("two boys") is None and _compbench.relation_of("near a lamp") is None


def test_counts():
    names = _compbench._names(["cup - cups", "traffic light - traffic lights", "boy - boys", "sheep - sheep", "ship - ships"])
    assert _compbench.counts_of("Three cups, a traffic light and two boys", names) == [["cup", 3], ["traffic light", 1], ["person", 2]]
    assert _compbench.counts_of("two sheep met eight ships and a", names) == [["sheep", 2], ["boat", 8]]
    with pytest.raises(MmalignError, match="singular - plural"):
        _compbench._names(["cup"])


# The rules.


@pytest.mark.parametrize(
    ("relation", "a", "b", "score"),
    [
        ("on the left of", (0, 0, 10, 10), (50, 0, 60, 10), 1.0),
        ("on the left of", (0, 0, 100, 100), (40, 0, 140, 100), 0.23333333333333336),
        ("near", (0, 0, 10, 10), (300, 300, 310, 310), 0.5),
        ("on top of", (0, 0, 10, 10), (0, 50, 10, 60), 0.0),
        ("", (0, 0, 10, 10), (0, 50, 10, 60), 0.0),
    ],
)
def test_golden_positions(relation, a, b, score):
    assert rules.position(relation, a, b, "upstream") == score
    assert rules.position(relation, a, b) == (1.0 if relation == "on top of" else score)


def test_golden_sameness_and_counts():
    assert rules.is_same((0, 0, 10, 10), (0, 0, 10, 9)) and not rules.is_same((0, 0, 10, 10), (5, 0, 15, 10))
    assert rules.distinct([(0, 0, 10, 10), (0, 0, 10, 9), (50, 0, 60, 10)]) == [(0, 0, 10, 10), (50, 0, 60, 10)]
    assert rules.count_score([("cup", 2), ("kite", 1)], [2, 0]) == 0.5 and rules.count_score([("cup", 2)], [3]) == 0.5
    assert rules.count_score([("cup", 2)], [2]) == 1.0


def test_one_thing_alone_scores_nothing_in_2d_and_its_share_in_3d():
    thing = rules.Thing((0, 0, 10, 10), 1.0)
    assert rules.pair_score("near", thing, None, "fixed") == 0.0 and rules.pair_score("behind", None, thing, "fixed") == 0.25
    assert rules.pair_score("near", thing, thing, "fixed") == 1.0 and rules.pair_score("near", None, None, "fixed") == 0.0


def test_boxes_without_area_do_not_overlap():
    assert rules.overlap((5, 5, 5, 5), (5, 5, 5, 5)) == 0.0


BOXES = st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(1, 40)] * 2).map(lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3]))
RELATIONS = st.sampled_from([*_compbench.RELATIONS, *_compbench.RELATIONS_3D, "beside", ""])


def test_rules_agree_with_the_official_functions_on_random_boxes():
    folder = oracle("t2icb", "UniDet_eval/2D_spatial_eval.py", "UniDet_eval/3D_spatial_eval.py", "UniDet_eval/numeracy_eval.py")
    flat, deep = (official(folder / "UniDet_eval" / f"{name}_spatial_eval.py", "determine_position") for name in ("2D", "3D"))
    same = official(folder / "UniDet_eval" / "numeracy_eval.py", "calculate_iou")
    names = ("x_min", "y_min", "x_max", "y_max")

    @settings(max_examples=1000, deadline=None)
    @given(relation=RELATIONS, a=BOXES, b=BOXES, scale=st.sampled_from([1, 6]), seed=st.integers(0, 9))
    def agree(relation, a, b, scale, seed):
        a, b = (tuple(scale * side for side in box) for box in (a, b))
        boxes = [dict(zip(names, box, strict=True)) for box in (a, b)]
        depth = np.random.default_rng(seed).integers(0, 256, (500, 500), dtype=np.uint8)

        def nearness(rows, columns):
            return float(depth[rows, columns].mean())

        if relation not in _compbench.RELATIONS_3D:
            assert rules.position(relation, a, b, "upstream") == pytest.approx(flat(relation, *boxes))
        assert rules.position(relation, a, b, "upstream", nearness) == pytest.approx(deep(relation, *boxes, depth_map=depth))
        assert rules.is_same(a, b) == bool(same(a, b))

    agree()


@settings(deadline=None)
@given(relation=RELATIONS, a=BOXES, b=BOXES, scores=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_scores_lie_between_0_and_1(relation, a, b, scores):
    for compat in ("fixed", "upstream"):
        things = [rules.Thing(box, score) for box, score in zip((a, b), scores, strict=True)]
        assert 0 <= rules.pair_score(relation, *things, compat, lambda rows, columns: rows.start) <= 1


def test_the_depth_map_is_read_by_rows_unless_upstream():
    seen = []
    for compat in ("fixed", "upstream"):
        rules.position(
            "behind", (1, 2, 30, 40), (2, 3, 31, 41), compat, lambda rows, columns: seen.append((rows.stop, columns.stop)) or 0.0
        )
    assert seen == [(40, 30), (41, 31), (30, 40), (31, 41)]


def test_the_frame_is_the_detectors():
    assert rules.frame(512, 512) == (479, 479) and rules.frame(1024, 512) == (480, 240) and rules.frame(100, 100) == (479, 479)


# The scorer on tiny networks.


def tiny_dpt(path):
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        **{"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32, "patch_size": 8},
        **{"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "is_hybrid": False},
    )
    tiny_questions.seeded(lambda: DPTForDepthEstimation(config)).save_pretrained(path)
    return path


def tiny_options(root):
    """The scorer's options for tiny networks, written below a folder."""
    blip, detector = str(tiny_questions.blip(root / "blip")), str(tiny_questions.grounding_dino(root / "dino"))
    made = {
        "blip": blip,
        "processor": blip,
        "clip": str(CHECKPOINTS / "tiny-clip"),
        "detector": detector,
        "depth": str(tiny_dpt(root / "dpt")),
    }
    return {**made, "blip_side": 32, "detector_side": 96, "depth_side": 32, "threshold": 0.3}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return tiny_options(tmp_path_factory.mktemp("compbench"))


@pytest.fixture(scope="module")
def scorer(options):
    return t2i_compbench.load(t2i_compbench.Config(**options))


METAS = [
    {"category": "color"},
    {"category": "spatial", "relation": "near", "pair": ["car", "dog"]},
    {"category": "3d_spatial", "relation": "behind", "pair": ["car", "dog"]},
    {"category": "numeracy", "counts": [["car", 1], ["dog", 2]]},
    {"category": "non_spatial"},
    {"category": "complex", "aspects": ["spatial", "action"], "relation": "near", "pair": ["car", "car"]},
    {"category": "complex", "aspects": ["spatial"], "relation": "", "pair": []},
]


def samples(metas=METAS):
    return [
        sample(Prompt(str(n), "a red car and a blue dog", (meta.get("category", ""),), meta), n, side=40) for n, meta in enumerate(metas)
    ]


def test_every_category_is_measured_and_batches_change_nothing(scorer):
    scores = scorer.score(samples())
    assert all(isinstance(score, Value) for score in scores), scores
    alone = [scorer.score([one])[0] for one in samples()]
    assert [score.x for score in scores] == pytest.approx([score.x for score in alone], abs=1e-5)
    three, without = scores[5], scores[6]
    assert set(three.parts) == {"attribute", "spatial", "action"} and three.x == pytest.approx(sum(three.parts.values()) / 3)
    assert without.parts["spatial"] == 0.0 and "no relation" in without.detail
    assert scorer.metric_name == "t2i_compbench-gdino" and {one.field for one in scorer.deviations} >= {"t2i_compbench.detector"}


def test_attributes_are_blips_and_actions_are_clips(scorer):
    (attribute, action) = (scorer.score(samples([meta]))[0].x for meta in (METAS[0], METAS[4]))
    assert attribute == scorer.blip.score(samples([METAS[0]]))[0].x and action == scorer.clip.score(samples([METAS[4]]))[0].x


def found(**things):
    return {name: _grounding.Found([box for box, _ in some], [score for _, score in some]) for name, some in things.items()}


def with_detections(scorer, things):
    """The same scorer with a detector that finds these things in every image."""
    copy = t2i_compbench.CompBench.__new__(t2i_compbench.CompBench)
    copy.__dict__ = {**scorer.__dict__, "detector": SimpleNamespace(find=lambda items, nouns: [things] * len(items))}
    return copy


def test_places_and_counts_follow_the_detections(scorer):
    things = found(car=[((0.2, 0.5, 0.1, 0.1), 0.9), ((0.2, 0.5, 0.1, 0.098), 0.8)], dog=[((0.8, 0.5, 0.1, 0.1), 0.7)])
    left = {"category": "spatial", "relation": "on the left of", "pair": ["car", "dog"]}
    scores = with_detections(scorer, things).score(samples([left, {**left, "pair": ["dog", "car"]}, METAS[3]]))
    assert [score.x for score in scores] == pytest.approx([0.25 * 1.6 + 0.5, 0.0, 0.5 + 0.25])
    nothing = with_detections(scorer, found(car=[], dog=[])).score(samples([left, METAS[2], METAS[3]]))
    assert [score.x for score in nothing] == [0.0, 0.0, 0.0] and nothing[0].detail == "no car, no dog"
    hole = Failure("score", "nonfinite", "no")
    assert with_detections(scorer, hole).score(samples(METAS[1:6:2])) == [hole, hole, hole]


def test_prompts_that_do_not_say_what_to_measure_are_holes(scorer):
    metas = [{}, {"category": "taste"}, {"category": "spatial"}, {"category": "numeracy"}, {"category": "complex"}, {"category": "color"}]
    scores = scorer.score(samples(metas))
    assert [getattr(score, "kind", "value") for score in scores] == ["missing"] * 5 + ["value"]


def test_depth_is_stretched_and_depends_on_its_picture_alone(scorer):
    pictures = [one.image for one in samples()[:2]]
    together = scorer.depth.maps(pictures, [(30, 20), (10, 10)])
    assert together[0].shape == (30, 20) and together[1].dtype == np.uint8 and together[1].max() > together[1].min()
    assert (together[0] == scorer.depth.maps(pictures[:1], [(30, 20)])[0]).all()


def test_identity_follows_the_networks_and_the_rules(scorer, options, tmp_path):
    config = t2i_compbench.Config(**options)
    changed = [dataclasses.replace(config, compat="upstream"), dataclasses.replace(config, threshold=0.4)]
    assert len({scorer.fingerprint, *(t2i_compbench.load(one).fingerprint for one in changed)}) == 3
    with pytest.raises(MmalignError, match=r"--set t2i_compbench\.depth=PATH"):
        t2i_compbench.load(dataclasses.replace(config, depth=str(tmp_path / "absent")))


# The judged variant.


@pytest.mark.parametrize(
    ("text", "rating"),
    [("Score: 75", 75), ("**Score:** 100", 100), ("The cup is red.\nScore: 50\nFinal score = 40", 40), ("80", 80), (" 0. ", 0)],
)
def test_ratings(text, rating):
    assert t2i_compbench_judge.rating_of(text) == rating


@pytest.mark.parametrize("text", ["", "very good", "Score: 101", "Score: 1000", "I see 3 cups"])
def test_what_is_no_rating(text):
    with pytest.raises(ValueError):
        t2i_compbench_judge.rating_of(text)


def test_the_judge_is_asked_about_the_categorys_aspect():
    with serving(lambda body, number: said("Score: 30" if "exactly the number" in text_of(body) else "Score: 90")) as server:
        config = t2i_compbench_judge.Config(base_url=server.url, pause=0.01)
        scores = t2i_compbench_judge.load(config).score(samples([METAS[0], METAS[3], {}]))
    assert [scores[0].x, scores[1].x, scores[2].kind] == [0.9, 0.3, "missing"]
    assert set(t2i_compbench_judge.ASPECTS) == set(t2i_compbench.CATEGORIES) == set(_compbench.CATEGORIES["++"])


# The suites.


def test_overall_is_the_mean_of_categories_and_needs_them_all():
    rows = [row("t2i_compbench", 0.5, (category,), category) for category in _compbench.CATEGORIES["1"]]
    assert suite.Evaluator("1").aggregate(rows)["overall"] == 0.5
    assert suite.Evaluator().aggregate(rows)["overall"] is None and suite.Evaluator().aggregate(rows)["numeracy"] is None
    rows = [row("t2i_compbench_judge", 0.5, (category,), category) for category in _compbench.CATEGORIES["++"]]
    assert judged_suite.Evaluator().aggregate(rows)["overall"] == 50.0
    assert set(suite.Evaluator().aggregate([]).values()) == {None}


DRAWN = st.lists(st.tuples(st.sampled_from(_compbench.CATEGORIES["++"]), st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=50)
@given(drawn=DRAWN, draw=st.data(), times=st.integers(2, 3))
def test_order_and_copies_do_not_matter(drawn, draw, times):
    rows = [row("t2i_compbench", x, (category,), f"{category}{n}", at) for at, (category, n, x) in enumerate(drawn)]
    found = suite.Evaluator().aggregate(rows)
    for other in (draw.draw(st.permutations(rows)), rows * times):
        assert suite.Evaluator().aggregate(other) == pytest.approx(found, abs=1e-12)


@needs("t2i_compbench")
def test_a_slice_from_end_to_end(tmp_path, options):
    add_data(DATA)
    sets = {f"t2i_compbench.{name}": value for name, value in options.items()}
    result = run_suite(tmp_path / "r", "t2i_compbench", sets, 8, "--images-per-prompt", "1")
    assert result.counts.scored == 8 and result.metrics["overall"].value is not None
    assert result.scorers["t2i_compbench"]["metric_name"] == "t2i_compbench-gdino"


@needs("t2i_compbench")
def test_a_judged_slice_from_end_to_end(tmp_path):
    add_data(DATA)
    with serving(lambda body, number: said("Score: 40")) as server:
        result = run_suite(tmp_path / "r", "t2i_compbench_judge", {"t2i_compbench_judge.base_url": server.url}, 8)
    assert result.counts.scored == 8 and result.metrics["overall"].value == pytest.approx(40)
