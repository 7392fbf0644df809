"""Square pictures of one size through MAGVIT-v2: what Show-o and MMaDA share about pixels. Mixed in before `MaskedImages`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign import images
from mmalign.models.layers.lanes import lanes
from mmalign.types import MmalignError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmalign.models.layers.magvit import Magvit


class SquarePictures:
    """Pictures are fitted by their short side; what the trunk reads of them are the embeddings of their codes."""

    net: Any
    vq: Magvit
    offset: int
    width: int | None
    encode_image: Callable[..., Tensor]

    def set_square(self, tokens: int) -> None:
        """The grid and size in pixels of so many image tokens."""
        side = round(tokens**0.5)
        self.grid, self.size = (side, side), (side * self.vq.scale, side * self.vq.scale)

    def fit(self, pictures: Sequence[Any]) -> Tensor:
        """[B, 3, S, S] pixels in [0, 1] of uint8 pictures of any size: the short side fitted by bicubic filtering, the centre cropped."""
        return torch.cat([self._fitted(picture) for picture in pictures])

    def image_features(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N, E] what the trunk reads of pictures: the embeddings of their codes. Not differentiable in the pixels."""
        if pixels_BCHW.shape[-2:] != self.size:
            raise MmalignError(
                f"This model reads {self.size[0]} x {self.size[1]} pixels; got {list(pixels_BCHW.shape)}. "
                "Give uint8 arrays, which are fitted, or resize the tensor."
            )
        return self.net.get_input_embeddings()(self.encode_image(pixels_BCHW) + self.offset)

    def picture_codes(self, pictures: Sequence[Any]) -> list[list[int]]:
        """The codes of each picture (a tensor of the model's size or a uint8 array of any)."""
        codes: list[list[int]] = [[]] * len(pictures)
        for lane in lanes([0] * len(pictures), self.width):
            chosen = (pictures[row] for row in lane.rows)
            pixels = torch.cat([picture[None].cpu() if isinstance(picture, Tensor) else self._fitted(picture) for picture in chosen])
            for row, found in zip(lane.real, self.encode_image(pixels).tolist(), strict=False):
                codes[row] = found
        return codes

    def _fitted(self, picture: Any) -> Tensor:
        side = self.size[0]
        small = images.resize(picture, images.short_side(picture.shape[:2], side), "pil-bicubic")
        return images.to_tensor(images.centre_crop(small, side))
