"""LAION aesthetic predictor v2: how much people would like an image, about 1 to 10, from its CLIP ViT-L/14 features alone.

christophschuhmann/improved-aesthetic-predictor at 6934dd8: a five-layer head without activations on the unit-length image feature (leave
out the normalisation and the score explodes). The head meant is `sac+logos+ava1-l14-linearMSE.pth`; others of that repository give other
scales. Preprocessing is OpenAI's CLIP's. Usual values: 4.5 to 7. Changed: the head is folded to one affine map (equal to rounding) and
runs in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmalign.scorers import _affine, _clip
from mmalign.scorers._samples import Item, score_in_batches
from mmalign.scorers._weights import fingerprint_tensors, official_file, read_tensors
from mmalign.types import Sample, Score, Value, digest

if TYPE_CHECKING:
    import torch

NEEDS = ("weights: openai/clip-vit-large-patch14", "weights: trl-lib/ddpo-aesthetic-predictor")
VERSION = 1


@dataclass(frozen=True)
class Config:
    """`model`: folder or hub id of the CLIP; `head`: path of the .pth, or OWNER/NAME:FILE on the hub (by default TRL's copy of it)."""

    model: str = "openai/clip-vit-large-patch14"
    head: str = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"
    batch_size: int = 32
    dtype: _clip.Dtype = "float32"


def load(config: Config = Config(), device: str = "cpu") -> AestheticScorer:
    clip = _clip.load(config.model, "aesthetic.model", device, config.dtype)
    path = official_file(config.head, "aesthetic.head")
    head = _affine.fold(read_tensors(path), clip.model.config.projection_dim, str(path)).to(device)
    return AestheticScorer(clip, head, digest("aesthetic", VERSION, clip.fingerprint, fingerprint_tensors(head)), config.batch_size)


@dataclass(frozen=True)
class AestheticScorer:
    """The loaded scorer. It takes no notice of prompts; its pixel functions accept them so that it can stand where other scorers do."""

    clip: _clip.Clip
    head: Any
    fingerprint: str
    batch_size: int
    name: str = "aesthetic"
    range: tuple[float, float] = (float("-inf"), float("inf"))  # an affine map of a unit vector: no bound is part of the definition

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, self.batch_size, self._measure, text=None)

    def score_pixels(self, pixels_BCHW: torch.Tensor, prompts: Sequence[str] = ()) -> torch.Tensor:
        """Scores [B] of pixels in [0, 1] of any size, differentiable in the pixels."""
        return self.head(self.clip.encode_pixels(pixels_BCHW))[:, 0]

    @property
    def patch_embedding(self) -> torch.nn.Module:
        return self.clip.patch_embedding

    def patch_grid(self) -> tuple[int, int]:
        return self.clip.patch_grid()

    def patch_activations(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.clip.patch_activations(pixels_BCHW)

    def score_patches(
        self, pixels_BCHW: torch.Tensor, prompts: Sequence[str], gates_RN: torch.Tensor, index_R: torch.Tensor
    ) -> torch.Tensor:
        """Scores [R]: row r is picture index_R[r] seen through its patches' gates (attribution/dropping.py)."""
        return self.head(self.clip.encode_gated(pixels_BCHW, gates_RN, index_R))[:, 0]

    def _measure(self, items: Sequence[Item]) -> list[Value]:
        import torch

        with torch.no_grad():
            return [Value(score) for score in self.head(self.clip.encode_images([item.pixels for item in items]))[:, 0].tolist()]
