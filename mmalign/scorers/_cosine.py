"""The scorer that CLIPScore, PickScore and HPSv2 are: a function of the cosine between an image's and its prompt's CLIP features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmalign.scorers._clip import MAX_TOKENS, Clip
from mmalign.scorers._samples import Item, cut_note, score_in_batches
from mmalign.types import Sample, Score, Value

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CosineScorer:
    """The loaded scorer. `formula` turns cosines [B] into scores [B] and is differentiable; a value's part `cosine` is its raw input.

    `score` reads uint8 images exactly as the original does. `score_pixels` is the same function of float pixels, with gradients.
    """

    name: str
    range: tuple[float, float]
    fingerprint: str
    clip: Clip
    formula: Callable[[torch.Tensor], torch.Tensor]
    batch_size: int

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, self.batch_size, self._measure)

    def score_pixels(self, pixels_BCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores [B] of pixels in [0, 1] of any size, differentiable in the pixels; equal prompts cost one text pass."""
        return self.formula(self._cosine(self.clip.encode_pixels(pixels_BCHW), prompts))

    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit text features [B, D], remembered by prompt."""
        return self.clip.text_features(prompts)

    @property
    def patch_embedding(self) -> torch.nn.Module:
        return self.clip.patch_embedding

    def patch_grid(self) -> tuple[int, int]:
        return self.clip.patch_grid()

    def patch_activations(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.clip.patch_activations(pixels_BCHW)

    def patch_tokens(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.clip.patch_tokens(pixels_BCHW)

    def score_patches(
        self, pixels_BCHW: torch.Tensor, prompts: Sequence[str], gates_RN: torch.Tensor, index_R: torch.Tensor
    ) -> torch.Tensor:
        """Scores [R]: row r is picture index_R[r] seen through its patches' gates (attribution/dropping.py)."""
        asked = [prompts[index] for index in index_R.tolist()]
        return self.formula(self._cosine(self.clip.encode_gated(pixels_BCHW, gates_RN, index_R), asked))

    def _cosine(self, image_BD: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return (image_BD * self.clip.text_features(prompts)).sum(-1)

    def _measure(self, items: Sequence[Item]) -> list[Value]:
        import torch

        prompts = [item.text for item in items]
        with torch.no_grad():
            cosine_B = self._cosine(self.clip.encode_images([item.pixels for item in items]), prompts)
            scores_B = self.formula(cosine_B)
        notes = [cut_note(self.clip.n_tokens(prompt), MAX_TOKENS) for prompt in prompts]
        return [
            Value(score, {"cosine": cosine}, detail=note)
            for score, cosine, note in zip(scores_B.tolist(), cosine_B.tolist(), notes, strict=True)
        ]
