"""MMaDA as a model that serves requests: reading the checkpoint and its image tokenizer, settings, saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmalign import hub
from mmalign.models._llada import read_llada, renamed
from mmalign.models._mmada import Mmada, MmadaText
from mmalign.models._serving import DTYPES, Serving
from mmalign.models.layers.extras import copy_files, extra_folders
from mmalign.models.layers.magvit import read_magvit
from mmalign.trajectory import Policy, Prompts
from mmalign.types import MmalignError, Request, UsageError, digest

REVISION = 1  # of the sampler: raise it when equal weights, seed and settings give other samples
NEEDED = {"magvitv2": "the folder of the image tokenizer showlab/magvitv2"}
IMAGE_TOKENS = 1024  # where config.json does not say: 512 x 512 pixels, configs/mmada_demo.yaml
KEPT = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*")


class MmadaModel(Serving, Mmada):
    """An MMaDA with a name, a fingerprint and `generate`."""

    family = "mmada"
    capabilities = frozenset({"image", "answer", "train"})

    def __init__(self, path: Path, parts: Mapping[str, Path], sampling: Any, device: str, dtype: str) -> None:
        content = hub.read_config(path)
        text, vq = MmadaText(path, content), read_magvit(parts["magvitv2"]).to(device)
        net = read_llada(path, content, dtype).to(device).eval()
        if text.layout.offset + vq.codes > net.config.vocab_size:
            raise MmalignError(
                f"{path} has {net.config.vocab_size} embeddings, too few for its {text.layout.offset} text tokens and the {vq.codes} codes "
                f"of {parts['magvitv2']}. The folders do not belong together."
            )
        super().__init__(net, text, text.layout, vq, content.get("num_vq_tokens") or IMAGE_TOKENS)
        self.path, self.parts, self.name, self.sampling_type = path, dict(parts), path.resolve().name, type(sampling)
        self.settings: Mapping[str, Any] = asdict(sampling)
        self.steps, self.order_noise = sampling.steps, sampling.order_noise
        self.fingerprint = digest(self.family, [hub.fingerprint_weights(folder) for folder in (path, *parts.values())], dtype, REVISION)
        self.determinism = "bitwise" if self.device.type == "cpu" else "kernel"

    def policy(self, settings: Any) -> Policy:
        return Policy(settings.guidance, settings.temperature, hidden=self.schedule(settings.steps), order_noise=settings.order_noise)

    def prepare(self, requests: Sequence[Request], settings: Any, size: tuple[int, int]) -> tuple[Prompts, list[dict[str, Any]]]:
        texts = [request.prompt.text for request in requests]
        return self.encode_prompts(texts), [{"is_cut": True} if self.is_cut(text) else {} for text in texts]

    def answer_settings(self, settings: Any) -> dict[str, Any]:
        return {"steps": settings.answer_steps, "block": settings.answer_block}

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the official layout: `state` (the trunk's own if None), configs, tokenizer, the image tokenizer copied inside."""
        folder = Path(folder)
        copy_files(self.path, folder, KEPT)
        tensors = renamed(self.net.state_dict() if state is None else state, to_llama=False)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        copy_files(self.parts["magvitv2"], folder / "magvitv2", ("config.json", "*.safetensors", "*.bin", "*.index.json"))


def open_model(path: Path, sampling: Any, device: str, dtype: str, extra: Mapping[str, Path]) -> MmadaModel:
    """Read a checkpoint; an error says which folder, file, parameter or size is wrong."""
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'; MMaDA runs in {', '.join(DTYPES)}.")
    return MmadaModel(path, extra_folders(path, extra, NEEDED), sampling, device, dtype)
