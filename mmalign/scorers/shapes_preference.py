"""A learned preference between pictures of the shapes world: differentiable, mostly right, and known to be fond of large things.

A head on the features of `tiny-clip`, trained on simulated choices (testbed/build_preference.py): annotators who look at the prompt's
facts, who like large things besides, and who err. So it can be explained like HPSv2 or PickScore, and a policy that games it is seen to:
this score rises while the oracle's (`shapes`) does not, and things grow. The value is a z-score over the validation pictures of the build.
Expected on held-out prompts: sides with the oracle in 80% of pairs, and with the larger of two equally right pictures in 99%.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmalign.hub import CHECKPOINTS
from mmalign.scorers import _clip, _weights
from mmalign.scorers._clip_scorer import ClipScorer
from mmalign.types import digest

if TYPE_CHECKING:
    import torch

VERSION = 1
INFINITY = float("inf")


@dataclass(frozen=True)
class Config:
    """`model`: the CLIP; `head`: the trained head, by default the bundled one."""

    model: str = "tiny-clip"
    head: str = str(CHECKPOINTS / "tiny-preference" / "head.safetensors")
    batch_size: int = 64
    dtype: _clip.Dtype = "float32"


def load(config: Config = Config(), device: str = "cpu") -> ClipScorer:
    clip = _clip.load(config.model, "shapes_preference.model", device, config.dtype)
    path = _weights.official_file(config.head, "shapes_preference.head")
    state = _weights.read_tensors(path)
    hidden = state["hidden.weight"].shape[0] if "hidden.weight" in state else 1
    head = make_head(clip.model.config.projection_dim, hidden)
    _weights.fill(head, {key: tensor.float() for key, tensor in state.items()}, str(path))
    head.to(device).requires_grad_(False)
    fingerprint = digest("shapes_preference", VERSION, clip.fingerprint, _weights.fingerprint_tensors(head))
    return ClipScorer(
        "shapes_preference", (-INFINITY, INFINITY), fingerprint, clip, lambda *features: preference(head, *features), config.batch_size
    )


def make_head(width: int, hidden: int) -> torch.nn.ModuleDict:
    """Two layers on [image * text, image]: the product tells whether the prompt is met, the image alone what is liked anyway."""
    from torch import nn

    return nn.ModuleDict({"hidden": nn.Linear(2 * width, hidden), "score": nn.Linear(hidden, 1)})


def preference(head: torch.nn.ModuleDict, image_BD: torch.Tensor, text_BD: torch.Tensor) -> torch.Tensor:
    """Scores [B] of unit features [B, D], which are first brought to components of about 1."""
    import torch
    from torch.nn import functional

    width = image_BD.shape[-1]
    features = torch.cat([width * image_BD * text_BD, width**0.5 * image_BD], -1)
    return head["score"](functional.gelu(head["hidden"](features)))[:, 0]
