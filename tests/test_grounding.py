"""SeGroS's choice of words and tokens: sums, sizes, disjointness, invariances, the equations written out, noise up to chance alone."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from mmalign.trainers import _grounding as grounding
from mmalign.trainers.segros import roles_of

SIZES = {"n_text": st.integers(1, 12), "n_visual": st.integers(1, 30), "seed": st.integers(0, 10**6)}
FEW = settings(max_examples=25, deadline=None)


def features(number, width=8, seed=0):
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(text, visual, ratio, tau, diagonal):
    """Equations 3 to 11, sum by sum, in Python's own numbers."""

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    def normalised(row, skip=None):
        weights = [0.0 if index == skip else math.exp(value / tau) for index, value in enumerate(row)]
        return [weight / sum(weights) for weight in weights]

    def scaled(row):
        is_equal = max(row) - min(row) <= 1e-9 * max(map(abs, row))
        return [0.0 if is_equal else (value - min(row)) / (max(row) - min(row)) for value in row]

    text, visual = text.double().tolist(), visual.double().tolist()
    n_text = len(text)
    pairs = [[cosine(a, b) for b in text] for a in text]
    attention = [normalised(row, i if diagonal == "before" and n_text > 1 else None) for i, row in enumerate(pairs)]
    intra = [sum(attention[i][j] for i in range(n_text) if i != j) for j in range(n_text)]
    cross = [[cosine(z, e) for e in text] for z in visual]
    inter = [sum(column) for column in zip(*(normalised(row) for row in cross), strict=True)]
    importance = [a + b for a, b in zip(scaled(intra), scaled(inter), strict=True)]
    kept = sorted(range(n_text), key=lambda j: (-round(importance[j], 9), j))[: max(1, math.floor(ratio * n_text + 1e-9))]
    over_picture = [normalised([cross[i][j] for i in range(len(visual))]) for j in range(n_text)]
    return importance, set(kept), scaled([sum(over_picture[j][i] for j in kept) for i in range(len(visual))])


@FEW
@given(**SIZES, diagonal=st.sampled_from(["after", "before"]), tau=st.sampled_from([0.05, 0.1, 1.0]))
def test_grounding_is_the_papers_equations(n_text, n_visual, seed, diagonal, tau):
    text, visual = features(n_text, seed=seed), features(n_visual, seed=seed + 1)
    found = grounding.ground(text, visual, 0.4, tau, diagonal=diagonal)
    importance, kept, map_N = written_out(text, visual, 0.4, tau, diagonal)
    assert found.importance.tolist() == pytest.approx(importance, abs=1e-6)
    assert set(found.chosen.nonzero().flatten().tolist()) == kept and found.map.tolist() == pytest.approx(map_N, abs=1e-6)


@FEW
@given(**SIZES)
def test_attention_sums_and_sizes(n_text, n_visual, seed):
    text, visual = (torch.nn.functional.normalize(features(n, seed=seed + n), dim=-1) for n in (n_text, n_visual))
    logits = visual @ text.T / 0.1
    assert float(grounding.inter_affinity(logits).sum()) == pytest.approx(n_visual, rel=1e-5)
    chosen = grounding.top(torch.rand(n_text), grounding.count(0.4, n_text))
    assert float(grounding.grounding_scores(logits, chosen).sum()) == pytest.approx(int(chosen.sum()), rel=1e-5, abs=1e-6)
    found = grounding.ground(text, visual)
    assert int(found.chosen.sum()) == max(1, math.floor(0.4 * n_text + 1e-9)) and found.map.shape == (n_visual,)
    assert found.map.min() >= 0 and found.map.max() <= 1 and found.importance.max() <= 2


def test_a_tokens_affinity_to_itself_never_counts():
    alike = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]]), dim=-1)
    for diagonal in ("after", "before"):
        first, second, third = grounding.intra_affinity(alike, 0.1, diagonal).tolist()
        assert first > 0.3 and second > 0.3 and third < 0.02 + (diagonal == "before")
    assert grounding.intra_affinity(alike, 0.1, "before").sum() == pytest.approx(3)
    assert grounding.intra_affinity(alike, 0.1, "after").sum() < 2
    assert grounding.intra_affinity(alike[:1], 0.1, "before").tolist() == [0.0]


@FEW
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 50), shift=st.floats(-20, 20))
def test_min_max_ignores_scale_and_shift(seed, scale, shift):
    values = features(9, 1, seed).flatten()
    assert torch.allclose(grounding.min_max(values), grounding.min_max(values * scale + shift), atol=1e-9)
    assert grounding.min_max(torch.full((3,), shift)).tolist() == [0, 0, 0]


