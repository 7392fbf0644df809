"""Show-o's text format: token layout, prompts to draw, questions, answers, padding.

Source: showlab/Show-o at 45a5a2d (training/prompting_utils.py, inference_mmu.py). To draw: <|t2i|>, begin of text, text, end of text,
then <|soi|>, image tokens, <|eoi|>. A question: <|mmu|>, <|soi|>, image tokens, <|eoi|>, begin of text, "USER: \\n{question} ASSISTANT:";
its answer is " " + text + end of text. The special tokens follow the text vocabulary, then the codes, then the mask token; they are not
added to the tokenizer here, so no text can contain them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.models.layers.rows import prompt_row
from mmalign.types import MmalignError

SPECIAL = ("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")
TEXT_SLOTS = 129  # of a prompt to draw: max_seq_length 128 of the official configs, and the task token


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


def token_layout(config: Mapping[str, Any], folder: Path) -> TokenLayout:
    """The layout that a Show-o's config.json means; MmalignError when its sizes do not add up."""
    try:
        text, codes, whole = config["llm_vocab_size"], config["codebook_size"], config["vocab_size"]
    except KeyError as error:
        raise MmalignError(f"{folder / 'config.json'} has no {error}, which every Show-o has. Download the folder again.") from error
    expected = text + len(SPECIAL) + codes + 1
    if whole != expected:
        raise MmalignError(
            f"The vocabulary of {folder} does not add up: {text} text tokens, {len(SPECIAL)} special ones, {codes} codes and the mask "
            f"are {expected}, its config.json says {whole}. The folder mixes two checkpoints."
        )
    id_of = {token: text + index for index, token in enumerate(SPECIAL)}
    pad, soi, eoi, t2i, mmu = (id_of[token] for token in ("[PAD]", "<|soi|>", "<|eoi|>", "<|t2i|>", "<|mmu|>"))
    return TokenLayout(pad, soi, eoi, t2i, mmu, offset=text + len(SPECIAL), mask=whole - 1)


class ShowoText:
    """The tokenizer of phi-1_5 with Show-o's rows."""

    def __init__(self, folder: Path, layout: TokenLayout) -> None:
        from transformers import PreTrainedTokenizerFast

        if not (folder / "tokenizer.json").is_file():
            raise MmalignError(f"{folder} has no tokenizer.json, so no prompt can be read. Give the whole folder of microsoft/phi-1_5.")
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        if len(self.tokenizer) != layout.pad:
            raise MmalignError(
                f"The tokenizer in {folder} has {len(self.tokenizer)} tokens; this Show-o was trained with {layout.pad}. "
                "Give the folder of the language model that its config.json names."
            )
        self.layout = layout
        self.bos, self.eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id

    def drawing(self, text: str, n_image: int) -> list[int]:
        """Token ids of a row to draw, all image tokens hidden. Text beyond the official length is cut, as there."""
        return [
            *prompt_row(self.layout.t2i, self._encode(text), self.eos, TEXT_SLOTS),
            self.layout.soi,
            *[self.layout.mask] * n_image,
            self.layout.eoi,
        ]

    def is_cut(self, text: str) -> bool:
        """Whether a text to draw is longer than Show-o reads."""
        return len(self._encode(text)) + 2 > TEXT_SLOTS

    def plain(self, text: str) -> list[int]:
        """Token ids of a text to draw without special tokens, cut where the row is."""
        return [id for id in self._encode(text)[1 : TEXT_SLOTS - 2] if id != self.eos]

    def words(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Each token as text."""
        return tuple(self.tokenizer.decode([id]) for id in ids)

    def question(self, text: str, codes: Sequence[int] | None) -> list[int]:
        """Token ids of a question, with the codes of its picture if it has one, up to where the answer begins."""
        picture = (
            [] if codes is None else [self.layout.mmu, self.layout.soi, *(code + self.layout.offset for code in codes), self.layout.eoi]
        )
        return [*picture, *self._encode(f"USER: \n{text} ASSISTANT:")]

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer, ended by the end of text."""
        return [*self.tokenizer(" " + text, add_special_tokens=False).input_ids, self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without special tokens, image tokens and outer spaces."""
        return self.tokenizer.decode([id for id in ids if id < self.layout.pad], skip_special_tokens=True).strip()

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids if ids[:1] == [self.bos] else [self.bos, *ids]
