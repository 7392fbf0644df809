"""BAGEL as a model that serves requests: reading the folder strictly, pictures and answers, saving."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmalign import hub
from mmalign.models._bagel import Bagel, GuidedPolicy, rule_of
from mmalign.models._bagel_net import BagelNet, unused
from mmalign.models._bagel_text import BagelText, Fitting
from mmalign.models._serving import DTYPES, Serving
from mmalign.models.layers.copies import place
from mmalign.models.layers.extras import copy_files
from mmalign.models.layers.kl import KlAutoencoder, kl_autoencoder
from mmalign.models.layers.qwen2 import qwen2_config
from mmalign.models.layers.weights import check_names, check_shapes, read_file
from mmalign.trajectory import Prompts
from mmalign.types import MmalignError, Request, UsageError, digest

REVISION = 1  # of the sampler: raise it when equal weights, seed and settings give other samples
WEIGHTS, AUTOENCODER = "ema.safetensors", "ae.safetensors"
KEPT = ("*.json", "vocab.txt", "merges.txt", "chat_template.*")


class BagelModel(Serving, Bagel):
    """A BAGEL with a name, a fingerprint and `generate`."""

    family = "bagel"
    capabilities = frozenset({"image", "answer", "choose", "train"})

    def __init__(self, path: Path, net: BagelNet, vae: KlAutoencoder, sampling: Any, dtype: str) -> None:
        self.path, self.name, self.sampling_type = path, path.resolve().name, type(sampling)
        self.settings: Mapping[str, Any] = asdict(sampling)
        patch, side = net.vit_model.patch, net.vit_model.side
        fitting = Fitting(longest=side * patch, shortest=min(Fitting.shortest, side * patch), stride=patch)
        text = BagelText(path, patch=net.get_input_embeddings().num_embeddings)
        Bagel.__init__(self, net, text, vae, fitting, sampling.tokens, rule_of(self.settings))
        self.fingerprint = digest(self.family, hub.fingerprint_weights(path), dtype, REVISION)
        self.determinism = "bitwise" if self.device.type == "cpu" else "kernel"

    @property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        return self.layout.size

    def policy(self, settings: Any) -> GuidedPolicy:
        """The deterministic sampler of these settings."""
        return GuidedPolicy(settings.guidance, levels=(0.0,) * settings.steps, rule=rule_of(asdict(settings)))

    def is_whole(self, ids: torch.Tensor) -> bool:
        return bool((ids == self.chat.eos).any())

    def wrong_size(self, size: tuple[int, int]) -> str:
        try:
            self.layout.shape(size)
        except UsageError as error:
            return f"cannot draw this size ({error})"
        return ""

    def prepare(self, requests: Sequence[Request], settings: Any, size: tuple[int, int]) -> tuple[Prompts, list[dict[str, Any]]]:
        texts = [request.prompt.text for request in requests]
        extras = [{"is_cut": True} if self.chat.is_cut(text, settings.tokens) else {} for text in texts]
        return self.encode_prompts(texts, tokens=settings.tokens), extras

    def _images(self, requests: Sequence[Request], settings: Any, size: tuple[int, int]) -> list[dict[str, Any]]:
        prompts, extras = self.prepare(requests, settings, size)
        latents = self.draw(prompts, self.policy(settings), [request.seed for request in requests], size)
        return [{"image": picture, "extra": extra} for picture, extra in zip(self.pictures(latents), extras, strict=True)]

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the official layout: `state` (the network's own if None), configs, tokenizer; the autoencoder is linked or copied."""
        folder = Path(folder)
        copy_files(self.path, folder, KEPT)
        tensors = (self.net.state_dict() if state is None else state).items()
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors}, folder / WEIGHTS, metadata={"format": "pt"})
        place(self.path / AUTOENCODER, folder / AUTOENCODER)


def open_model(path: Path, sampling: Any, device: str, dtype: str) -> BagelModel:
    """Read a folder; MmalignError says which file, parameter or size is wrong."""
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'; BAGEL runs in {', '.join(DTYPES)}.")
    language, vision = (_read_config(path / name) for name in ("llm_config.json", "vit_config.json"))
    net = read_network(path, language, vision, dtype).to(device).eval()
    vae = kl_autoencoder(read_file(_file(path, AUTOENCODER)), path / AUTOENCODER, projects=False).to(device)
    return BagelModel(path, net, vae, sampling, dtype)


def read_network(path: Path, language: Mapping[str, Any], vision: Mapping[str, Any], dtype: str) -> BagelNet:
    """The network with the folder's weights: every parameter present, none left over but the layer that the vision tower does not run."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    leave = unused(vision)
    tensors = {name: value for name, value in read_file(_file(path, WEIGHTS)).items() if not leave.match(name)}
    try:
        rope = {"rope_type": "default", "rope_theta": language["rope_theta"]}
        settings = qwen2_config(language, rope)
        with torch.device("meta"):
            net = BagelNet(settings, vision, tensors)
    except KeyError as error:
        raise MmalignError(f"{path} is no BAGEL: its configs and weights lack {error}. Download the folder again.") from error
    expected = set(net.state_dict())
    check_names(expected - set(tensors), set(tensors) - expected, path)
    check_shapes(tensors, net, path)
    net.load_state_dict(tensors, assign=True)
    trunk = net.language_model.model
    trunk.rotary_emb = Qwen2RotaryEmbedding(settings)  # its tables are no parameters, so they were made on no device
    return net.to(getattr(torch, dtype))


def _file(path: Path, name: str) -> Path:
    if not (path / name).is_file():
        raise MmalignError(f"The checkpoint {path} has no {name}. Download the folder again.")
    return path / name


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return json.loads(_file(file.parent, file.name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise MmalignError(f"{file} cannot be read as JSON: {error}. Download it again.") from error
