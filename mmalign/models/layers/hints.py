"""Who sees whom in a row of prompt and picture, with or without visual hints before the prompt (SeGroS, its figure 6).

Suffixes: R rows, L tokens of a row, K hints. Masks of tokens are True at real ones; layouts [R, L, L] are True where a token sees another.
Every token sees itself, because a softmax over nothing is not a number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal(mask_RL: Tensor) -> Tensor:
    """Each token sees the real ones before it."""
    length = mask_RL.shape[1]
    lower = torch.ones(length, length, dtype=torch.bool, device=mask_RL.device).tril()
    return (lower & mask_RL[:, None, :]) | torch.eye(length, dtype=torch.bool, device=mask_RL.device)


def with_hints(hints_RKE: Tensor, hinted_R: Tensor | None, embeds_RLE: Tensor, mask_RL: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and mask with the hints put before the row; for samples without hints their places are padding."""
    is_hinted = mask_RL.new_ones(len(mask_RL)) if hinted_R is None else hinted_R.to(mask_RL)
    before = is_hinted[:, None].expand(-1, hints_RKE.shape[1])
    return torch.cat([hints_RKE.to(embeds_RLE), embeds_RLE], 1), torch.cat([before, mask_RL], 1)


def behind_hints(mask_RL: Tensor, n_text: int, n_hints: int, hinted_R: Tensor | None) -> Tensor:
    """The layout with hints before the row [text, picture]: hints see themselves alone, all of them; text sees the hints and is causal; the
    picture sees everything. Samples without hints keep the causal layout, in which they draw."""
    is_hinted = mask_RL.new_ones(len(mask_RL)) if hinted_R is None else hinted_R.to(mask_RL)
    mask = torch.cat([is_hinted[:, None].expand(-1, n_hints), mask_RL], 1)
    place = torch.arange(mask.shape[1], device=mask.device)
    is_hint, is_picture = place < n_hints, place >= n_hints + n_text
    whole = (is_hint[:, None] & is_hint) | is_picture[:, None]
    return causal(mask) | (whole & mask[:, None, :] & is_hinted[:, None, None])
