"""GenEval from end to end on a tiny random detector and CLIP, and the suite: prompts, aggregates, the alarm."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_geneval import make_clip, make_detector
from hypothesis import given, settings
from hypothesis import strategies as st
from mmalign.evaluators.geneval import TASKS, Evaluator
from PIL import Image

from mmalign import data
from mmalign.scorers import geneval
from mmalign.scorers._clip_colour import Group, crop
from mmalign.scorers._geneval_verdict import COLOURS, Detection
from mmalign.scorers._mask2former import Found, detect
from mmalign.types import Failure, MmalignError, Prompt, Request, Row, Sample, Scorer, UsageError, Value

SHARED = Path(os.environ.get("MMALIGN_SHARED", "")) / "data"
needs_data = pytest.mark.skipif(
    not os.environ.get("MMALIGN_SHARED") or not (SHARED / "geneval").is_dir(), reason="MMALIGN_SHARED names no folder with data/geneval"
)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geneval")
    return {"detector": str(make_detector(folder / "detector")), "clip": str(make_clip(folder / "clip")), "resolution": 64}


@pytest.fixture(scope="module")
def scorer(options):
    return geneval.load(geneval.Config(**options))


def picture(seed, size=(32, 32)):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def samples(scorer):
    """Seven images with requests made from what the random detector sees, so that some are met and some are not."""
    made = []
    for index in range(7):
        image = picture(index, (32, 32) if index != 4 else (40, 24))
        objects = detect(scorer.detector, [image], 1, 0.3, 64)[0]
        kept = geneval.select(objects, "colors", 0.3, 0.9, 16)
        name, group = next(iter(kept.items()))
        colour = scorer.colours.colours([Group(image, name, group[:1])])[0][0]
        clause = {"class": name, "count": 1, "color": colour if index % 2 else COLOURS[(COLOURS.index(colour) + 1) % 10]}
        meta = {"tag": "colors", "include": [clause], "prompt": "a photo"}
        made.append(Sample(Request(Prompt(f"{index:05d}", "a photo", ("colors",), meta), 0, index), image=image))
    return made


def test_it_is_a_scorer(scorer):
    assert isinstance(scorer, Scorer) and scorer.range == (0.0, 1.0)


def test_values_follow_the_image_and_the_request(scorer, samples):
    scores = scorer.score(samples)
    assert [score.x for score in scores] == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert all(score.x == score.parts["correct"] and set(score.parts) == {"correct", "strict", "soft"} for score in scores)
    assert all(("expected" in score.detail) == (score.x == 0) for score in scores)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batches_change_nothing_and_order_is_kept(options, samples, scorer, batch_size):
    other = geneval.load(geneval.Config(**options, batch_size=batch_size))
    assert other.fingerprint == scorer.fingerprint
    assert other.score(samples) == scorer.score(samples)
    assert other.score(samples[::-1]) == scorer.score(samples)[::-1]
    images = [sample.image for sample in samples]
    alone = [detect(scorer.detector, [image], 1, 0.0, 64)[0] for image in images]
    for together, single in zip(detect(scorer.detector, images, batch_size, 0.0, 64), alone, strict=True):
        scores = [sorted(item.detection.score for item in found) for found in (together, single)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_what_cannot_be_judged_is_a_failure_and_the_rest_is_scored(scorer, samples):
    def with_image(image):
        return Sample(samples[1].request, image=image)

    stranger = Prompt("1", "a kettle", ("colors",), {"tag": "colors", "include": [{"class": "kettle", "count": 1}]})
    scores = scorer.score(
        [
            with_image(None),
            samples[1],
            with_image(np.zeros((8, 8), np.uint8)),
            with_image(np.zeros((1, 1, 3), np.uint8)),
            Sample(Request(stranger, 0, 0), image=samples[0].image),
            with_image(np.zeros((9, 200, 3), np.uint8)),
        ]
    )
    kinds = [score.kind if isinstance(score, Failure) else "value" for score in scores]
    assert kinds == ["missing", "value", "error", "error", "error", "value"]
    assert "kettle" in scores[4].message and scores[1] == scorer.score([samples[1]])[0]
    assert scorer.score([]) == []


def test_damaged_weights_give_failures_and_no_numbers(options, samples):
    import torch

    broken = geneval.load(geneval.Config(**options))
    with torch.no_grad():
        broken.detector.class_predictor.bias.fill_(torch.nan)
    assert [score.kind for score in broken.score(samples[:2])] == ["nonfinite", "nonfinite"]


def test_rules_choose_the_value(options, samples):
    for rule, part in (("strict", "strict"), ("soft", "soft")):
        scores = geneval.load(geneval.Config(**options, rule=rule)).score(samples)
        assert all(score.x == score.parts[part] for score in scores)
    assert geneval.load(geneval.Config(**options, rule="soft")).range == (-14.0, 1.0)
    assert geneval.load(geneval.Config(**options, rule="soft", clamp=True)).range == (0.0, 1.0)


def test_identity_names_what_changes_a_value(options, scorer, tmp_path):
    def fingerprint(**changes):
        return geneval.load(geneval.Config(**{**options, **changes})).fingerprint

    others = [fingerprint(threshold=0.4), fingerprint(rule="soft"), fingerprint(resolution=96)]
    others += [fingerprint(detector=str(make_detector(tmp_path / "d", seed=1))), fingerprint(clip=str(make_clip(tmp_path / "c", seed=1)))]
    assert len({scorer.fingerprint, *others}) == 6
    assert fingerprint() == scorer.fingerprint


def test_another_detector_is_not_called_geneval(scorer, options):
    assert scorer.metric_name == "geneval-hf"
    found = {deviation.field: deviation for deviation in scorer.deviations}
    assert set(found) == {"geneval.detector", "geneval.clip"}
    assert found["geneval.detector"].used == options["detector"] and "743b7d99" in found["geneval.detector"].official


def test_detectors_that_cannot_serve_are_refused(options, tmp_path):
    with pytest.raises(MmalignError, match="geneval.detector=PATH"):
        geneval.load(geneval.Config(**{**options, "detector": str(tmp_path / "absent")}))
    from safetensors.torch import load_file, save_file

    folder = make_detector(tmp_path / "cut")
    tensors = load_file(folder / "model.safetensors")
    del tensors["class_predictor.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MmalignError, match="not whole: 1 weights are missing .*class_predictor.weight"):
        geneval.load(geneval.Config(**{**options, "detector": str(folder)}))


def test_options_are_checked():
    with pytest.raises(ValueError, match="between 0 and 1"):
        geneval.Config(threshold=1.5)
    with pytest.raises(ValueError, match="at least 1"):
        geneval.Config(batch_size=0)


def test_counting_has_its_own_threshold_and_ties_are_stable():
    found = [Found(41, Detection(np.zeros(4, np.float32), score)) for score in (0.5, 0.95, 0.91, 0.5)]
    assert [item.score for item in geneval.select(found, "counting", 0.3, 0.9, 16)["cup"]] == [0.95, 0.91]
    kept = geneval.select(found, "colors", 0.3, 0.9, 16)["cup"]
    assert [item.score for item in kept] == [0.95, 0.91, 0.5, 0.5] and kept[2] is found[3].detection
    assert len(geneval.select(found, "colors", 0.3, 0.9, 3)["cup"]) == 3
    assert geneval.select(found, "colors", 0.96, 0.9, 3) == {}


def test_crops_are_grey_outside_the_mask():
    image, mask = np.full((6, 8, 3), 200, np.uint8), np.zeros((6, 8), bool)
    mask[2, 3] = mask[4, 6] = True
    cut = crop(image, Detection(np.array([3, 2, 7, 5], np.float32), 0.9, mask))
    assert cut.shape == (3, 4, 3)
    assert cut[0, 0].tolist() == cut[2, 3].tolist() == [200] * 3 and cut[1, 1].tolist() == [0x99] * 3
    assert (crop(image, Detection(np.array([3, 2, 7, 5], np.float32), 0.9)) == 200).all()


def test_colours_come_from_the_right_templates(scorer):
    """The classifier of a class: three templates per colour, each embedding and their mean of length one."""
    matrix = scorer.colours._classifier("cup")
    assert matrix.shape == (8, 10) and matrix.norm(dim=0).tolist() == pytest.approx([1.0] * 10, abs=1e-5)
    texts = ["a photo of a brown cup", "a photo of a brown-colored cup", "a photo of a brown object"]
    tokens = scorer.colours.tokenizer(texts, padding=True, return_tensors="pt")
    embeddings = scorer.colours.model.get_text_features(**tokens).pooler_output.detach().numpy()
    mean = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).mean(0)
    assert matrix[:, COLOURS.index("brown")].tolist() == pytest.approx((mean / np.linalg.norm(mean)).tolist(), abs=1e-5)


# The suite.


@pytest.fixture
def shared_data(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path))
    data.add("geneval", SHARED / "geneval")
    data.add("geneval-rewritten", SHARED / "geneval" / "bagel_evaluation_metadata_long.jsonl")
    data.add("flow-grpo-geneval", SHARED / "flow_grpo" / "geneval_test_metadata.jsonl")
    data.add("flow-grpo-geneval-unseen", SHARED / "flow_grpo" / "geneval_unseen_objects_test_metadata.jsonl")


@needs_data
def test_the_official_prompts(shared_data):
    prompts = Evaluator().prompts("test")
    assert [prompt.id for prompt in prompts] == [f"{index:05d}" for index in range(553)]
    assert Counter(prompt.tag for prompt in prompts) == dict(zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True))
    assert [prompt.text for prompt in prompts] == data.load_lines(SHARED / "geneval" / "generation_prompts.txt")
    assert data.load_lines(SHARED / "geneval" / "object_names.txt") == list(geneval.CLASSES)
    assert all(geneval.check_metadata(prompt.meta, geneval.CLASSES) == "" for prompt in prompts)
    counts = Counter(prompt.meta["include"][0]["count"] for prompt in prompts if prompt.tag == "counting")
    positions = Counter(prompt.meta["include"][1]["position"][0] for prompt in prompts if prompt.tag == "position")
    assert counts == {2: 26, 3: 28, 4: 26} and positions == {"below": 28, "right of": 27, "above": 26, "left of": 19}


@needs_data
def test_other_sources(shared_data, tmp_path):
    official, rewritten = Evaluator().prompts(), Evaluator("geneval-rewritten").prompts()
    assert [prompt.tag for prompt in rewritten] == [prompt.tag for prompt in official]
    assert all(a.text != b.text for a, b in zip(official, rewritten, strict=True))
    flow = Evaluator("flow-grpo-geneval").prompts()
    assert Counter(prompt.text for prompt in flow) == {prompt.text: 4 for prompt in official}
    assert len(Evaluator("flow-grpo-geneval-unseen").prompts()) == 1024
    own = tmp_path / "own.jsonl"
    own.write_text('{"tag": "colors", "include": [{"class": "cup", "count": 1}], "prompt": "a cup"}\n')
    assert [(prompt.id, prompt.text) for prompt in Evaluator(str(own)).prompts()] == [("00000", "a cup")]


def test_prompt_files_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "own.jsonl"
    with pytest.raises(UsageError, match="no prompt file .*own.jsonl"):
        Evaluator(str(path)).prompts()
    path.write_text('{"tag": "colors", "prompt": "a cup"}\n')
    with pytest.raises(MmalignError, match="own.jsonl, line 1: .*'include'; got tag, prompt"):
        Evaluator(str(path)).prompts()
    path.write_text('{"tag": "taste", "include": [{"class": "cup", "count": 1}], "prompt": "a cup"}\n')
    with pytest.raises(MmalignError, match="'taste' is none of single_object"):
        Evaluator(str(path)).prompts()
    with pytest.raises(UsageError, match="one split, test; got 'train'"):
        Evaluator().prompts("train")


def row(tag, prompt, index, correct, strict=0.0, soft=0.0):
    request = Request(Prompt(prompt, prompt, (tag,)), index, 0)
    value = Value(float(correct), {"correct": float(correct), "strict": strict, "soft": soft})
    return Row(request, Sample(request), {"geneval": value})


def test_golden_summary():
    """Three images of one task with one right, one right image of another: 0.66667, and every prompt has a right image."""
    rows = [row("colors", "a", 0, 1), row("colors", "a", 1, 0), row("colors", "a", 2, 0), row("position", "b", 0, 1)]
    found = Evaluator().aggregate(rows)
    assert found["overall"] == pytest.approx(0.66667, abs=1e-5) and found["prompts"] == 1.0 and found["images"] == 0.5
    assert found["colors"] == pytest.approx(1 / 3) and found["position"] == 1.0 and found["counting"] is None


def test_nothing_is_undefined_not_zero():
    assert set(Evaluator().aggregate([]).values()) == {None}


ROWS = st.lists(st.tuples(st.sampled_from(TASKS), st.integers(0, 5), st.booleans(), st.floats(-1, 1)), min_size=1, max_size=40)


def made(drawn):
    return [row(tag, f"{tag}{prompt}", index, ok, float(ok), soft) for index, (tag, prompt, ok, soft) in enumerate(drawn)]


@settings(deadline=None)
@given(drawn=ROWS, data=st.data())
def test_order_does_not_matter(drawn, data):
    rows = made(drawn)
    shuffled = data.draw(st.permutations(rows))
    assert Evaluator().aggregate(shuffled) == pytest.approx(Evaluator().aggregate(rows), abs=1e-12)


@settings(deadline=None)
@given(drawn=ROWS, times=st.integers(2, 4))
def test_more_copies_of_every_image_change_nothing(drawn, times):
    rows = made(drawn)
    assert Evaluator().aggregate(rows * times) == pytest.approx(Evaluator().aggregate(rows), abs=1e-12)


@settings(deadline=None)
@given(drawn=ROWS)
def test_metrics_lie_between_what_they_average(drawn):
    found = Evaluator().aggregate(made(drawn))
    means = [found[task] for task in TASKS if found[task] is not None]
    assert min(means) - 1e-12 <= found["overall"] <= max(means) + 1e-12 and found["prompts"] >= 0
    assert found["overall"] == pytest.approx(sum(means) / len(means))


def test_the_alarm_rings_for_a_blind_detector_only():
    blind = [row("single_object", str(index), 0, index == 0) for index in range(40)]
    assert "broken detector" in Evaluator().alarms(blind)[0]
    assert Evaluator().alarms(blind[:10]) == () and Evaluator().alarms([]) == ()
    assert Evaluator().alarms([row("single_object", str(index), 0, index % 2) for index in range(40)]) == ()
    assert Evaluator().alarms([row("counting", str(index), 0, 0) for index in range(40)]) == ()
