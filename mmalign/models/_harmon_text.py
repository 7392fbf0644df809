"""Harmon's prompts: what is drawn, what is asked, and how pictures for both are fitted.

Source: wusize/Harmon at 4eb6087 (scripts). To draw: the turn "Generate an image: {text}." (so a text that ends with a full stop has two);
its unconditional twin is "Generate an image.". A question is the turn "<image>\\n{question}", where <image> stands for every image token
and then the buffer. Pictures that are read are padded to a square with grey 127; pictures to learn from are cut to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign import images
from mmalign.models.layers.qwen_chat import QwenChat

IMAGE = "<image>"
GREY = (127, 127, 127)


class HarmonText(QwenChat):
    """The tokenizer of Qwen2.5 with Harmon's turns. The picture's token is not in Qwen's vocabulary; it takes the next id, as there."""

    frames = (IMAGE,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.image = self.tokenizer.get_vocab().get(IMAGE, len(self.tokenizer))

    def drawing(self, text: str) -> list[int]:
        """Token ids of a prompt to draw."""
        return self.encode(self.turn(f"Generate an image: {self.clean(text).strip()}."))

    def blank(self) -> list[int]:
        """Token ids of the unconditional twin."""
        return self.encode(self.turn("Generate an image."))

    def question(self, text: str, slots: int) -> list[int]:
        """Token ids of a question up to where the answer begins, behind a picture of so many slots (0: none)."""
        if not slots:
            return self.encode(self.turn(self.clean(text)))
        before, after = self.turn(f"{IMAGE}\n{self.clean(text)}").split(IMAGE)
        return [*self.encode(before), *[self.image] * slots, *self.encode(after)]


def fit_reading(picture: Any, size: tuple[int, int]) -> Tensor:
    """[3, H, W] in [0, 1] of a uint8 picture to ask about: the whole of it, padded to a square."""
    return images.to_tensor(images.resize(images.pad_square(images.check_image(picture), GREY), size, "pil-bicubic"))[0]


def fit_drawing(pictures: Sequence[Any], size: tuple[int, int]) -> Tensor:
    """[B, 3, H, W] in [0, 1] of uint8 pictures to learn from: the largest centre of the size's shape."""
    made = []
    for picture in pictures:
        height, width = images.check_image(picture).shape[:2]
        scale = min(height / size[0], width / size[1])
        rows, columns = (min(whole, max(1, round(side * scale))) for whole, side in zip((height, width), size, strict=True))
        top, left = (height - rows) // 2, (width - columns) // 2
        made.append(images.to_tensor(images.resize(picture[top : top + rows, left : left + columns], size, "pil-bicubic")))
    return torch.cat(made)
