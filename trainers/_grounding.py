"""Which words of a caption are seen in a picture, and where: SeGroS's text filter, grounding map and choice of tokens.

Paper: SeGroS (papers' equations 3-12; their symbols were lost in its public text, ours follow the prose). Everything is of one pair and
comes before the transformer: text tokens E [L, D] without special ones, visual tokens Z [N, D]. Suffixes: L text tokens, N visual tokens.
Open in the paper and chosen here: the temperature; a token's affinity to itself takes part in the softmax and is left out of the sum
(`diagonal=after`, the words of eq. 3-4; `before` leaves it out of both); at least one text token is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EQUAL = 1e-9  # relative difference of float64 sums that is rounding
Affinity = Literal["intra", "inter"]
Diagonal = Literal["after", "before"]


@dataclass(frozen=True)
class Grounding:
    """Chosen text tokens (bool [L]), their importance [L] in [0, 2], and the grounding map [N] in [0, 1]."""

    chosen: Tensor
    importance: Tensor
    map: Tensor


def ground(
    text_LD: Tensor,
    visual_ND: Tensor,
    ratio: float = 0.4,
    temperature: float = 0.1,
    affinities: Sequence[Affinity] = ("intra", "inter"),
    diagonal: Diagonal = "after",
) -> Grounding:
    """The grounding of one pair. `affinities` that are left out do not filter; without any, every token counts (the paper's Table 4).

    A caption without a token grounds nothing: its map is 0 everywhere.
    """
    # float64: two tokens that receive the same must not be set apart by rounding, which min-max would blow up to 0 and 1
    text, visual = F.normalize(text_LD.double(), dim=-1), F.normalize(visual_ND.double(), dim=-1)
    if not len(text):
        return Grounding(torch.zeros(0, dtype=torch.bool), torch.zeros(0).double(), torch.zeros(len(visual)).double())
    logits_NL = visual @ text.T / temperature
    importance = torch.zeros_like(text[:, 0])
    if "intra" in affinities:
        importance = importance + min_max(intra_affinity(text, temperature, diagonal))
    if "inter" in affinities:
        importance = importance + min_max(inter_affinity(logits_NL))
    chosen = top(importance, max(1, count(ratio, len(text)))) if affinities else torch.ones_like(importance, dtype=torch.bool)
    return Grounding(chosen.cpu(), importance.cpu(), min_max(grounding_scores(logits_NL, chosen)).cpu())


def intra_affinity(text_LD: Tensor, temperature: float, diagonal: Diagonal = "after") -> Tensor:
    """[L] attention that each token receives from the other ones (eq. 3-4); rows of `text_LD` have length 1."""
    logits_LL = text_LD @ text_LD.T / temperature
    itself = torch.eye(len(text_LD), dtype=torch.bool, device=text_LD.device)
    if diagonal == "before" and len(text_LD) > 1:
        logits_LL = logits_LL.masked_fill(itself, -math.inf)
    return logits_LL.softmax(1).masked_fill(itself, 0).sum(0)


def inter_affinity(logits_NL: Tensor) -> Tensor:
    """[L] attention that each text token receives from the whole picture (eq. 5-6); each visual token gives 1 in all."""
    return logits_NL.softmax(1).sum(0)


def grounding_scores(logits_NL: Tensor, chosen_L: Tensor) -> Tensor:
    """[N] attention over the picture, summed over the chosen text tokens (eq. 10-11); each of them gives 1 in all."""
    return logits_NL.softmax(0) @ chosen_L.to(logits_NL.dtype)


def min_max(values: Tensor) -> Tensor:
    """The values moved and scaled to [0, 1]; 0 where all are equal up to rounding."""
    least, greatest = values.min(), values.max()
    is_equal = greatest - least <= EQUAL * torch.maximum(greatest.abs(), least.abs())
    return torch.zeros_like(values) if is_equal else (values - least) / (greatest - least)


def perturbed(map_N: Tensor, noise: float, seed: int) -> Tensor:
    """[N] the map with uniform noise of [0, `noise`] added to each token (eq. 12), from the seed alone. Infinite noise is noise alone."""
    uniform_N = torch.from_numpy(np.random.Generator(np.random.Philox(key=seed)).random(len(map_N)))
    return uniform_N if math.isinf(noise) else map_N + noise * uniform_N


def count(ratio: float, number: int) -> int:
    """floor(ratio * number), without what binary fractions lose: 0.29 of 100 are 29."""
    return math.floor(ratio * number + 1e-9)


def top(scores: Tensor, number: int) -> Tensor:
    """bool: the `number` greatest scores, equal ones by their place."""
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[scores.argsort(descending=True, stable=True)[:number]] = True
    return chosen