def test_words_that_the_picture_shows_ground_where_it_shows_them():
    eye = torch.eye(8)
    text = torch.stack([eye[0] + 0.3 * eye[1], eye[2], eye[3], eye[0], eye[4]])  # two words of one thing among others
    visual = torch.stack([eye[0], eye[7], eye[6], eye[0] + 0.1 * eye[7], eye[5], eye[6]])
    found = grounding.ground(text, visual, 0.4)
    assert found.chosen.tolist() == [True, False, False, True, False]
    assert grounding.top(found.map, 2).tolist() == [True, False, False, True, False, False]
    unfiltered = grounding.ground(text, visual, 0.4, affinities=())
    assert unfiltered.chosen.all()
    for one in ("intra", "inter"):
        assert grounding.ground(text, visual, 0.4, affinities=(one,)).importance.max() == 1


def test_a_caption_without_words_grounds_nothing():
    found = grounding.ground(torch.zeros(0, 8), features(6))
    assert not len(found.chosen) and (found.map == 0).all()


@FEW
@given(number=st.integers(1, 40), seed=st.integers(0, 10**6), hidden=st.integers(1, 40), ratio=st.sampled_from([0.1, 0.3, 0.4, 1.0]))
def test_roles_have_their_sizes_and_the_visible_tokens_are_the_lowest(number, seed, hidden, ratio):
    hidden = min(hidden, number)
    map_N = grounding.min_max(features(number, 1, seed).flatten())
    roles = roles_of(map_N, seed, n_hidden=hidden, ratio=ratio)
    score = grounding.perturbed(map_N, 0.5, seed)
    assert int(roles.hint.sum()) == math.floor(ratio * number + 1e-9) and int(roles.hidden.sum()) == hidden
    assert torch.equal(roles.scored, roles.hidden)
    visible = ~roles.hidden
    if visible.any():
        assert score[roles.hidden].min() >= score[visible].max()
    if hidden >= int(roles.hint.sum()):
        assert not (roles.hint & visible).any(), "every hint is a target when enough is hidden"
    part = roles_of(map_N, seed, n_hidden=hidden, ratio=ratio, scored_share=0.5)
    assert int(part.scored.sum()) == max(1, hidden // 2) and not (part.scored & ~part.hidden).any()
    assert torch.equal(part.scored, grounding.top(score, int(part.scored.sum())))


def test_the_ablations_choose_the_other_end():
    map_N = torch.linspace(0, 1, 10, dtype=torch.float64)
    names = [(hints, context) for hints in ("top", "bottom") for context in ("bottom", "top")]
    found = {name: roles_of(map_N, 1, *name, ratio=0.3, n_hidden=4, noise=0.0) for name in names}
    for (hints, context), roles in found.items():
        assert roles.hint.nonzero().flatten().tolist() == ([7, 8, 9] if hints == "top" else [0, 1, 2])
        assert roles.hidden.nonzero().flatten().tolist() == ([6, 7, 8, 9] if context == "bottom" else [0, 1, 2, 3])
    left = roles_of(map_N, 1, "all", "random", 0.3, None)
    assert left.hint.all() and left.hidden is None and left.scored is None
    assert roles_of(map_N, 1, "none", "bottom", n_hidden=4, noise=0.0).hint is None


def test_ranks_ignore_a_shift_of_the_noise_and_follow_the_map_without_it():
    map_N = grounding.min_max(features(20, 1).flatten())
    assert torch.equal(grounding.perturbed(map_N, 0.0, 3), map_N)
    noisy = grounding.perturbed(map_N, 0.5, 3)
    assert torch.equal(grounding.top(noisy, 6), grounding.top(noisy - 0.25, 6))
    assert torch.equal(noisy, grounding.perturbed(map_N, 0.5, 3)) and not torch.equal(noisy, grounding.perturbed(map_N, 0.5, 4))
    added = noisy - map_N
    assert added.min() >= 0 and added.max() <= 0.5


def test_infinite_noise_is_random_masking():
    """Over many seeds every token is hidden equally often, whatever the map; at the paper's noise the highest are hidden most."""
    map_N, draws, number = torch.linspace(0, 1, 12, dtype=torch.float64), 3000, 5
    share = {
        noise: torch.stack([roles_of(map_N, seed, n_hidden=number, noise=noise).hidden for seed in range(draws)]).double().mean(0)
        for noise in (0.5, math.inf)
    }
    error = math.sqrt(number / 12 * (1 - number / 12) / draws)
    assert (share[math.inf] - number / 12).abs().max() < 4.5 * error
    assert share[0.5][-1] > 0.99 and share[0.5][0] == 0
    for seed in range(20):
        assert torch.equal(roles_of(map_N, seed, noise=1e12).hint, roles_of(map_N, seed, noise=math.inf).hint)


def test_counts_do_not_lose_to_binary_fractions():
    assert [grounding.count(0.29, 100), grounding.count(0.3, 256), grounding.count(0.4, 1024), grounding.count(0.7, 10)] == [29, 76, 409, 7]
