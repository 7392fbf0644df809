"""BAGEL's text and picture format: a turn is <|im_start|> text <|im_end|>, an answer begins after another <|im_start|>.

Source: ByteDance-Seed/Bagel at 056b5fd (Bagel.prepare_prompts, prepare_vit_images, chat; data/transforms.py). A picture in a question is
<|vision_start|>, its patches, <|vision_end|>, before the question. Pictures are fitted as `chat` of the evaluation does, in one resize.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign import images
from mmalign.models.layers.qwen_chat import QwenChat


class BagelText(QwenChat):
    """A folder's tokenizer with BAGEL's turns. `patch` stands for a patch of a picture: an id that no text has."""

    frames = ("<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")

    def __init__(self, folder: Path, patch: int) -> None:
        super().__init__(folder)
        self.start, self.end, self.bos = (self.id_of(token) for token in self.frames[:3])
        self.patch = patch

    def row(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids of a turn; cut so that it fits into the limit and still ends. An empty text is no context at all."""
        ids = [self.bos, *self.encode(self.clean(text)), self.eos] if text else []
        return ids if limit is None or len(ids) <= limit else [*ids[: limit - 1], self.eos]

    def is_cut(self, text: str, limit: int) -> bool:
        return len(self.row(text)) > limit

    def question(self, text: str, patches: int) -> list[int]:
        """Token ids of a question, about a picture of so many patches unless there are none, up to where the answer begins."""
        picture = [self.start, *[self.patch] * patches, self.end] if patches else []
        return [*picture, self.bos, *self.encode(self.clean(text)), self.eos, self.bos]


@dataclass(frozen=True)
class Fitting:
    """How a picture becomes the vision tower's input: long side at most, short side at least, whole patches, a limit of all pixels."""

    longest: int = 980
    shortest: int = 224
    stride: int = 14
    pixels: int = 14 * 14 * 9 * 1024

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the fitted picture."""
        scale = max(min(self.longest / max(size), 1.0), self.shortest / min(size))
        made = self._scaled(size, scale)
        if made[0] * made[1] > self.pixels:
            made = self._scaled(made, self.pixels / (made[0] * made[1]))
        return self._scaled(made, self.longest / max(made)) if max(made) > self.longest else made

    def fit(self, image_HWC: Any) -> Any:
        """[3, H, W] in [0, 1]."""
        size = self.size(images.check_image(image_HWC).shape[:2])
        return images.to_tensor(images.resize(image_HWC, size, "pil-bicubic"))[0]

    def _scaled(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        height, width = (max(self.stride, round(round(side * scale) / self.stride) * self.stride) for side in size)
        return height, width
