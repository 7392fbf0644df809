"""HT-GRPO's propositions on a 3 x 3 world whose conditionals are exact: C.1 and C.3 by enumeration, C.2 by drawing masks.

The world is a model of the masked families without a network: a joint distribution of nine two-valued tokens for each prompt, whose
conditionals are what it says of hidden tokens (the paper's assumption 21). Its log-probabilities go through the functions that train.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from mmalign.trainers import _masked_choices as choices

from mmalign.models._masked import MaskedImages
from mmalign.models.layers.masked import HIDDEN
from mmalign.trajectory import Policy, Prompts, Trajectory

TOKENS = 9
PICTURES = torch.tensor(list(itertools.product((0, 1), repeat=TOKENS)))  # [512, 9]
ALPHA = 0.3


class World(MaskedImages):
    """Nine tokens with random pairwise couplings; the prompt is the seed of the joint distribution."""

    family, name, device, width = "world", "world", torch.device("cpu"), None
    grid, offset, mask_id, pad_id, steps, order_noise = (3, 3), 0, 2, 3, 4, 1.0
    vq = SimpleNamespace(codes=2)

    def encode_prompts(self, texts):
        ids, mask = torch.full((len(texts), TOKENS), self.mask_id), torch.ones(len(texts), TOKENS, dtype=torch.bool)
        self.joint = torch.stack([self.joint_of(int(text)) for text in texts])
        return Prompts(tuple(texts), ids, mask, ids.clone(), mask.clone())

    @staticmethod
    def joint_of(seed):
        stream = torch.Generator().manual_seed(seed)
        couplings = torch.randn(TOKENS, TOKENS, generator=stream, dtype=torch.float64) / 4
        signs = PICTURES.double() * 2 - 1
        return torch.softmax((signs @ couplings * signs).sum(1) + signs @ torch.randn(TOKENS, generator=stream, dtype=torch.float64) / 2, 0)

    def _branch(self, ids_RL, mask_RL, codes_RN, slots_RK):
        """Exact conditionals given the tokens that are not hidden; all rows are of the first prompt."""
        states, place_R = codes_RN.unique(dim=0, return_inverse=True)
        fits = ((states[:, None] == HIDDEN) | (states[:, None] == PICTURES)).all(-1)
        weight = fits * self.joint[0]
        is_one = ((weight @ PICTURES.double()) / weight.sum(1, keepdim=True))[place_R]
        both = torch.stack([1 - is_one, is_one], -1).clamp_min(1e-300).log()
        return both.gather(1, slots_RK[..., None].expand(-1, -1, 2))


@pytest.fixture(scope="module", params=[0, 1])
def world(request):
    model = World()
    return model, model.encode_prompts([str(request.param)])


def entropies(model, prompts, visible, is_blank=False):
    """[9] expected entropy of each token when those of a set are visible: over all pictures, weighted by their probability."""
    hidden = torch.ones(len(PICTURES), TOKENS, dtype=torch.bool)
    hidden[:, list(visible)] = False
    trajectory = Trajectory("masked", PICTURES, torch.zeros(PICTURES.shape, dtype=torch.float64), Policy(1.0), tuple(range(len(PICTURES))))
    if is_blank:
        said = model.log_prob_blank(prompts, trajectory)
    else:
        said = model.log_prob_given(prompts.select([0] * len(PICTURES)), trajectory, hidden)
    return -(model.joint[0][:, None] * said).sum(0)


def test_the_more_is_seen_the_less_is_uncertain(world):
    """C.1, for every token, every set of visible ones and every one more (longer ways are made of these)."""
    model, prompts = world
    sets = [frozenset(chosen) for size in range(TOKENS + 1) for chosen in itertools.combinations(range(TOKENS), size)]
    known = {visible: entropies(model, prompts, visible) for visible in sets}
    checked, strict = 0, 0
    for visible in sets:
        for token, revealed in itertools.permutations(set(range(TOKENS)) - visible, 2):
            gain = known[visible][token] - known[visible | {revealed}][token]
            assert gain > -1e-12
            checked, strict = checked + 1, strict + int(gain > 1e-6)
    assert checked == TOKENS * (TOKENS - 1) * 2 ** (TOKENS - 2) and strict > 0.9 * checked
    # In an order that does not look at the tokens, each rank is therefore less uncertain than the one before.
    by_rank = [sum(float(known[v][t]) for v in sets if len(v) == n for t in set(range(TOKENS)) - v) for n in range(TOKENS)]
    means = [total / (math.comb(TOKENS, n) * (TOKENS - n)) for n, total in enumerate(by_rank)]
    assert means == sorted(means, reverse=True)


def test_structure_that_is_seen_leaves_less_uncertainty_in_the_rest(world):
    """C.3, for every structure that floor(0.3 x 9) tokens can be: the fully hidden state is the upper bound, and it is the marginal's."""
    model, prompts = world
    blank = entropies(model, prompts, (), is_blank=True)
    is_one = model.joint[0] @ PICTURES.double()
    assert torch.allclose(blank, -(is_one * is_one.log() + (1 - is_one) * (1 - is_one).log()), atol=1e-12)
    size = math.floor(ALPHA * TOKENS)
    assert size == 2
    for first in itertools.permutations(range(TOKENS), size):
        step_of = torch.full((1, TOKENS), TOKENS)
        step_of[0, list(first)] = torch.arange(size)
        is_structure = choices.structure(choices.ranks(step_of), ALPHA)[0]
        assert set(is_structure.nonzero().flatten().tolist()) == set(first)
        seen = entropies(model, prompts, first)
        assert (blank - seen)[~is_structure].min() > -1e-12 and (blank - seen)[~is_structure].max() > 1e-6


@pytest.mark.parametrize("share", [0.3, 0.667, 0.933])
def test_masking_anew_shows_tokens_of_the_future_as_often_as_stated(share):
    """C.2: with probability 1 - p^(tokens decided later), whatever the steps were; the recorded states and the hidden image never do."""
    draws = 20_000
    step_of = torch.tensor([[2, 0, 1, 3, 0, 3, 2, 1, 3]])
    rank = choices.ranks(step_of)
    hidden = choices.subset(choices.uniforms(range(draws), TOKENS), torch.ones(draws, TOKENS, dtype=torch.bool), share, "bernoulli")
    for token in range(TOKENS):
        is_future = rank[0] > rank[0, token]
        found = (~hidden & is_future).any(1).float().mean()
        expected = 1 - share ** int(is_future.sum())
        assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / draws) ** 0.5 + 1e-9)
    group = choices.trace_groups(step_of, 1)
    for state in range(4):
        is_hidden, is_scored = group >= state, group == state
        assert (rank[~is_hidden][:, None] < rank[is_scored][None]).all() and is_hidden[is_scored].all()
        assert int((~is_hidden).sum()) == int((step_of < state).sum())


def test_trajectories_that_chance_orders_are_more_surprising_at_first(world, monkeypatch):
    """What C.1 says of rollouts: with an order that does not look at the codes, first tokens carry more of -log p than the rest."""
    model, prompts = world
    exact = model._branch
    monkeypatch.setattr(model, "_branch", lambda *state: exact(*state).float())  # networks give single precision
    count, schedule = 2000, tuple(1 - n / 20 for n in range(1, 21))
    drawn = model.sample(prompts.select([0] * count), Policy(1.0, hidden=schedule, order="random"), range(count))
    is_structure = choices.structure(choices.ranks(drawn.step_of), ALPHA)
    surprise = -drawn.log_prob
    assert surprise[is_structure].mean() > surprise[~is_structure].mean() + 0.02
