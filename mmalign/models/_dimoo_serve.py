"""Lumina-DiMOO as a model that serves requests: reading the checkpoint, settings, sizes, saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmalign import hub
from mmalign.models._dimoo import Dimoo, DimooText
from mmalign.models._llada import read_llada, renamed
from mmalign.models._serving import DTYPES, Serving
from mmalign.models.layers.amused import read_amused
from mmalign.models.layers.extras import copy_files, extra_folders
from mmalign.trajectory import Policy, Prompts
from mmalign.types import Request, UsageError, digest

REVISION = 1  # of the sampler: raise it when equal weights, seed and settings give other samples
NEEDED = {"vqvae": "the folder of the image tokenizer, which the official repository has inside"}
KEPT = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json")


class DimooModel(Serving, Dimoo):
    """A Lumina-DiMOO with a name, a fingerprint and `generate`."""

    family = "lumina_dimoo"
    capabilities = frozenset({"image", "answer", "train"})

    def __init__(self, path: Path, parts: Mapping[str, Path], sampling: Any, device: str, dtype: str) -> None:
        content = hub.read_config(path)
        net, vq = read_llada(path, content, dtype).to(device).eval(), read_amused(parts["vqvae"], device)
        text = DimooText(path, content, net.config.vocab_size, vq.codes)
        super().__init__(net, text, text.layout, vq)
        self.path, self.parts, self.name, self.sampling_type = path, dict(parts), path.resolve().name, type(sampling)
        self.settings: Mapping[str, Any] = asdict(sampling)
        self.steps, self.order_noise = sampling.steps, sampling.order_noise
        self.fingerprint = digest(self.family, [hub.fingerprint_weights(folder) for folder in (path, *parts.values())], dtype, REVISION)
        self.determinism = "bitwise" if self.device.type == "cpu" else "kernel"

    def policy(self, settings: Any) -> Policy:
        return Policy(settings.guidance, settings.temperature, hidden=self.schedule(settings.steps), order_noise=settings.order_noise)

    def wrong_size(self, size: tuple[int, int]) -> str:
        return f"draws sides of multiples of {self.vq.scale} pixels" if any(side % self.vq.scale or side < 1 for side in size) else ""

    def prepare(self, requests: Sequence[Request], settings: Any, size: tuple[int, int]) -> tuple[Prompts, list[dict[str, Any]]]:
        return self.encode_prompts([request.prompt.text for request in requests], size=size), [{} for _ in requests]

    def pixels_of(self, codes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return self.decode(codes, size)

    def answer_settings(self, settings: Any) -> dict[str, Any]:
        return {"steps": settings.answer_steps, "block": settings.answer_block}

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the official layout: `state` (the trunk's own if None), configs, tokenizer, the image tokenizer copied inside."""
        folder = Path(folder)
        copy_files(self.path, folder, KEPT)
        tensors = renamed(self.net.state_dict() if state is None else state, to_llama=False)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        copy_files(self.parts["vqvae"], folder / "vqvae", ("config.json", "*.safetensors", "*.bin", "*.index.json"))


def open_model(path: Path, sampling: Any, device: str, dtype: str, extra: Mapping[str, Path]) -> DimooModel:
    """Read a checkpoint; an error says which folder, file, parameter or size is wrong."""
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'; Lumina-DiMOO runs in {', '.join(DTYPES)}.")
    return DimooModel(path, extra_folders(path, extra, NEEDED), sampling, device, dtype)
