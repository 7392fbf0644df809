"""Diffusion and flow-matching pipelines in the diffusers layout: SD3 and SD3.5, FLUX.1, Stable Diffusion 1.x, SANA, Qwen-Image.

One sampler for all of them, deterministic or stochastic, with log-probabilities (`mmalign.sde`); what differs from pipeline to pipeline
is in `_diffusion_layouts.py`. Papers: SD3 (arXiv 2403.03206), FLUX.1 (black-forest-labs/flux), latent diffusion (2112.10752), SANA
(2410.10629), Qwen-Image (2508.02324). Weights carry their own licences: FLUX.1-dev non-commercial, SD3.5 community, SD1.5 OpenRAIL-M.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.types import UsageError

if TYPE_CHECKING:
    from mmalign.models._diffusion_serve import DiffusionModel


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. The defaults are SD3.5's; a loaded pipeline has its own (docs/models.md), or its generation_config.json's.

    `guidance` 1 is the conditional model alone; for FLUX it is the number that the network was distilled with. `tokens` is the length to
    which the longest text encoder pads.
    """

    steps: int = 40
    guidance: float = 4.5
    negative: str = ""
    tokens: int = 256


# Settings of the model cards, or of the pipeline's own call where a card gives none.
PIPELINES: dict[str, Sampling] = {
    "StableDiffusion3Pipeline": Sampling(),
    "FluxPipeline": Sampling(steps=28, guidance=3.5, tokens=512),
    "StableDiffusionPipeline": Sampling(steps=50, guidance=7.5, tokens=77),
    "SanaPipeline": Sampling(steps=20, guidance=4.5, tokens=300),
    "QwenImagePipeline": Sampling(steps=50, guidance=4.0, negative=" ", tokens=512),
}


def pipeline_of(path: Path) -> str | None:
    """The pipeline's class by its model_index.json, or None."""
    try:
        content = json.loads((Path(path) / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("_class_name") if isinstance(content, dict) else None


def recognises(path: Path) -> bool:
    """Whether the folder's model_index.json names one of these pipelines."""
    return pipeline_of(path) in PIPELINES


def load(path: Path, *, device: str = "cpu", dtype: str = "float32", extra: Mapping[str, Path] | None = None) -> DiffusionModel:
    """The pipeline in a folder, ready to draw. `dtype` is the denoiser's and the text encoders'; the image decoder stays float32."""
    if extra:
        raise UsageError(f"A diffusers pipeline is whole in one folder; it takes no extra part, and got {', '.join(sorted(extra))}.")
    from mmalign.models._diffusion_serve import open_model

    name = pipeline_of(path)
    if name not in PIPELINES:
        raise UsageError(
            f"{path} is no pipeline that this family knows: its model_index.json names {name!r}; known: {', '.join(PIPELINES)}."
        )
    return open_model(Path(path), name, PIPELINES[name], device, dtype)
