"""Leaving patches out of a CLIP-type image tower: embed every picture once, run only the patches that are present.

Masks run as shorter sequences, padded to the longest of the call. Gates between 0 and 1 run as an attention bias of ln(gate): a token with
gate g has g times its weight in every softmax, so 1 is present, 0 is dropped, and the slope between them is that of the same game.
Only towers whose preprocessing keeps patches apart and whose readout is the class token can do this.

Legend: B pictures, R rows, N patches, L tokens kept, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pooled_with_gates(vision: Any, pixels_BCHW: Tensor, gates_RN: Tensor, index_R: Tensor) -> Tensor:
    """Pooled features [R, D] of a transformers CLIPVisionModel: row r is picture index_R[r] (normalised pixels at the tower's size)
    with the patches where gates_RN[r] is True, or with each patch at its gate when gates are floats."""
    tokens_BND = vision.pre_layrnorm(vision.embeddings(pixels_BCHW))
    if gates_RN.dtype == torch.bool:
        tokens_RLD, bias = _shortened(tokens_BND, gates_RN, index_R)
    else:
        tokens_RLD = tokens_BND[index_R]
        bias = torch.cat([torch.zeros_like(gates_RN[:, :1]), gates_RN.log()], 1)[:, None, None].to(tokens_RLD.dtype)
    hidden = vision.encoder(inputs_embeds=tokens_RLD, attention_mask=bias).last_hidden_state
    return vision.post_layernorm(hidden[:, 0])


def _shortened(tokens_BND: Tensor, keep_RN: Tensor, index_R: Tensor) -> tuple[Tensor, Tensor | None]:
    """The class token and the kept patches [R, L, D] in their order, and the bias that hides the padding (None when there is none)."""
    sizes_R = keep_RN.sum(1)
    longest = int(sizes_R.max())
    chosen_RL = keep_RN.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest] + 1
    positions = torch.nn.functional.pad(chosen_RL, (1, 0))  # position 0 is the class token
    tokens_RLD = tokens_BND[index_R[:, None], positions]
    if int(sizes_R.min()) == longest:
        return tokens_RLD, None
    padded = torch.arange(longest + 1, device=keep_RN.device) > sizes_R[:, None]
    bias = torch.zeros(padded.shape, dtype=tokens_RLD.dtype, device=keep_RN.device).masked_fill(padded, float("-inf"))
    return tokens_RLD, bias[:, None, None]
