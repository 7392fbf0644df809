"""Leaving patches out of a CLIP-type image tower: embed every picture once, run only the patches that are present.

Masks run as shorter sequences, padded to the longest of the call. Gates between 0 and 1 run as an attention bias of ln(gate): a token with
gate g has g times its weight in every softmax, so 1 is present, 0 is dropped, and the slope between them is that of the same game.
Only towers whose preprocessing keeps patches apart and whose readout is the class token can do this; because that token alone is read,
the last layer is computed for it alone.

Legend: B pictures, R rows, N patches, L tokens kept, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
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
    *lower, last = vision.encoder.layers
    for layer in lower:
        tokens_RLD = layer(tokens_RLD, bias)
    return vision.post_layernorm(_read_out(last, tokens_RLD, bias))


def _read_out(layer: Any, tokens_RLD: Tensor, bias: Tensor | None) -> Tensor:
    """What a layer makes of the class token, [R, D]; the other tokens give keys and values and nothing else."""
    attention, normed_RLD = layer.self_attn, layer.layer_norm1(tokens_RLD)
    query, key, value = (
        rearrange(project(seen), "r l (h d) -> r h l d", h=attention.num_heads)
        for project, seen in ((attention.q_proj, normed_RLD[:, :1]), (attention.k_proj, normed_RLD), (attention.v_proj, normed_RLD))
    )
    read = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attention.scale)
    token_RD = tokens_RLD[:, 0] + attention.out_proj(rearrange(read, "r h 1 d -> r (h d)"))
    return token_RD + layer.mlp(layer.layer_norm2(token_RD))


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
