"""X-Omni's text and picture format: prompts to draw, questions about pictures, answers, and how a picture is fitted.

Source: X-Omni-Team/X-Omni at 2b8237b (generate.py, chat.py) and the model's remote code (mmencode, create_anyres_preprocess). A prompt is
the bare text, then <SOM>rows columns<IMAGE>; a picture in a question is the same frame with its codes and <EOM>, a newline before the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmalign import images
from mmalign.models.layers.qwen_chat import QwenChat
from mmalign.types import MmalignError

CODE = "<MM-Token-{}>"
_CODES = re.compile(r"<MM-Token-\d+>")


class XOmniText(QwenChat):
    """A folder's tokenizer with X-Omni's format. Codes are the ids from `first` on."""

    def __init__(self, folder: Path, specials: Sequence[str], first: int, codes: int) -> None:
        super().__init__(folder)
        self.frames = (*specials, "<|im_start|>", "<|im_end|>")
        self.start, self.end, self.image = (self.id_of(token) for token in specials)
        self.first = first
        ends = {CODE.format(code): self.id_of(CODE.format(code)) for code in (0, codes - 1)}
        if list(ends.values()) != [first, first + codes - 1]:
            raise MmalignError(
                f"The image tokens of the tokenizer in {folder} are {ends}; the config says that {codes} of them begin at {first}. "
                "Tokenizer and config do not belong together."
            )

    def clean(self, text: str) -> str:
        return _CODES.sub("", super().clean(text))

    def drawing(self, text: str, grid: tuple[int, int], reasoning: str | None = None) -> list[int]:
        """Token ids of a prompt to draw so many rows and columns; with reasoning, of T2I-R1's second stage: "{text}. {reasoning}"."""
        content = self.clean(text if reasoning is None else f"{text}. {reasoning}")
        return self.tokenizer(content + self._frame(grid)).input_ids

    def blank(self, grid: tuple[int, int]) -> list[int]:
        """Token ids of the unconditional twin: the frame alone."""
        return self.encode(self._frame(grid))

    def question(self, text: str, codes: Sequence[Sequence[int]] | None) -> list[int]:
        """Token ids of a question up to where the answer begins, about a picture of these rows of codes."""
        frame = "" if codes is None else f"{self._frame((len(codes), len(codes[0])))}{self.frames[1]}\n"
        ids = self.encode(self._turn(frame + self.clean(text)))
        if codes is None:
            return ids
        at = ids.index(self.image) + 1
        return [*ids[:at], *(self.first + code for row in codes for code in row), *ids[at:]]

    def _frame(self, grid: tuple[int, int]) -> str:
        return f"{self.frames[0]}{grid[0]} {grid[1]}{self.frames[2]}"

    def _turn(self, content: str) -> str:
        if not self.tokenizer.chat_template:
            return self.turn(content)
        messages = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@dataclass(frozen=True)
class Fitting:
    """How a picture becomes the tokenizer's input: scaled up until the short side reaches its least, then down to the longest long side."""

    short_size: int = 384
    long_size: int = 1152
    patch_size: int = 16
    min_short_size: int = 128
    max_aspect_ratio: float = 3.0
    filtering: bool = True

    @staticmethod
    def of(transform: Mapping[str, Any]) -> Fitting:
        """The settings that vision_config.transform states."""
        return Fitting(**{item.name: transform[item.name] for item in fields(Fitting) if item.name in transform})

    def wrong(self, size: tuple[int, int]) -> str:
        """Why a picture of this height and width is refused; "" when it is not."""
        short, long = sorted(size)
        if self.filtering and (short < self.min_short_size or long > self.max_aspect_ratio * short):
            return (
                f"X-Omni reads pictures of at least {self.min_short_size} pixels a side and at most {self.max_aspect_ratio:g} : 1; "
                f"this one is {size[0]} x {size[1]}."
            )
        return ""

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the fitted picture, in whole patches."""
        scale = max(1.0, self.short_size / min(size))
        scale *= min(1.0, self.long_size / (max(size) * scale))
        height, width = (round(side * scale / self.patch_size) * self.patch_size for side in size)
        return height, width

    def fit(self, image_HWC: Any) -> Any:
        """[3, H, W] in [0, 1]; MmalignError when the picture is refused."""
        size = images.check_image(image_HWC).shape[:2]
        if reason := self.wrong(size):
            raise MmalignError(f"{reason} Enlarge or crop it.")
        return images.to_tensor(images.resize(image_HWC, self.size(size), "pil-bicubic"))[0]
