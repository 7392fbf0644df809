"""What MMaDA and Lumina-DiMOO share as models that serve requests: name, fingerprint, settings, saving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from mmalign import hub
from mmalign.models._llada import renamed
from mmalign.models._serving import Serving
from mmalign.models.layers.extras import copy_files
from mmalign.trajectory import Policy
from mmalign.types import digest

REVISION = 1  # of the sampler: raise it when equal weights, seed and settings give other samples
TOKENIZER_FILES = ("config.json", "*.safetensors", "*.bin", "*.index.json")


class LladaServing(Serving):
    """`piece` is the folder of the image tokenizer, `kept` the checkpoint's own files beside the weights."""

    capabilities = frozenset({"image", "answer", "train"})
    piece: ClassVar[str]
    kept: ClassVar[tuple[str, ...]]
    net: Any
    device: Any
    schedule: Any

    def identify(self, path: Path, parts: Mapping[str, Path], sampling: Any, dtype: str) -> None:
        """Say what was loaded, once the network stands."""
        self.path, self.parts, self.name, self.sampling_type = path, dict(parts), path.resolve().name, type(sampling)
        self.settings: Mapping[str, Any] = asdict(sampling)
        self.steps, self.order_noise = sampling.steps, sampling.order_noise
        self.fingerprint = digest(self.family, [hub.fingerprint_weights(folder) for folder in (path, *parts.values())], dtype, REVISION)
        self.determinism = "bitwise" if self.device.type == "cpu" else "kernel"

    def policy(self, settings: Any) -> Policy:
        return Policy(settings.guidance, settings.temperature, hidden=self.schedule(settings.steps), order_noise=settings.order_noise)

    def answer_settings(self, settings: Any) -> dict[str, Any]:
        return {"steps": settings.answer_steps, "block": settings.answer_block}

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the official layout: `state` (the trunk's own if None), configs, tokenizer, the image tokenizer copied inside."""
        folder = Path(folder)
        copy_files(self.path, folder, self.kept)
        tensors = renamed(self.net.state_dict() if state is None else state, to_llama=False)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        copy_files(self.parts[self.piece], folder / self.piece, TOKENIZER_FILES)
