"""Harmon (S-Lab): one masked autoencoder that reads pictures and draws them, with Qwen2.5 in its middle.

Paper: Harmon (arXiv 2503.21979). Loads wusize/Harmon-0_5B and Harmon-1_5B (a folder with a config.json), and the original
harmon_0.5b.pth or harmon_1.5b.pth with, beside it, Qwen2.5-Instruct (sizes and tokenizer, --model-extra qwen2.5=PATH) and kl16.ckpt
(image coder, --model-extra kl16=PATH); a folder of the latter kind has no config, so it is given as harmon:FOLDER. Licence of weights and
official code: S-Lab 1.0, non-commercial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.models.layers.extras import config_of

if TYPE_CHECKING:
    from mmalign.models._harmon_serve import HarmonModel


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults are those of the official scripts (wusize/Harmon at 4eb6087).

    `steps` decide all tokens of a picture, `inner_steps` denoise each of them (0: as many as the checkpoint says). `guidance` w mixes the
    predicted noises, u + w (c - u). `temperature` multiplies the deviation of the denoising steps. `task` is image (draw prompt.text) or
    answer (reply to prompt.text about prompt.meta["images"], at most one).
    """

    guidance: float = 3.0
    temperature: float = 1.0
    steps: int = 64
    inner_steps: int = 0
    task: str = "image"
    answer_temperature: float = 0.0  # greedy, as the official script
    max_tokens: int = 1024


def recognises(path: Path) -> bool:
    """Whether the folder's config.json is a Harmon's."""
    return config_of(path).get("model_type") == "harmon"


def load(path: Path, *, device: str = "cpu", dtype: str = "float32", extra: Mapping[str, Path] | None = None) -> HarmonModel:
    """The model in a folder, ready to draw. `dtype` is that of all but the image coder, which stays in float32."""
    from mmalign.models._harmon_serve import open_model

    return open_model(Path(path), Sampling(), device, dtype, extra or {})
