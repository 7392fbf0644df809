"""HT-GRPO's propositions: entropies of a 3 x 3 world by enumeration, and what masking anew shows of the future."""

from __future__ import annotations

import itertools

import torch

TOKENS = 9
STRUCTURE = 2  # floor(0.3 x 9) tokens decided first


def _world(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All pictures [512, 9] of nine two-valued tokens with random couplings, and their probabilities."""
    stream = torch.Generator().manual_seed(seed)
    pictures = torch.tensor(list(itertools.product((0, 1), repeat=TOKENS)))
    signs = pictures.double() * 2 - 1
    couplings = torch.randn(TOKENS, TOKENS, generator=stream, dtype=torch.float64) / 4
    fields = torch.randn(TOKENS, generator=stream, dtype=torch.float64) / 2
    return pictures, torch.softmax((signs @ couplings * signs).sum(1) + signs @ fields, 0)


def _entropies(pictures: torch.Tensor, joint: torch.Tensor, visible: tuple[int, ...]) -> torch.Tensor:
    """[9] expected entropies in nats of each token when those of a set are seen."""
    states = (pictures[:, list(visible)] * 2 ** torch.arange(len(visible))).sum(1) if visible else torch.zeros(len(pictures)).long()
    weight = torch.zeros(2 ** len(visible), dtype=torch.float64).index_add(0, states, joint)
    ones = torch.zeros(2 ** len(visible), TOKENS, dtype=torch.float64).index_add(0, states, joint[:, None] * pictures)
    chance = (ones / weight[:, None]).clamp(0, 1)
    return (weight[:, None] * -(torch.xlogy(chance, chance) + torch.xlogy(1 - chance, 1 - chance))).sum(0)


def context(seed: int) -> dict[str, float]:
    """The least and the mean fall of a token's expected entropy when one more token is seen, over all sets of seen ones."""
    pictures, joint = _world(seed)
    sets = [chosen for size in range(TOKENS) for chosen in itertools.combinations(range(TOKENS), size)]
    known = {frozenset(chosen): _entropies(pictures, joint, chosen) for chosen in [*sets, tuple(range(TOKENS))]}
    falls = [
        float(known[frozenset(seen)][token] - known[frozenset(seen) | {more}][token])
        for seen in sets
        for token, more in itertools.permutations(set(range(TOKENS)) - set(seen), 2)
    ]
    return {"least fall": min(falls), "mean fall": sum(falls) / len(falls)}


def structure(seed: int) -> dict[str, float]:
    """The same between nothing seen and the structure seen, for every structure."""
    pictures, joint = _world(seed)
    blank = _entropies(pictures, joint, ())
    falls = torch.cat(
        [
            (blank - _entropies(pictures, joint, first))[[token for token in range(TOKENS) if token not in first]]
            for first in itertools.combinations(range(TOKENS), STRUCTURE)
        ]
    )
    return {"least fall": float(falls.min()), "mean fall": float(falls.mean())}


def contamination(seed: int, draws: int = 20_000, share: float = 0.7) -> dict[str, float]:
    """How often hiding tokens anew, each with probability `share`, shows some of n that were decided later, and 1 - share^n."""
    stream = torch.Generator().manual_seed(seed)
    found = {}
    for future in (1, 4, 8):
        hidden = torch.rand(draws, future, generator=stream) < share
        found[f"seen of {future}"] = float((~hidden).any(1).double().mean())
        found[f"formula of {future}"] = 1 - share**future
    return found
