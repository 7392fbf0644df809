"""LLaVA-NeXT checkpoints with a Qwen2 and a SigLIP as transformers' LLaVA-OneVision modules: the key map and one forward pass.

Source: CaraJ7/T2I-R1 src/t2i-r1/src/utils/LLaVA-NeXT at 2d9d4d1. The processor of transformers is passed by: it always cuts an image into
crops ("anyres"), while a checkpoint configured with aspect ratio "pad" sees one square. Shapes: B rows, P patches, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.scorers import _folders, _weights
from mmalign.types import MmalignError

if TYPE_CHECKING:
    import torch

TOWER = "model.vision_tower.vision_tower.vision_model"
NAMES = {  # LLaVA-NeXT's name -> transformers' (patterns of _weights.rename)
    f"{TOWER}.@": "model.vision_tower.@",
    "model.mm_projector.0.@": "model.multi_modal_projector.linear_1.@",
    "model.mm_projector.2.@": "model.multi_modal_projector.linear_2.@",
    "model.image_newline": "model.image_newline",
    "model.embed_tokens.@": "model.language_model.embed_tokens.@",
    "model.layers.@": "model.language_model.layers.@",
    "model.norm.@": "model.language_model.norm.@",
    "lm_head.@": "lm_head.@",
}
HEAD_WIDTH = 72  # of SigLIP so400m: 1152 wide, 16 heads


def load(path: Path, device: str, dtype: str) -> Any:
    """The network of a folder in the authors' layout; the tower's sizes, which its config.json lacks, are read from its tensors."""
    import torch
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config

    state, options = _folders.tensors_of(path), _folders.config_of(path)
    if f"{TOWER}.embeddings.patch_embedding.weight" not in state:
        raise MmalignError(f"The folder {path} is no LLaVA-NeXT checkpoint with a SigLIP tower: it lacks {TOWER}.*.")
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    text = _folders.known_options(options, Qwen2Config) | {"vocab_size": state["model.embed_tokens.weight"].shape[0]}
    config = LlavaOnevisionConfig(vision_config=tower_sizes(state), text_config=text | {"model_type": "qwen2"}, tie_word_embeddings=False)
    model: Any = LlavaOnevisionForConditionalGeneration(config)
    _weights.fill(model, _weights.rename(state, NAMES, str(path)), str(path))
    return model.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)


def tower_sizes(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    width, _, patch, _ = state[f"{TOWER}.embeddings.patch_embedding.weight"].shape
    grid = math.isqrt(state[f"{TOWER}.embeddings.position_embedding.weight"].shape[0])
    return {
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
        "hidden_size": width,
        "intermediate_size": state[f"{TOWER}.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(
            {key for key in state if key.startswith(f"{TOWER}.encoder.layers.") and key.endswith("layer_norm1.weight")}
        ),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "patch_size": patch,
        "image_size": grid * patch,
    }


def encode_images(model: Any, x_BCHW: torch.Tensor) -> torch.Tensor:
    """Pixels to language embeddings [B, P + 1, D]: the tower without its last norm, the projector, and one newline at the end."""
    import torch

    tower = model.model.vision_tower
    weight = tower.embeddings.patch_embedding.weight
    states = tower.encoder(inputs_embeds=tower.embeddings(x_BCHW.to(weight.device, weight.dtype))).last_hidden_state
    newline = model.model.image_newline.expand(len(states), 1, -1)
    return torch.cat([model.model.multi_modal_projector(states), newline.to(states)], dim=1)


def next_logits(model: Any, images_BPD: torch.Tensor, before_BL: torch.Tensor, after_BL: torch.Tensor) -> torch.Tensor:
    """Logits [B, V] in float32 of the token after text, image, text; rows of one length."""
    import torch

    embed = model.model.language_model.embed_tokens
    inputs = torch.cat([embed(before_BL), images_BPD, embed(after_BL)], dim=1)
    return model.lm_head(model.model.language_model(inputs_embeds=inputs).last_hidden_state[:, -1]).float()
