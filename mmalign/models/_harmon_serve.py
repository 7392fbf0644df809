"""Harmon as a model that serves requests: name, fingerprint, settings, saving."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmalign.models._harmon import Harmon
from mmalign.models._harmon_draw import cosine
from mmalign.models._harmon_layout import INNER_STEPS, VAE, VAE_SCALE, Checkpoint, build, find
from mmalign.models._harmon_text import HarmonText
from mmalign.models._serving import DTYPES, Serving
from mmalign.models.layers.extras import copy_files
from mmalign.trajectory import Policy
from mmalign.types import UsageError, digest

REVISION = 1  # of the sampler: raise it when equal weights, seed and settings give other samples
HALF = 0.5 / 255  # pictures are rounded, as by the official scripts: what is cut off later is then what lies above the nearest number
KEPT = ("tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")


class HarmonModel(Serving, Harmon):
    """A Harmon with a name, a fingerprint and `generate`."""

    family = "harmon"
    capabilities = frozenset({"image", "answer", "choose", "train"})

    def __init__(self, path: Path, found: Checkpoint, sampling: Any, device: str, dtype: str) -> None:
        net, vae = build(found, path, dtype)
        # Both released sizes learned a grid of 16 and were then trained on, and are used at, twice that side.
        side = found.side or 2 * net.mar.side * vae.stride
        scale, inner = found.mar.get("vae_scale", VAE_SCALE), int(found.mar.get("num_sampling_steps") or INNER_STEPS)
        super().__init__(net.to(device).eval(), HarmonText(found.tokenizer), vae.to(device), scale, (side, side), inner)
        self.path, self.found, self.name, self.sampling_type = path, found, path.resolve().name, type(sampling)
        self.settings: Mapping[str, Any] = asdict(sampling)
        self.steps = sampling.steps
        self.fingerprint = digest(self.family, found.identity, dtype, REVISION)
        self.determinism = "bitwise" if self.device.type == "cpu" else "kernel"

    def policy(self, settings: Any) -> Policy:
        levels = (1.0,) * (settings.inner_steps or self.inner_steps)
        return Policy(settings.guidance, settings.temperature, hidden=cosine(settings.steps), levels=levels)

    def wrong_size(self, size: tuple[int, int]) -> str:
        stride = self.vae.stride
        return f"draws multiples of {stride} pixels only" if any(side < stride or side % stride for side in size) else ""

    def size_settings(self, size: tuple[int, int]) -> dict[str, Any]:
        return {"size": size}

    def pixels_of(self, codes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return (self.decode(codes, size) + HALF).clamp(max=1)

    def is_whole(self, ids: torch.Tensor) -> bool:
        return bool((ids == self.chat.eos).any())

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the Hugging Face layout, whichever was read: `state` (the network's own if None), the image coder, config, tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in (self.net.state_dict() if state is None else state).items()}
        if self.is_tied:
            tensors.pop("llm.lm_head.weight")
        tensors |= {VAE + name: tensor.contiguous() for name, tensor in self.vae.original_state().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        sizes, options = self.mar.sizes, dict(self.found.mar)
        options.setdefault("num_sampling_steps", str(self.inner_steps))
        options |= {"encoder_num_heads": sizes.heads, "decoder_num_heads": sizes.decoder_heads}
        content = {"model_type": self.family, "llm": self.found.llm, "mar": options, "image_size": self.size[0]}
        (folder / "config.json").write_text(json.dumps(content, indent=1))
        copy_files(self.found.tokenizer, folder, KEPT)


def open_model(path: Path, sampling: Any, device: str, dtype: str, extra: Mapping[str, Path]) -> HarmonModel:
    """Read a checkpoint of either layout; an error says which folder, file, parameter or size is wrong."""
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'; Harmon runs in {', '.join(DTYPES)}.")
    return HarmonModel(path, find(path, extra), sampling, device, dtype)
