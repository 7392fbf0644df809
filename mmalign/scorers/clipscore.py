"""CLIPScore: cosine between CLIP's image and text features, raw or in one of its two published scalings.

Paper: Hessel et al., arXiv 2104.08718 (2.5 * max(cos, 0)). `convention`: "cosine" is the raw number, as T2I-CompBench reports it
(Karine-Huang/T2I-CompBench at 1b70949, there with ViT-B/32); "percent" is max(100 cos, 0), as torchmetrics has it; "paper" is the paper's.
Preprocessing is OpenAI's: short side to 224 by PIL bicubic, central crop; text is cut at 77 tokens. We take any CLIPModel, by default
ViT-L/14, and leave out the paper's prefix "A photo depicts": benchmarks of generated images do not use it. Typical raw values: 0.2 to
0.35.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmalign.scorers import _clip
from mmalign.scorers._clip_scorer import ClipScorer, cosine
from mmalign.types import digest

NEEDS = ("weights: openai/clip-vit-large-patch14",)
VERSION = 1

FORMULAS = {
    "cosine": cosine,
    "percent": lambda image_BD, text_BD: 100 * cosine(image_BD, text_BD).clamp(min=0),
    "paper": lambda image_BD, text_BD: 2.5 * cosine(image_BD, text_BD).clamp(min=0),
}
RANGES = {"cosine": (-1.0, 1.0), "percent": (0.0, 100.0), "paper": (0.0, 2.5)}


@dataclass(frozen=True)
class Config:
    """`model`: folder or hub id of a CLIPModel; `convention`: which scaling of the cosine is the value."""

    model: str = "openai/clip-vit-large-patch14"
    convention: Literal["cosine", "percent", "paper"] = "cosine"
    batch_size: int = 32
    dtype: _clip.Dtype = "float32"


def load(config: Config = Config(), device: str = "cpu") -> ClipScorer:
    clip = _clip.load(config.model, "clipscore.model", device, config.dtype)
    fingerprint = digest("clipscore", VERSION, config.convention, clip.fingerprint)
    return ClipScorer("clipscore", RANGES[config.convention], fingerprint, clip, FORMULAS[config.convention], config.batch_size)
