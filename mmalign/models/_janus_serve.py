"""Janus as a model that serves requests: reading a folder, and images or answers for any batch of requests."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmalign import hub
from mmalign.models._causal_serve import CausalServing
from mmalign.models._janus import Janus
from mmalign.models._janus_layout import HUGGING_FACE, ORIGINAL, model_type, original_config, to_hugging_face
from mmalign.models._janus_text import ChatFormat, read_pixels
from mmalign.models._serving import DTYPES
from mmalign.models.layers.weights import check_names, check_shapes, read_tensors
from mmalign.types import MmalignError, UsageError, digest

REVISION = 1  # of the sampler: raise it when equal weights, seed and settings give other samples
KEPT = ("tokenizer*.json", "special_tokens_map.json", "chat_template.*", "processor_config.json", "preprocessor_config.json")


class JanusModel(CausalServing, Janus):
    """A Janus with a name, a fingerprint and `generate`."""

    family = "janus"
    capabilities = frozenset({"image", "answer", "choose", "train"})

    def __init__(self, path: Path, net: Any, sampling: Any, dtype: str) -> None:
        patches = net.config.vision_config.image_size // net.config.vision_config.patch_size
        super().__init__(net, ChatFormat(path, patches**2), read_pixels(path, net.config.vision_config.image_size))
        self.path, self.name, self.sampling_type = path, path.resolve().name, type(sampling)
        self.settings: Mapping[str, Any] = asdict(sampling)
        self.fingerprint = digest(self.family, hub.fingerprint_weights(path), dtype, REVISION)
        self.determinism = "bitwise" if self.device.type == "cpu" else "kernel"

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the Hugging Face layout, whichever layout was read: `state` (the model's own if None), configs, tokenizer.

        With the generation config written here, `model.generate` of transformers draws too.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in (self.net.state_dict() if state is None else state).items()}
        if self.net.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        self.net.config.architectures = [type(self.net).__name__]
        self.net.config.save_pretrained(folder)
        generation = self.net.generation_config
        generation._from_model_config = False  # otherwise reloading drops generation_kwargs
        generation.do_sample, generation.guidance_scale = True, self.settings["guidance"]
        generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = self.chat.bos, self.chat.eos, self.chat.pad
        generation.generation_kwargs = {"boi_token_id": self.chat.boi}
        generation.save_pretrained(folder)
        for pattern in KEPT:
            for file in self.path.glob(pattern):
                shutil.copy2(file, folder / file.name)


def open_model(path: Path, sampling: Any, device: str, dtype: str) -> JanusModel:
    """Read a folder of either layout; MmalignError says which file, parameter or size is wrong."""
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'; Janus runs in {', '.join(DTYPES)}.")
    net = read_network(path, dtype).to(device).eval()
    guidance = getattr(net.generation_config, "guidance_scale", None)
    known = {item.name: getattr(sampling, item.name) for item in fields(sampling)}
    return JanusModel(path, net, type(sampling)(**{**known, **({} if guidance is None else {"guidance": float(guidance)})}), dtype)


def read_network(path: Path, dtype: str) -> Any:
    """A JanusForConditionalGeneration with the folder's weights: every parameter present, none left over."""
    from transformers import GenerationConfig, JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    layout = model_type(path)
    if layout not in (HUGGING_FACE, ORIGINAL):
        raise MmalignError(f"{path} is no Janus: the model_type in its config.json is {layout!r}, expected {HUGGING_FACE} or {ORIGINAL}.")
    tensors = read_tensors(path)
    if layout == ORIGINAL:
        tensors = to_hugging_face(tensors)
        sizes = original_config(hub.read_config(path), tensors)
        parts = (LlamaConfig(**sizes["text"]), JanusVisionConfig(**sizes["vision"]), JanusVQVAEConfig(**sizes["vq"]))
        settings = JanusConfig(text_config=parts[0], vision_config=parts[1], vq_config=parts[2])
    else:
        settings = JanusConfig.from_pretrained(path)
    # The composite config ties by default, and tying overwrites the input embeddings with the head: only the file knows.
    settings.tie_word_embeddings = "lm_head.weight" not in tensors
    with torch.device("meta"):
        shell = JanusForConditionalGeneration(settings)
    expected = set(shell.state_dict()) - ({"lm_head.weight"} if settings.tie_word_embeddings else set())
    check_names(expected - set(tensors), set(tensors) - expected, path)
    check_shapes(tensors, shell, path)
    net = JanusForConditionalGeneration.from_pretrained(None, config=settings, state_dict=tensors, dtype=getattr(torch, dtype))
    if (path / "generation_config.json").is_file():
        net.generation_config = GenerationConfig.from_pretrained(path)
    return net
