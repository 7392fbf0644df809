"""The learned preference: simulated annotators, the build on any CLIP, and the bundled head: fairly right, fond of large things."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from helpers.tiny_geneval import make_clip

from mmalign.scorers import shapes_preference
from mmalign.testbed.build_preference import Recipe, build, choices
from mmalign.testbed.render import render
from mmalign.testbed.world import facts, sample_prompts, text_of
from mmalign.types import MmalignError, Prompt, Request, Sample, Value

SMALL = Recipe(pairs=120, checked=60, steps=60, hidden=8, batch=32)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head trained for a moment on a random CLIP: <folder>/tiny-clip and <folder>/tiny-preference."""
    folder = tmp_path_factory.mktemp("preference")
    make_clip(folder / "tiny-clip")
    build(folder / "tiny-preference", folder / "work", SMALL)
    return folder


def options(folder: Path) -> shapes_preference.Config:
    return shapes_preference.Config(str(folder / "tiny-clip"), str(folder / "tiny-preference" / "head.safetensors"))


def samples_of(pairs: list[tuple[str, tuple]]) -> list[Sample]:
    pictures = render([scene for _, scene in pairs])
    return [Sample(Request(Prompt(f"p{i}", text), 0, i), image=pictures[i]) for i, (text, _) in enumerate(pairs)]


def values(scorer, pairs: list[tuple[str, tuple]]) -> list[float]:
    scores = scorer.score(samples_of(pairs))
    assert all(isinstance(score, Value) for score in scores)
    return [score.x for score in scores]


def test_annotators_look_at_facts_and_size_and_err() -> None:
    made = choices(SMALL, "train", 400)
    assert made == choices(SMALL, "train", 400) and made != choices(replace(SMALL, seed=1), "train", 400)
    for choice in made[:50]:
        for scene, worth, share in zip(choice.scenes, choice.worth, choice.shares, strict=True):
            assert worth == pytest.approx(share + 0.4 * fmean(thing.size == "large" for thing in scene)) and 0 <= share <= 1
    decided = [choice for choice in made if choice.worth[0] != choice.worth[1]]
    right = fmean((choice.worth[0] > choice.worth[1]) == choice.is_first for choice in decided)
    assert 0.75 < right < 0.98, "mostly by worth, yet not always"
    assert 0.4 < fmean(choice.is_first for choice in made) < 0.6, "neither side is favoured"


def test_the_build_writes_a_head_that_scores_in_deviations(built: Path) -> None:
    report = json.loads((built / "tiny-preference" / "report.json").read_text())
    assert report["pairs"] == 60 and 0 <= report["agrees_with_oracle"] <= 1
    scorer = shapes_preference.load(options(built))
    checked = choices(SMALL, "val", 60)
    found = values(scorer, [(choice.text, scene) for choice in checked for scene in choice.scenes])
    assert fmean(found) == pytest.approx(0, abs=0.05) and torch.tensor(found).std().item() == pytest.approx(1, abs=0.05)


def test_the_value_is_the_heads_on_the_clips_features(built: Path) -> None:
    from safetensors.torch import load_file

    scorer = shapes_preference.load(options(built))
    state = {key: tensor.double() for key, tensor in load_file(built / "tiny-preference" / "head.safetensors").items()}
    (choice,) = choices(SMALL, "val", 1)
    pixels = torch.from_numpy(render(list(choice.scenes[:1]))).permute(0, 3, 1, 2) / 255
    image, text = scorer.clip.encode_pixels(pixels)[0].double(), scorer.text_features([choice.text])[0].double()
    width = len(image)
    features = torch.cat([width * image * text, width**0.5 * image])
    hidden = torch.nn.functional.gelu(state["hidden.weight"] @ features + state["hidden.bias"])
    expected = state["score.weight"] @ hidden + state["score.bias"]
    assert values(scorer, [(choice.text, choice.scenes[0])]) == pytest.approx(expected.tolist(), abs=1e-5)
    pixels.requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score_pixels(pixels, [choice.text]).sum(), pixels)
    assert gradient.abs().sum() > 0


def test_a_head_of_another_width_is_refused(built: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor for key, tensor in shapes_preference.make_head(5, 8).state_dict().items()}, tmp_path / "head.safetensors")
    with pytest.raises(MmalignError, match="another shape"):
        shapes_preference.load(replace(options(built), head=str(tmp_path / "head.safetensors")))


def test_the_bundled_head_is_fairly_right() -> None:
    scorer = shapes_preference.load()
    made = [choice for choice in choices(Recipe(), "test", 300) if choice.shares[0] != choice.shares[1]]
    found = values(scorer, [(choice.text, scene) for choice in made for scene in choice.scenes])
    right = fmean((found[2 * i] > found[2 * i + 1]) == (choice.shares[0] > choice.shares[1]) for i, choice in enumerate(made))
    assert 0.65 < right < 0.95, "better than chance, and not the oracle"


def test_the_bundled_head_is_fond_of_large_things() -> None:
    scorer = shapes_preference.load()
    pairs = []
    for _, (_, clauses, scene) in zip(
        range(200), sample_prompts("test", ("colors", "two_object", "position", "pp_color_attr"), 3), strict=False
    ):
        for size in ("small", "large"):
            shown = tuple(replace(thing, size=size) for thing in scene)
            assert all(facts(clauses, shown).values()), "the prompts do not speak of size"
            pairs.append((text_of(clauses), shown))
    found = values(scorer, pairs)
    assert fmean(large > small for small, large in zip(found[::2], found[1::2], strict=True)) > 0.8
