"""CLIP-FlanT5: a T5 that reads an image's CLIP patches in the place of one token (the network behind VQAScore).

Source: linzhiqiu/t2v_metrics at 10d549b, models/vqascore_models/clip_t5. Layout of the official checkpoints: T5's own names,
`mm_projector.0` and `.2`, and, in some, `vision_tower.vision_tower.*`; without those the vision tower comes from its own checkpoint.
Shapes: B rows, P image patches, L tokens, D width of T5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmalign.scorers import _folders, _weights
from mmalign.scorers._whole import load_whole

if TYPE_CHECKING:
    from pathlib import Path

TOWER = "vision_tower.vision_tower."
TIED = ("embed_tokens.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # copies of shared.weight
SELECTED_LAYER = -2


class ClipT5(nn.Module):
    """The three parts; `vision` gives patches of the last but one layer without the class token."""

    def __init__(self, t5: Any, vision: Any) -> None:
        super().__init__()
        width, inner = vision.config.hidden_size, t5.config.d_model
        self.t5, self.vision = t5, vision
        self.projector = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner))

    def encode_images(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Pixels to T5 embeddings [B, P, D]."""
        states = self.vision(x_BCHW.to(next(self.projector.parameters())), output_hidden_states=True).hidden_states
        return self.projector(states[SELECTED_LAYER][:, 1:])

    def log_prob(self, images_BPD: torch.Tensor, before_BL: torch.Tensor, after_BL: torch.Tensor, answer_BL: torch.Tensor) -> torch.Tensor:
        """log P of each answer token [B, L] after text, image, text; rows of one length, so there is no padding and no mask."""
        embed = self.t5.get_input_embeddings()
        inputs = torch.cat([embed(before_BL), images_BPD, embed(after_BL)], dim=1)
        shifted_BL = torch.cat(
            [torch.full_like(answer_BL[:, :1], self.t5.config.pad_token_id), answer_BL[:, :-1]], dim=1
        )  # T5 starts with pad
        logits = self.t5(inputs_embeds=inputs, decoder_input_ids=shifted_BL).logits
        return logits.float().log_softmax(-1).gather(-1, answer_BL[..., None])[..., 0]


def load(path: Path, vision: str, option: str, device: str, dtype: str) -> ClipT5:
    """The network of an official folder; `vision` is the tower's own checkpoint, of which the folder may have trained weights."""
    from transformers import CLIPVisionModel, T5Config, T5ForConditionalGeneration

    state = _folders.tensors_of(path)
    options = _folders.known_options(_folders.config_of(path), T5Config)
    t5: Any = T5ForConditionalGeneration(T5Config(**options | {"vocab_size": state["shared.weight"].shape[0]}))
    if (
        "lm_head.weight" in state
    ):  # Flan-T5 has a head of its own, but transformers 5 builds every T5 with the head and the embedding as one tensor
        t5.lm_head.weight = nn.Parameter(t5.lm_head.weight.detach().clone())
    tower = load_whole(CLIPVisionModel, vision, "cpu", "float32", f"{option}.vision")
    model = ClipT5(t5, tower)
    _weights.fill(model, _renamed(state, model), str(path))
    return model.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)


def _renamed(state: Mapping[str, torch.Tensor], model: ClipT5) -> dict[str, torch.Tensor]:
    """The official names under ours. Tied copies, which a file may hold or not, are filled from the shared table."""
    found = {f"vision.{key}": tensor for key, tensor in model.vision.state_dict().items()}
    for key, tensor in state.items():
        if key.startswith(TOWER):
            name = key.removeprefix(TOWER)
            found[f"vision.{name if f'vision.{name}' in found else name.removeprefix('vision_model.')}"] = tensor
        elif key.startswith("mm_projector."):
            found[key.replace("mm_projector.", "projector.")] = tensor
        elif key not in TIED:
            found[f"t5.{key}"] = tensor
    own = model.t5.state_dict()
    found |= {f"t5.{name}": state["shared.weight"] for name in TIED if name in own}
    found.setdefault("t5.lm_head.weight", state["shared.weight"])
    return {key: tensor for key, tensor in found.items() if not key.endswith(_weights.HARMLESS)}
