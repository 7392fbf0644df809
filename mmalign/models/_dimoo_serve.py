"""Lumina-DiMOO as a model that serves requests: reading the checkpoint, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmalign import hub
from mmalign.models._dimoo import Dimoo, DimooText
from mmalign.models._llada import read_llada
from mmalign.models._llada_serve import LladaServing
from mmalign.models._serving import DTYPES
from mmalign.models.layers.amused import read_amused
from mmalign.models.layers.extras import extra_folders
from mmalign.trajectory import Prompts
from mmalign.types import Request, UsageError

NEEDED = {"vqvae": "the folder of the image tokenizer, which the official repository has inside"}


class DimooModel(LladaServing, Dimoo):
    """A Lumina-DiMOO with a name, a fingerprint and `generate`."""

    family = "lumina_dimoo"
    piece = "vqvae"
    kept = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json")

    def __init__(self, path: Path, parts: Mapping[str, Path], sampling: Any, device: str, dtype: str) -> None:
        content = hub.read_config(path)
        net, vq = read_llada(path, content, dtype).to(device).eval(), read_amused(parts["vqvae"], device)
        text = DimooText(path, content, net.config.vocab_size, vq.codes)
        super().__init__(net, text, text.layout, vq)
        self.identify(path, parts, sampling, dtype)

    def wrong_size(self, size: tuple[int, int]) -> str:
        return f"draws sides of multiples of {self.vq.scale} pixels" if any(side % self.vq.scale or side < 1 for side in size) else ""

    def prepare(self, requests: Sequence[Request], settings: Any, size: tuple[int, int]) -> tuple[Prompts, list[dict[str, Any]]]:
        return self.encode_prompts([request.prompt.text for request in requests], size=size), [{} for _ in requests]

    def pixels_of(self, codes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return self.decode(codes, size)


def open_model(path: Path, sampling: Any, device: str, dtype: str, extra: Mapping[str, Path]) -> DimooModel:
    """Read a checkpoint; an error says which folder, file, parameter or size is wrong."""
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'; Lumina-DiMOO runs in {', '.join(DTYPES)}.")
    return DimooModel(path, extra_folders(path, extra, NEEDED), sampling, device, dtype)
