"""Lumina-DiMOO (Alpha-VLLM): one masked diffusion model that draws images of any shape and answers.

Paper: Lumina-DiMOO (arXiv 2510.06308). Loads Alpha-VLLM/Lumina-DiMOO, whose folder `vqvae` holds the image tokenizer (or --model-extra
vqvae=PATH). Batches of any prompts, where the official code takes one. Editing and the official cache are missing. Licence: Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.models.layers.extras import config_of

if TYPE_CHECKING:
    from mmalign.models._dimoo_serve import DimooModel

CLASS = "LLaDAForMultiModalGeneration"


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults are those of the official scripts (Alpha-VLLM/Lumina-DiMOO at 81344e6: cfg_scale 4, 64 steps).

    `guidance` w mixes u + w (c - u) as everywhere here, so it is the official cfg_scale plus 1. `temperature` divides the logits that
    codes are drawn from, `order_noise` scales the noise that decides which codes are kept (officially both are "temperature"). `task` is
    image (draw prompt.text, 1024 x 1024 unless --size) or answer (reply to prompt.text about prompt.meta["images"], at most one).
    """

    guidance: float = 5.0
    temperature: float = 1.0
    steps: int = 64
    order_noise: float = 1.0
    task: str = "image"
    answer_temperature: float = 0.0
    max_tokens: int = 1024  # as the two below, of inference_mmu.py
    answer_steps: int = 128
    answer_block: int = 256


def recognises(path: Path) -> bool:
    """Whether the folder is a Lumina-DiMOO: a LLaDA by its config.json, of the multimodal class or with a `vqvae` folder."""
    content = config_of(path)
    is_ours = CLASS in (content.get("architectures") or ()) or (path / "vqvae" / "config.json").is_file()
    return content.get("model_type") == "llada" and is_ours


def load(path: Path, *, device: str = "cpu", dtype: str = "float32", extra: Mapping[str, Path] | None = None) -> DimooModel:
    """The model in a folder, ready to draw. `dtype` is that of the trunk; the image tokenizer stays in float32."""
    from mmalign.models._dimoo_serve import open_model

    return open_model(Path(path), Sampling(), device, dtype, extra or {})
