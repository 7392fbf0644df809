"""Show-o as a model that serves requests: reading the checkpoint and what lies beside it, settings, saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmalign import hub
from mmalign.models._serving import DTYPES, Serving
from mmalign.models._showo import Showo
from mmalign.models._showo_text import ShowoText, token_layout
from mmalign.models.layers.extras import copy_files, extra_folders
from mmalign.models.layers.magvit import read_magvit
from mmalign.models.layers.weights import check_names, check_shapes, read_tensors
from mmalign.trajectory import Policy, Prompts
from mmalign.types import MmalignError, Request, UsageError, digest

REVISION = 1  # of the sampler: raise it when equal weights, seed and settings give other samples
PREFIX = "showo."
NEEDED = {
    "phi-1_5": "the folder of microsoft/phi-1_5 with the trunk's config.json and the tokenizer",
    "magvitv2": "the folder of the image tokenizer showlab/magvitv2",
}
LANGUAGE_FILES = ("config.json", "tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
TOKENIZER_FILES = ("config.json", "*.safetensors", "*.bin", "*.index.json")


class ShowoModel(Serving, Showo):
    """A Show-o with a name, a fingerprint and `generate`."""

    family = "showo"
    capabilities = frozenset({"image", "answer", "train"})

    def __init__(self, path: Path, parts: Mapping[str, Path], sampling: Any, device: str, dtype: str) -> None:
        content = hub.read_config(path)
        layout = token_layout(content, path)
        net, vq = read_network(path, parts["phi-1_5"], dtype).to(device).eval(), read_magvit(parts["magvitv2"]).to(device)
        super().__init__(net, ShowoText(parts["phi-1_5"], layout), layout, vq, content["num_vq_tokens"])
        if vq.codes != content["codebook_size"]:
            raise MmalignError(
                f"The image tokenizer {parts['magvitv2']} has {vq.codes} codes; {path} was trained with {content['codebook_size']}."
            )
        self.path, self.parts, self.name, self.sampling_type = path, dict(parts), path.resolve().name, type(sampling)
        self.settings: Mapping[str, Any] = asdict(sampling)
        self.steps, self.order_noise = sampling.steps, sampling.order_noise
        language = [hub.sample_file(file) for name in LANGUAGE_FILES for file in sorted(parts["phi-1_5"].glob(name))]
        weights = [hub.fingerprint_weights(folder) for folder in (path, parts["magvitv2"])]
        self.fingerprint = digest(self.family, weights, language, dtype, REVISION)
        self.determinism = "bitwise" if self.device.type == "cpu" else "kernel"

    def policy(self, settings: Any) -> Policy:
        return Policy(settings.guidance, settings.temperature, hidden=self.schedule(settings.steps), order_noise=settings.order_noise)

    def prepare(self, requests: Sequence[Request], settings: Any, size: tuple[int, int]) -> tuple[Prompts, list[dict[str, Any]]]:
        texts = [request.prompt.text for request in requests]
        return self.encode_prompts(texts), [{"is_cut": True} if self.text.is_cut(text) else {} for text in texts]

    def is_whole(self, ids: torch.Tensor) -> bool:
        return bool((ids == self.text.eos).any())

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the official layout: `state` (the trunk's own if None) and config.json, with the folders beside it copied inside."""
        folder = Path(folder)
        copy_files(self.path, folder, ("config.json", "generation_config.json"))
        tensors = (self.net.state_dict() if state is None else state).items()
        save_file({PREFIX + name: tensor.detach().contiguous() for name, tensor in tensors}, folder / "pytorch_model.safetensors")
        copy_files(self.parts["phi-1_5"], folder / "phi-1_5", LANGUAGE_FILES)
        copy_files(self.parts["magvitv2"], folder / "magvitv2", TOKENIZER_FILES)


def open_model(path: Path, sampling: Any, device: str, dtype: str, extra: Mapping[str, Path]) -> ShowoModel:
    """Read a checkpoint; an error says which folder, file, parameter or size is wrong."""
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'; Show-o runs in {', '.join(DTYPES)}.")
    if hub.read_config(path).get("w_clip_vit"):
        raise MmalignError(f"{path} is the Show-o that reads pictures with a CLIP tower, which is not supported. Use showlab/show-o.")
    return ShowoModel(path, extra_folders(path, extra, NEEDED), sampling, device, dtype)


def read_network(path: Path, language: Path, dtype: str) -> Any:
    """A PhiForCausalLM with the folder's weights, its sizes from the language model's config.json: nothing missing, nothing left over."""
    from transformers import PhiConfig, PhiForCausalLM

    settings = PhiConfig(**{name: value for name, value in hub.read_config(language).items() if name not in ("architectures", "auto_map")})
    settings.vocab_size = hub.read_config(path)["vocab_size"]
    # The official code normalises queries and keys whatever the config says, and never ties the head.
    settings.qk_layernorm, settings.tie_word_embeddings = True, False
    settings._attn_implementation = "sdpa"
    tensors = read_tensors(path)
    alien = [name for name in tensors if not name.startswith(PREFIX)]
    tensors = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name not in alien}
    with torch.device("meta"):
        shell = PhiForCausalLM(settings)
    expected = set(shell.state_dict())
    check_names(expected - set(tensors), [*(set(tensors) - expected), *alien], path)
    check_shapes(tensors, shell, path)
    return PhiForCausalLM.from_pretrained(None, config=settings, state_dict=tensors, dtype=getattr(torch, dtype))
