"""What autoregressive families share as served models: reasoning before drawing, and when an answer is whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmalign.models._serving import Serving
from mmalign.trajectory import Prompts
from mmalign.types import Request, request_seed


class CausalServing(Serving):
    """`chat` is the family's text format; settings have an instruction and how long and how freely the model reasons."""

    chat: Any
    encode_prompts: Callable[..., Prompts]

    def is_whole(self, ids: torch.Tensor) -> bool:
        return bool((ids == self.chat.eos).any())

    def sized(self, size: tuple[int, int]) -> dict[str, Any]:
        """How `encode_prompts` is told the size; families of one size need no telling."""
        return {}

    def prepare(self, requests: Sequence[Request], settings: Any, size: tuple[int, int]) -> tuple[Prompts, list[dict[str, Any]]]:
        texts = [request.prompt.text for request in requests]
        if not settings.instruction:
            return self.encode_prompts(texts, **self.sized(size)), [{} for _ in requests]
        asked = [settings.instruction.format(prompt=text) for text in texts]
        own = [request_seed(request.seed, "reasoning", 0) for request in requests]
        thoughts = self.generate_text(asked, None, own, settings.reasoning_temperature, settings.reasoning_tokens).texts
        return self.encode_prompts(texts, reasoning=thoughts, **self.sized(size)), [{"reasoning": thought} for thought in thoughts]
