"""Qwen2.5's conversation format, of which Harmon and OpenUni use one user turn and the answer to it.

Source: the template `qwen_chat` of InternLM/xtuner (PROMPT_TEMPLATE), with which both were trained. No system turn comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmalign.types import MmalignError


class QwenChat:
    """A folder's tokenizer with the turn. `frames` are the special tokens that frame pictures: no text can smuggle them in."""

    frames: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        if not (folder / "tokenizer.json").is_file():
            raise MmalignError(f"{folder} has no tokenizer.json, so no prompt can be read. Download the folder again.")
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.eos = self.id_of("<|im_end|>")
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos

    def turn(self, content: str, system: str = "") -> str:
        """A user's turn, up to where the answer begins."""
        first = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        return f"{first}<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"

    def clean(self, text: str) -> str:
        """A text without the tokens that frame pictures: a stray one would shift every feature by a slot."""
        for token in self.frames:
            text = text.replace(token, "")
        return text

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer, ended by the end of the turn."""
        return [*self.encode(text), self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without special tokens and outer spaces."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def plain(self, text: str) -> list[int]:
        """Token ids of a text alone, without special tokens."""
        special = set(self.tokenizer.all_special_ids)
        return [id for id in self.encode(self.clean(text).strip()) if id not in special]

    def words(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Each token as text."""
        return tuple(self.tokenizer.decode([id]) for id in ids)

    def id_of(self, token: str) -> int:
        id = self.tokenizer.convert_tokens_to_ids(token)
        if id is None or id == self.tokenizer.unk_token_id:
            raise MmalignError(f"The tokenizer in {self.tokenizer.name_or_path} has no token {token}, which Qwen2.5's format needs.")
        return id
