"""Janus' text and picture format: chat template, special tokens, padding, and pixels for the understanding branch.

Source: deepseek-ai/Janus at 1daa72f (`VLChatProcessor`, `VLMImageProcessor`), which transformers' JanusProcessor repeats. A prompt to
draw is the chat-formatted user turn followed by <begin_of_image>; a picture in a question is <begin_of_image>, N placeholders,
<end_of_image>; an answer is " " + text + end of sentence. Begin of sentence comes first. Token ids are looked up by their strings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign import images
from mmalign.types import MmalignError

PAD, IMAGE, BOI, EOI = "<｜▁pad▁｜>", "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language.\n\n"
)
# The original layout ships no template: roles with a colon, the picture on a line of its own, blank lines between turns.
TEMPLATE = (
    "{% for message in messages %}{{ '<|User|>' if message['role'] == 'user' else '<|Assistant|>' }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image_placeholder>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n\n{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)
FILTERS = {0: "pil-nearest", 1: "pil-lanczos", 2: "pil-bilinear", 3: "pil-bicubic"}  # PIL's numbers, as processors store them


@dataclass(frozen=True)
class Pixels:
    """How a picture becomes the vision tower's input: the side it fits in, the least short side, background, mean, deviation, filter."""

    side: int
    least: int = 14
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)
    filter: str = "pil-bicubic"

    def fit(self, image_HWC: np.ndarray) -> Tensor:
        """[3, side, side] in [0, 1]: the long side becomes `side`, the rest is padded with the mean colour, the picture in the middle."""
        height, width = images.check_image(image_HWC).shape[:2]
        scale = self.side / max(height, width)
        size = (max(round(height * scale), self.least), max(round(width * scale), self.least))
        if size != (height, width):
            image_HWC = images.resize(image_HWC, size, self.filter)  # type: ignore[arg-type]
        fill = tuple(int(value * 255) for value in self.mean)
        return images.to_tensor(images.pad_square(image_HWC, fill))[0]  # type: ignore[arg-type]

    def normalise(self, x_BCHW: Tensor) -> Tensor:
        """The vision tower's input from pixels in [0, 1]."""
        return images.normalise(x_BCHW, self.mean, self.deviation)


def read_pixels(folder: Path, side: int) -> Pixels:
    """The picture settings of a folder: of its processor's config in either generation of the layout, else Janus' own."""
    settings: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        content = _read_json(folder / name)
        settings.update(content.get("image_processor") or (content if "image_mean" in content else {}))
    return Pixels(
        side=side,
        least=settings.get("min_size", 14),
        mean=tuple(settings.get("image_mean") or (0.5, 0.5, 0.5)),
        deviation=tuple(settings.get("image_std") or (0.5, 0.5, 0.5)),
        filter=FILTERS.get(settings.get("resample", 3), "pil-bicubic"),
    )


class ChatFormat:
    """A folder's tokenizer with Janus' conversation format."""

    def __init__(self, folder: Path, tokens_per_image: int) -> None:
        from transformers import PreTrainedTokenizerFast

        if not (folder / "tokenizer.json").is_file():
            raise MmalignError(f"The checkpoint {folder} has no tokenizer.json, so no prompt can be read. Download the folder again.")
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.tokens_per_image = tokens_per_image
        self.bos, self.eos = self._id(self.tokenizer.bos_token, "bos_token"), self._id(self.tokenizer.eos_token, "eos_token")
        self.pad = self._id(self.tokenizer.pad_token or PAD, "pad_token")
        self.image = self._id(getattr(self.tokenizer, "image_token", None) or IMAGE, "image_token")
        self.boi = self._id(getattr(self.tokenizer, "boi_token", None) or BOI, "boi_token")
        self.eoi = self._id(getattr(self.tokenizer, "eoi_token", None) or EOI, "eoi_token")
        jinja = folder / "chat_template.jinja"
        stored = jinja.read_text() if jinja.is_file() else _read_json(folder / "chat_template.json").get("chat_template")
        self.template = stored or self.tokenizer.chat_template or TEMPLATE
        processor = _read_json(folder / "processor_config.json")
        # The original processor always speaks the system prompt in questions; the Hugging Face one says whether it does.
        is_original = processor.get("processor_class") == "VLChatProcessor"
        self.system = SYSTEM if processor.get("use_default_system_prompt", is_original) else ""

    def drawing(self, text: str, reasoning: str | None = None) -> list[int]:
        """Token ids of a prompt to draw; with reasoning, of T2I-R1's second stage: "{text}. {reasoning}" (CaraJ7/T2I-R1 at 2d9d4d1)."""
        content = text if reasoning is None else f"{text}. {reasoning}"
        return [*self._encode(self._turn(content, pictured=False)), self.boi]

    def question(self, text: str, pictured: bool) -> list[int]:
        """Token ids of a question, or of any instruction, up to where the answer begins; one picture comes before the text."""
        ids = self._encode(self.system + self._turn(text, pictured))
        picture = [self.boi, *[self.image] * self.tokens_per_image, self.eoi]
        return [token for id in ids for token in (picture if pictured and id == self.image else [id])]

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer, ended by the end of sentence."""
        return [*self.tokenizer(" " + text, add_special_tokens=False).input_ids, self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without special tokens and outer spaces."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def blank(self, ids: Tensor) -> Tensor:
        """The unconditional twin: everything but the first and last token becomes padding that is attended to.

        The official code keeps row ends by position; here by meaning (begin of sentence, begin of image), which is the same for one
        prompt and right for padded ones.
        """
        return torch.where((ids == self.bos) | (ids == self.boi), ids, self.pad)

    def _turn(self, text: str, pictured: bool) -> str:
        # A user's text must not smuggle in the tokens that frame pictures: a stray one would shift every feature by a slot.
        for token in (self.image, self.boi, self.eoi):
            text = text.replace(self.tokenizer.convert_ids_to_tokens(token), "")
        parts = [*([{"type": "image"}] if pictured else []), {"type": "text", "text": text}]
        messages = [{"role": "user", "content": parts}]
        return self.tokenizer.apply_chat_template(messages, chat_template=self.template, add_generation_prompt=True, tokenize=False)

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids if ids[:1] == [self.bos] else [self.bos, *ids]

    def _id(self, token: str | None, role: str) -> int:
        id = self.tokenizer.convert_tokens_to_ids(token) if token else None
        if id is None or id == self.tokenizer.unk_token_id:
            raise MmalignError(f"The tokenizer in {self.tokenizer.name_or_path} has no {role} ({token}), which Janus' format needs.")
        return id


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise MmalignError(f"The file {path} is not JSON: {error}. Download the folder again.") from error
