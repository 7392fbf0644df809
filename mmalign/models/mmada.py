"""MMaDA (Gen-Verse): one masked diffusion model that draws and answers.

Paper: MMaDA (arXiv 2505.15809). Loads Gen-Verse/MMaDA-8B-* with the image tokenizer showlab/magvitv2 beside it, given as --model-extra
magvitv2=PATH or as a folder of this name inside the checkpoint. Text has no exact log-probability here: estimators are named. Licence: MIT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.models.layers.extras import config_of
from mmalign.models.layers.generation import checkpoint_settings

if TYPE_CHECKING:
    from mmalign.models._mmada_serve import MmadaModel


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults are those of the official instructions (Gen-Verse/MMaDA at 3cdb870: guidance_scale 3.5, 15 steps).

    `guidance` w mixes u + w (c - u) as everywhere here, so it is the official guidance_scale plus 1. `temperature` divides the logits that
    codes are drawn from, `order_noise` (officially "temperature") scales the noise that decides which codes are kept. `task` is image
    (draw prompt.text) or answer (reply to prompt.text about prompt.meta["images"], at most one): `max_tokens` are written in blocks.
    """

    guidance: float = 4.5
    temperature: float = 1.0
    steps: int = 15
    order_noise: float = 1.0
    task: str = "image"
    answer_temperature: float = 0.0
    max_tokens: int = 1024  # as the two below, of inference_mmu.py
    answer_steps: int = 512
    answer_block: int = 1024


def recognises(path: Path) -> bool:
    """Whether the folder's config.json is an MMaDA's."""
    return config_of(path).get("model_type") == "mmada"


def load(path: Path, *, device: str = "cpu", dtype: str = "float32", extra: Mapping[str, Path] | None = None) -> MmadaModel:
    """The model in a folder, ready to draw. `dtype` is that of the trunk; the image tokenizer stays in float32."""
    from mmalign.models._mmada_serve import open_model

    return open_model(Path(path), checkpoint_settings(Path(path), Sampling()), device, dtype, extra or {})
