"""The loaded Lumina-DiMOO: rows with a newline token after every line of the image, prompts, questions, pictures of any shape.

Source: Alpha-VLLM/Lumina-DiMOO at 81344e6 (generators/, utils/, train/train.py). Changed: prompts of any length go through one batch,
padded at the right and masked, which gives what each gives alone (the original ignores its mask and takes one prompt); both branches of
the guidance go through one forward; pictures in questions are cropped at their centre (the original's centre_crop draws its place).
In questions the picture stands before the last token of the prompt, as in training; the original's demo then breaks its rows again,
which drops the end of the picture, and is not followed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign import images as pixels
from mmalign.models._llada import Llada
from mmalign.models.layers.amused import AmusedTokenizer
from mmalign.models.layers.rows import pad_right
from mmalign.trajectory import Prompts
from mmalign.types import MmalignError, UsageError

SIDE = 64  # image tokens of the default side: 1024 pixels at 16 pixels per code
LONGEST = 4.0  # greatest ratio of the sides of a picture in a question
NEWLINE = "<|reserved_token_0|>"
SPECIALS = 7  # tokens before the codes: begin and end of image, <uncondition>, two more, begin and end of answer
DRAW = "<system>Generate an image according to the text prompt.</system><user>{text}</user>"
ASK = (
    "<system>You are a multimodal model that can process both text and images. Answer the following question based on the provided images. "
    "Analyze each image and combine relevant details to answer.</system><user>{text}</user>"
)
BLANK = "<uncondition>"


@dataclass(frozen=True)
class TokenLayout:
    """Ids that are no text: begin and end of image and of answer, the newline, the first image code, the mask, padding."""

    boi: int
    eoi: int
    boa: int
    eoa: int
    newline: int
    offset: int
    mask: int
    pad: int = 0


class DimooText:
    """A folder's tokenizer with the ids around it. The codes are the last embeddings; seven special tokens stand before them."""

    def __init__(self, folder: Path, config: Mapping[str, Any], rows: int, codes: int) -> None:
        from transformers import PreTrainedTokenizerFast

        if not (folder / "tokenizer.json").is_file():
            raise MmalignError(f"The checkpoint {folder} has no tokenizer.json, so no prompt can be read. Download the folder again.")
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        known, offset = self.tokenizer.get_vocab(), rows - codes
        if NEWLINE not in known:
            raise MmalignError(f"The tokenizer in {folder} has no {NEWLINE}, which ends the lines of an image.")
        wrong = {token: known[token] for token, id in (("<answer>", offset - 2), ("</answer>", offset - 1)) if known.get(token, id) != id}
        if wrong:
            raise MmalignError(
                f"The special tokens of {folder} do not stand before its {codes} image codes, which begin at {offset}: {wrong}. "
                "The tokenizer, the weights and the vqvae do not belong together."
            )
        first = offset - SPECIALS
        self.layout = TokenLayout(first, first + 1, offset - 2, offset - 1, known[NEWLINE], offset, config["mask_token_id"])
        self.eos = self.tokenizer.eos_token_id

    def encode(self, text: str, is_whole: bool = True) -> list[int]:
        """Ids of a text, without the mask and the codes; of a whole row, with what the tokenizer adds to one."""
        ids = self.tokenizer(text, add_special_tokens=is_whole).input_ids
        return [id for id in ids if id != self.layout.mask and id < self.layout.offset]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens, image codes and outer spaces."""
        return self.tokenizer.decode([id for id in ids if id < self.layout.boi], skip_special_tokens=True).strip()


class Dimoo(Llada):
    """A Lumina-DiMOO of any size."""

    fades, holds_last, pads_left = False, False, False

    def __init__(self, net: Any, text: Any, layout: TokenLayout, vq: AmusedTokenizer, grid: tuple[int, int] = (SIDE, SIDE)) -> None:
        super().__init__(net)
        self.text, self.layout, self.vq, self.grid = text, layout, vq, grid
        self.offset, self.mask_id, self.pad_id = layout.offset, layout.mask, layout.pad
        self.tail, self.ends = (layout.eoa,), frozenset({layout.eoa, text.eos})

    @property
    def size(self) -> tuple[int, int]:
        return self.grid[0] * self.vq.scale, self.grid[1] * self.vq.scale

    def grid_of(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Rows and columns of image tokens for a size in pixels (None: the default)."""
        if size is None:
            return self.grid
        if any(side % self.vq.scale or side < self.vq.scale for side in size):
            raise UsageError(f"Sides must be multiples of {self.vq.scale} pixels; got {size[0]} x {size[1]}.")
        return size[0] // self.vq.scale, size[1] // self.vq.scale

    def encode_prompts(self, texts: Sequence[str], images: None = None, size: tuple[int, int] | None = None) -> Prompts:
        """Prompts to draw at a size in pixels, right-padded, with their unconditional twins."""
        if images is not None:
            raise UsageError("Lumina-DiMOO's editing is not supported: encode_prompts takes texts alone.")
        grid = self.grid_of(size)
        ids, mask = (tensor.to(self.device) for tensor in pad_right([self.drawing_row(text, grid) for text in texts], self.pad_id))
        blank, blank_mask = (tensor.to(self.device) for tensor in pad_right([self.drawing_row(BLANK, grid)] * len(texts), self.pad_id))
        return Prompts(tuple(texts), ids, mask, blank, blank_mask)

    def drawing_row(self, text: str, grid: tuple[int, int]) -> list[int]:
        """Token ids of a row to draw, all image tokens hidden."""
        image = self._lines([self.layout.mask] * (grid[0] * grid[1]), grid[1])
        return [*self.text.encode(DRAW.format(text=text)), self.layout.boa, self.layout.boi, *image, self.layout.eoi, self.layout.eoa]

    def decode(self, codes_BN: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.vq.decode(codes_BN, self.grid_of(size)).clamp(0, 1)

    # Questions

    def question_row(self, text: str, codes: list[int] | None) -> list[int]:
        prompt = self.text.encode(ASK.format(text=text))
        picture = [] if codes is None else [self.layout.boi, *codes, self.layout.eoi]
        return [*prompt[:-1], *picture, *prompt[-1:], self.layout.boa]

    def answer_row(self, text: str) -> list[int]:
        return [*self.text.encode(text, is_whole=False), self.layout.eoa]

    def text_of(self, ids: Sequence[int]) -> str:
        return self.text.decode(ids)

    def is_text(self, ids: Tensor) -> Tensor:
        special = torch.tensor([*self.text.tokenizer.all_special_ids, self.layout.newline], device=ids.device)
        return (ids < self.layout.boi) & ~torch.isin(ids, special)

    # Pixels, always in [0, 1]

    def image_features(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N, E] what the trunk reads of pictures: the embeddings of their codes. Not differentiable in the pixels."""
        return self.net.get_input_embeddings()(self.encode_image(pixels_BCHW) + self.offset)

    def fit(self, pictures: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] pixels in [0, 1] of uint8 pictures at the default size: scaled to cover it, the centre cropped."""
        return torch.cat([pixels.to_tensor(_covered(picture, self.size)) for picture in pictures])

    def picture_codes(self, pictures: Sequence[Any]) -> list[list[int]]:
        """Token ids of each picture, lines ended: uint8 arrays at the crop size nearest to their shape, tensors as they are."""
        found = []
        for picture in pictures:
            x_CHW = picture if isinstance(picture, Tensor) else pixels.to_tensor(_covered(picture, self.crop_size(picture.shape[:2])))[0]
            codes = (self.encode_image(x_CHW[None])[0] + self.offset).tolist()
            found.append(self._lines(codes, x_CHW.shape[-1] // self.vq.scale))
        return found

    def crop_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Of the sizes in steps of two codes that use up the default area, the one whose shape is nearest (height, width in pixels)."""
        step = 2 * self.vq.scale
        budget = (self.size[0] // step) * (self.size[1] // step)
        found = []
        for wide in range(1, budget + 1):
            for tall in range(max(1, budget // (wide + 1)), budget // wide + 1):
                if max(wide, tall) <= LONGEST * min(wide, tall):
                    fits = wide * step / size[1], tall * step / size[0]
                    found.append((min(fits) / max(fits), wide * step, tall * step))
        _, width, height = max(found)
        return height, width

    def _lines(self, tokens: list[int], width: int) -> list[int]:
        """The tokens with a newline after every `width` of them."""
        return [token for start in range(0, len(tokens), width) for token in (*tokens[start : start + width], self.layout.newline)]


def _covered(picture: Any, size: tuple[int, int]) -> Any:
    """A picture scaled until it covers the size, halved by averages while it is twice as large, and its centre cropped."""
    picture = pixels.check_image(picture)
    while picture.shape[0] >= 2 * size[0] and picture.shape[1] >= 2 * size[1]:
        picture = pixels.resize(picture, (picture.shape[0] // 2, picture.shape[1] // 2), "pil-box")
    scale = max(size[0] / picture.shape[0], size[1] / picture.shape[1])
    picture = pixels.resize(picture, (round(picture.shape[0] * scale), round(picture.shape[1] * scale)), "pil-bicubic")
    top, left = (picture.shape[0] - size[0]) // 2, (picture.shape[1] - size[1]) // 2
    return picture[top : top + size[0], left : left + size[1]]
