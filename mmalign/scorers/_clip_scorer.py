"""The scorer that CLIPScore, PickScore, HPSv2 and learned heads are: a function of an image's and its prompt's CLIP features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmalign.scorers._clip import MAX_TOKENS, Clip
from mmalign.scorers._samples import Item, cut_note, score_in_batches
from mmalign.types import Sample, Score, Value

if TYPE_CHECKING:
    import torch


def cosine(image_BD: torch.Tensor, text_BD: torch.Tensor) -> torch.Tensor:
    """Cosines [B] of unit features, row by row."""
    return (image_BD * text_BD).sum(-1)


@dataclass(frozen=True)
class ClipScorer:
    """The loaded scorer. `formula` turns unit features of images and prompts [B, D] into scores [B], differentiably.

    `score` reads uint8 images exactly as the original does; a value's part `cosine` is that of the features. `score_pixels` is the same
    function of float pixels, with gradients. What attribution may ask beyond that follows the protocols in attribution/protocol.py.
    """

    name: str
    range: tuple[float, float]
    fingerprint: str
    clip: Clip
    formula: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    batch_size: int

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, self.batch_size, self._measure)

    def score_pixels(self, pixels_BCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores [B] of pixels in [0, 1] of any size, differentiable in the pixels; equal prompts cost one text pass."""
        return self.formula(self.clip.encode_pixels(pixels_BCHW), self.clip.text_features(prompts))

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
        return self.formula(self.clip.encode_gated(pixels_BCHW, gates_RN, index_R), self.clip.text_features(asked))

    def _measure(self, items: Sequence[Item]) -> list[Value]:
        import torch

        prompts = [item.text for item in items]
        with torch.no_grad():
            image_BD, text_BD = self.clip.encode_images([item.pixels for item in items]), self.clip.text_features(prompts)
            scores, cosines = self.formula(image_BD, text_BD).tolist(), cosine(image_BD, text_BD).tolist()
        notes = [cut_note(self.clip.n_tokens(prompt), MAX_TOKENS) for prompt in prompts]
        return [Value(score, {"cosine": angle}, detail=note) for score, angle, note in zip(scores, cosines, notes, strict=True)]
