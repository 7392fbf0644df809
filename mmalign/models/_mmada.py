"""The loaded MMaDA: rows, ids, prompts and answers in the official format.

Source: Gen-Verse/MMaDA at 3cdb870 (training/prompting_utils.py, app.py, inference_mmu.py). To draw: t2i, begin of text, text, end of
text, start of image, image tokens, end of image. A question: mmu, start of image, codes, end of image, then the chat turn. Special
tokens are reserved ones of LLaDA's tokenizer; image codes follow its last token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.models._llada import Llada
from mmalign.models._square import SquarePictures
from mmalign.models.layers.magvit import Magvit
from mmalign.models.layers.rows import pad_left, prompt_row
from mmalign.trajectory import Prompts
from mmalign.types import MmalignError, UsageError

TEXT_SLOTS = 513  # of a prompt to draw: max_seq_length 512 of the official config, and the task token
RESERVED = {"soi": 0, "eoi": 1, "t2i": 4, "mmu": 5, "pad": 9}  # numbers of the tokenizer's reserved tokens
TURN = "<|start_header_id|>user<|end_header_id|>\n{text}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"
END_OF_TURN = "<|eot_id|>"


@dataclass(frozen=True)
class TokenLayout:
    """Ids that are no text: special tokens, the first image code, the mask."""

    pad: int
    soi: int
    eoi: int
    t2i: int
    mmu: int
    offset: int
    mask: int


class MmadaText:
    """A folder's tokenizer with MMaDA's rows."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from transformers import PreTrainedTokenizerFast

        if not (folder / "tokenizer.json").is_file():
            raise MmalignError(f"The checkpoint {folder} has no tokenizer.json, so no prompt can be read. Download the folder again.")
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        known = self.tokenizer.get_vocab()
        names = {part: f"<|reserved_token_{number}|>" for part, number in RESERVED.items()}
        missing = [name for name in (*names.values(), END_OF_TURN) if name not in known]
        if missing:
            raise MmalignError(f"The tokenizer in {folder} has no {', '.join(missing)}, which MMaDA's rows are made of.")
        special = {part: known[name] for part, name in names.items()}
        self.layout = TokenLayout(**special, offset=len(self.tokenizer), mask=config["mask_token_id"])
        self.bos, self.eos, self.end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, known[END_OF_TURN]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, begin of text first, without the tokens that frame pictures or hide others."""
        reserved = {self.layout.mask, self.layout.soi, self.layout.eoi, self.layout.t2i, self.layout.mmu}
        ids = [id for id in self.tokenizer(text, add_special_tokens=False).input_ids if id not in reserved]
        return ids if ids[:1] == [self.bos] else [self.bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens, image tokens and outer spaces."""
        return self.tokenizer.decode([id for id in ids if id < self.layout.offset], skip_special_tokens=True).strip()


class Mmada(SquarePictures, Llada):
    """An MMaDA of any size."""

    text_slots = TEXT_SLOTS

    def __init__(self, net: Any, text: Any, layout: TokenLayout, vq: Magvit, n_image: int) -> None:
        super().__init__(net)
        self.text, self.layout, self.vq = text, layout, vq
        self.set_square(n_image)
        self.offset, self.mask_id, self.pad_id = layout.offset, layout.mask, layout.pad
        self.ends = frozenset({text.eos, text.end})

    def encode_prompts(self, texts: Sequence[str], images: None = None) -> Prompts:
        """Prompts to draw, left-padded, with their unconditional twins (the empty text). Text beyond the official length is cut."""
        if images is not None:
            raise UsageError("MMaDA cannot draw from a picture: encode_prompts takes texts alone. Ask about pictures with generate_text.")
        ids, mask = (tensor.to(self.device) for tensor in pad_left([self.drawing_row(text) for text in texts], self.pad_id))
        blank, blank_mask = (tensor.to(self.device) for tensor in pad_left([self.drawing_row("")] * len(texts), self.pad_id, ids.shape[1]))
        return Prompts(tuple(texts), ids, mask, blank, blank_mask)

    def drawing_row(self, text: str) -> list[int]:
        """Token ids of a row to draw, all image tokens hidden."""
        prompt = prompt_row(self.layout.t2i, self.text.encode(text), self.text.eos, TEXT_SLOTS)
        return [*prompt, self.layout.soi, *[self.layout.mask] * self.tokens, self.layout.eoi]

    def is_cut(self, text: str) -> bool:
        """Whether a text to draw is longer than MMaDA reads."""
        return len(self.text.encode(text)) + 2 > TEXT_SLOTS

    def question_row(self, text: str, codes: list[int] | None) -> list[int]:
        picture = [] if codes is None else [self.layout.mmu, self.layout.soi, *(code + self.offset for code in codes), self.layout.eoi]
        return [*picture, *self.text.encode(TURN.format(text=text))]

    def answer_row(self, text: str) -> list[int]:
        return [*self.text.encode(text)[1:], self.text.end]

    def text_of(self, ids: Sequence[int]) -> str:
        return self.text.decode(ids)

    def is_text(self, ids: Tensor) -> Tensor:
        special = torch.tensor(self.text.tokenizer.all_special_ids, device=ids.device)
        return (ids < self.offset) & ~torch.isin(ids, special)
