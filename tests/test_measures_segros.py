"""The measurements behind SeGroS's claims, on pictures and features whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
import torch
from helpers.tiny_masked import make_showo
from mmalign.leaderboards.measures import gvu, segros
from mmalign.leaderboards.measures.segros import Crowd

from mmalign.models._harmon import Harmon
from mmalign.models.layers.masked import random_number
from mmalign.models.layers.noise import uniforms
from mmalign.testbed import oracle
from mmalign.testbed.world import Clause, realise
from mmalign.trajectory import TextTokens, TokenLosses
from mmalign.types import Prompt

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS, SPOKEN = 64, 6
EMPTY, THING = torch.eye(2)
SAID = ("a", " photo", " of", " red", " squares")


class Stub:
    """A model with features by hand: words that cannot be seen lie at what is empty, the others at things."""

    grid = (8, 8)

    def fit(self, pictures):
        return torch.stack([torch.from_numpy(picture).permute(2, 0, 1).float() / 255 for picture in pictures])

    def text_features(self, texts):
        words = [tuple(text.replace(" ", "| ").split("|")) for text in texts]
        return [TextTokens(torch.stack([THING if shown else EMPTY for shown in segros.can_be_seen(one)]), one) for one in words]

    def hidden_number(self, seeds):
        return random_number(uniforms(seeds, 1)[:, 0], TOKENS)


def made(words=SAID, features=None, pictures=40):
    """Pictures of 6 spoken tokens at places of chance, whose features tell them from empty ones."""
    stream = torch.Generator().manual_seed(5)
    spoken = torch.stack([torch.randperm(TOKENS, generator=stream) < SPOKEN for _ in range(pictures)])
    visual = torch.where(spoken[..., None], THING, EMPTY)
    text = TextTokens(features, words) if features is not None else Stub().text_features(["".join(words)])[0]
    prompts = [Prompt(str(n), "".join(words)) for n in range(pictures)]
    return Crowd(prompts, torch.zeros(pictures, 3, 32, 32), [text] * pictures, visual, spoken)


@pytest.fixture
def put(monkeypatch):
    def put(crowd=None, model=None):
        monkeypatch.setattr(segros, "crowd", lambda *_: crowd)
        monkeypatch.setattr(segros, "model", lambda _: model or Stub())

    return put


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return f"showo:{make_showo(tmp_path_factory.mktemp('models') / 'tiny', seed=3)}"


# -- where the map is ---------------------------------------------------------------------------------------------------------------------


def test_words_of_what_can_be_seen_and_their_parts():
    words = ("a", " photo", " of", " two", " la", "rge", " red", " cross", "es", " at", " the", " bottom", ",", " a", " squared", " circle")
    shown = [word for word, is_shown in zip(words, segros.can_be_seen(words).tolist(), strict=True) if is_shown]
    assert shown == [" la", "rge", " red", " cross", "es", " circle"]


def test_the_oracles_tokens_are_those_of_named_things(tiny):
    crowd = segros.crowd(1, 12, tiny)
    drawn = segros.scenes("val", 12, 201)[1]
    for prompt, picture, spoken in zip(crowd.prompts, drawn, crowd.spoken, strict=True):
        named = {entry["shape"] for entry in prompt.meta["include"]}
        (reading,) = oracle.read(picture[None])
        expected = torch.zeros(4, 4, dtype=torch.bool)
        for thing in reading.scene:
            if thing.shape in named:
                expected[thing.row : thing.row + 2, thing.column : thing.column + 2] = True
        assert torch.equal(spoken.view(4, 4), expected), "a thing's 8 pixels lie in the middle of four tokens of 8 pixels"


def test_a_map_at_the_things_is_right_and_one_at_the_rest_is_wrong(put):
    for features, answer in ((THING, 1.0), (EMPTY, 0.0)):
        put(made(features=features.expand(5, 2)))
        found = segros.map_quality(0)
        assert {arm: value for arm, value in found.items() if arm.startswith("trained")} == {
            arm: answer for arm in ("trained", "trained, all words", *(f"trained, temperature {t}" for t in (0.02, 0.05, 0.3)))
        }
    assert found == segros.map_quality(0) and found["random"] != segros.map_quality(1)["random"]


def test_random_features_are_equal_where_the_models_are():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    found = segros.redrawn(rows, torch.Generator().manual_seed(0))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1]) and not torch.isin(found, rows).any()


def test_words_without_a_place_draw_the_map_away(put, monkeypatch):
    """Two words at 6 things outweigh three at 58 empty tokens, but not three and sixty more."""
    put(made())
    monkeypatch.setattr(segros, "FILLER", " ".join(["so"] * 60))
    found = segros.filtered_maps(0)
    assert found["content"] == found["all"] == 1 and found["filler"] == 0
    put(made(features=EMPTY.expand(5, 2)))
    assert segros.filtered_maps(0)["content"] == 0, "the words' own features make the map"


def test_precision_and_recall_of_the_filters(put):
    """Two of five words are kept. The picture is mostly empty, so inter keeps words at the empty; of the two words that can be seen each
    has one other like itself, of the others each has two, so intra keeps these too."""
    put(made())
    found = segros.kept_words(0)
    assert found["share"] == pytest.approx(2 / 5) and found["inter"] == found["intra"] == found["both, recall"] == 0
    put(replace(made(), visual=THING.expand(40, TOKENS, 2)))
    assert segros.kept_words(0)["inter"] == segros.kept_words(0)["inter, recall"] == 1


# -- what is hidden and hinted ------------------------------------------------------------------------------------------------------------


def test_a_right_map_hides_nothing_else_before_all_is_hidden(put, monkeypatch):
    put(made(features=THING.expand(5, 2)))
    monkeypatch.setattr(segros, "losses", lambda prompts, pixels, name, given: given.hidden * 3.0)
    found, seeds = segros.wasted(0, 40), segros.seeds_of(0, "mask", 40)
    for law, numbers in (("", Stub().hidden_number(seeds)), (", Harmon", Harmon.hidden_number(None, seeds, TOKENS))):
        waste = sum(max(0, int(number) - SPOKEN) for number in numbers)
        assert found[f"grounded{law}"] == pytest.approx(waste / int(numbers.sum()))
        assert found[f"random{law}"] == pytest.approx(1 - SPOKEN / TOKENS, abs=0.02)
    assert found["grounded, loss"] == pytest.approx(found["grounded"]) and found["random, loss"] == pytest.approx(found["random"])


def test_without_noise_the_same_tokens_come_again(put):
    put(made())
    found = segros.coverage(0, 40, draws=5)
    numbers = torch.stack([Stub().hidden_number(segros.seeds_of(0, f"mask {n}", 40)) for n in range(5)])
    assert found["hinted 0"] == pytest.approx(math.floor(0.3 * TOKENS) / TOKENS)
    assert found["hidden 0"] == pytest.approx(float(numbers.max(0).values.double().mean()) / TOKENS)
    assert found["hinted 0"] < found["hinted 0.25"] and found["hidden 0"] < found["hidden 1"] <= 1
    assert segros.coverage(0, 40, draws=1)["hinted 1"] == pytest.approx(found["hinted 0"]), "once, noise moves hints and adds none"


# -- what hints tell ----------------------------------------------------------------------------------------------------------------------


def test_every_scene_that_fulfils_a_text_is_counted_once():
    assert len(segros.fulfilling([Clause("circle", color="red")])) == 9 * 2
    assert len(segros.fulfilling([Clause("circle", 2, "red")])) == 36 * 2**2
    assert len(segros.fulfilling([Clause("cross", size="small")])) == 9 * 7, "no green cross is ever shown"
    clauses, rng = (Clause("circle", color="red", region="left"), Clause("cross", size="small", position=("above", 0))), Random(0)
    found = segros.fulfilling(clauses)
    assert len(set(found)) == len(found) and {realise(clauses, rng) for _ in range(4000)} == set(found)


def test_hints_that_say_nothing_and_hints_that_say_all(put):
    class Blind(Stub):
        def image_features(self, pixels):
            return torch.ones(len(pixels), TOKENS, 2)

    class Clear(Stub):
        def image_features(self, pixels):
            return torch.arange(1.0, len(pixels) + 1)[:, None, None].expand(-1, TOKENS, 2)

    put(model=Blind())
    blind = segros.uncertainty(0, prompts=2)
    assert blind["text and hints"] == pytest.approx(blind["text"]) and blind["text"] > math.log(9)
    put(model=Clear())
    assert segros.uncertainty(0, prompts=2) == {"text": blind["text"], "text and hints": 0}


def test_arms_of_the_loss_differ_in_hints_alone(tiny, monkeypatch):
    asked = []

    def token_losses(self, prompts, pixels, seeds, blank=None, given=None):
        asked.append((prompts.texts, pixels, given))
        return TokenLosses(given.hidden * (len(asked) * torch.arange(1.0, len(pixels) + 1)[:, None]), given.hidden)

    monkeypatch.setattr(type(gvu.model(tiny)), "token_losses", token_losses)
    found = segros.loss_given_hints(0, pictures=4, name=tiny)
    assert found == pytest.approx({"text": 2.5, "text and hints": 5.0, "random hints": 7.5, "another's hints": 10.0}), "means over pictures"
    texts, pixels, plain = asked[0]
    assert plain.hints is None and all(torch.equal(given.hidden, plain.hidden) for _, _, given in asked)
    hints, by_chance, others = (given.hints for _, _, given in asked[1:])
    assert torch.equal(others, hints[[3, 0, 1, 2]]) and hints.shape == by_chance.shape == (4, 4, 48) and not torch.equal(hints, by_chance)
    visual = gvu.model(tiny).image_features(pixels)
    maps = segros.maps(segros.grounded(gvu.model(tiny).text_features(texts), visual))
    for row, seed in enumerate(segros.seeds_of(0, "noise", 4)):
        assert torch.equal(hints[row], visual[row][segros.roles_of(maps[row], seed).hint])


def test_the_loss_is_the_models(tiny):
    crowd = segros.crowd(0, 3, tiny)
    hidden = torch.zeros(3, 16, dtype=torch.bool)
    hidden[:, 2:9] = True
    found = segros.losses(crowd.prompts, crowd.pixels, tiny, segros.Supervision(hidden=hidden))
    assert not found.requires_grad and torch.equal(found > 0, hidden)


# -- what the map costs -------------------------------------------------------------------------------------------------------------------


def test_seconds_are_those_of_the_same_batches_with_and_without_the_map(tiny, monkeypatch):
    clock, seen = [0.0], []
    real = segros.add_drawing

    def timed(config, model, loop, batch, tally, is_shown):
        assert not seen or all(parameter.grad is None for parameter in model.net.parameters()), "gradients do not add up"
        real(config, model, loop, batch, tally, is_shown)
        assert any(parameter.grad is not None for parameter in model.net.parameters()) and model is not gvu.model(tiny)
        seen.append((config.grounds, [pair.prompt.text for pair in batch]))
        clock[0] += (100 if len(seen) <= 2 else 1) * (3 if config.grounds else 2)

    monkeypatch.setattr(segros, "add_drawing", timed)
    monkeypatch.setattr(segros.time, "process_time", lambda: clock[0])
    assert segros.step_seconds(0, steps=2, name=tiny) == {"with": 3, "without": 2, "ratio": 1.5}, "the first of each does not count"
    assert [grounds for grounds, _ in seen] == [True, False] * 3 and all(a[1] == b[1] for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert len(seen[0][1]) == 4 and seen[0][1] != seen[2][1]
