"""Janus as a model that serves requests: reading a folder, and images or answers for any batch of requests."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mmalign import config, hub, images
from mmalign.models._janus import Janus
from mmalign.models._janus_layout import HUGGING_FACE, ORIGINAL, model_type, original_config, to_hugging_face
from mmalign.models._janus_text import ChatFormat, read_pixels
from mmalign.models.layers.lanes import lanes
from mmalign.models.layers.weights import check_names, check_shapes, read_tensors
from mmalign.trajectory import Policy
from mmalign.types import Failure, MmalignError, Request, Sample, UsageError, digest, request_seed

REVISION = 1  # of the sampler: raise it when equal weights, seed and settings give other samples
DTYPES = ("float32", "bfloat16", "float16")
KEPT = ("tokenizer*.json", "special_tokens_map.json", "chat_template.*", "processor_config.json", "preprocessor_config.json")


class JanusModel(Janus):
    """A Janus with a name, a fingerprint and `generate`."""

    family = "janus"
    capabilities = frozenset({"image", "answer", "train"})

    def __init__(self, path: Path, net: Any, sampling: Any, dtype: str) -> None:
        patches = net.config.vision_config.image_size // net.config.vision_config.patch_size
        super().__init__(net, ChatFormat(path, patches**2), read_pixels(path, net.config.vision_config.image_size))
        self.path, self.name, self.sampling_type = path, path.resolve().name, type(sampling)
        self.settings: Mapping[str, Any] = asdict(sampling)
        self.fingerprint = digest(self.family, hub.fingerprint_weights(path), dtype, REVISION)
        self.determinism = "bitwise" if self.device.type == "cpu" else "kernel"

    def generate(self, requests: Sequence[Request]) -> list[Sample | Failure]:
        """Per request an image, an answer or a failure, which depends on that request alone (bitwise on the CPU)."""
        started = time.perf_counter()
        results: list[Any] = [None] * len(requests)
        settings = [self._settings(request) for request in requests]
        for lane in lanes(settings, None):
            group = [requests[row] for row in lane.rows]
            made = self._draw(group, lane.key) if lane.key.task == "image" else self._answer(group, lane.key)
            for row, result in zip(lane.rows, made, strict=True):
                results[row] = result
        share = (time.perf_counter() - started) / max(1, len(requests))
        return [
            result if isinstance(result, Failure) else Sample(request, seconds=share, **result)
            for request, result in zip(requests, results, strict=True)
        ]

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

    def _settings(self, request: Request) -> Any:
        chosen = config.build(self.sampling_type, {**self.settings, **request.settings}, f"settings of {request.id}")
        if chosen.task not in ("image", "answer"):
            raise UsageError(f"Janus has no task '{chosen.task}'; there are image and answer. Correct sampling.task.")
        if chosen.instruction and "{prompt}" not in chosen.instruction:
            raise UsageError(f"sampling.instruction must say where the prompt goes: '{chosen.instruction}' holds no {{prompt}}.")
        return chosen

    def _draw(self, requests: Sequence[Request], settings: Any) -> list[dict[str, Any] | Failure]:
        wrong = {index: request for index, request in enumerate(requests) if request.size not in (None, self.size)}
        possible = [request for index, request in enumerate(requests) if index not in wrong]
        drawn = iter(self._images(possible, settings) if possible else ())
        return [self._wrong_size(request) if index in wrong else next(drawn) for index, request in enumerate(requests)]

    @torch.no_grad()
    def _images(self, requests: Sequence[Request], settings: Any) -> list[dict[str, Any]]:
        """uint8 [H, W, 3] each, and the reasoning where it was asked for. Fractions are cut off, not rounded, as the official script does."""
        texts, seeds = [request.prompt.text for request in requests], [request.seed for request in requests]
        thoughts: list[str] | None = None
        if settings.instruction:
            asked = [settings.instruction.format(prompt=text) for text in texts]
            own = [request_seed(seed, "reasoning", 0) for seed in seeds]
            thoughts = list(self.generate_text(asked, None, own, settings.reasoning_temperature, settings.reasoning_tokens).texts)
        prompts = self.encode_prompts(texts, reasoning=thoughts)
        codes = self.sample(prompts, Policy(settings.guidance, settings.temperature), seeds).actions
        pictures: list[dict[str, Any]] = [{} for _ in requests]
        for lane in lanes([0] * len(requests), self.width):
            bytes_BHWC = (self.decode(codes[lane.rows]) * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            for row, picture in zip(lane.real, bytes_BHWC, strict=False):
                pictures[row] = {"image": picture.copy(), "extra": {} if thoughts is None else {"reasoning": thoughts[row]}}
        return pictures

    def _wrong_size(self, request: Request) -> Failure:
        size = " x ".join(map(str, request.size or ()))
        own = " x ".join(map(str, self.size))
        return Failure("generate", "error", f"{self.name} draws {own} pixels only; {request.id} asks for {size}. Leave the size out.")

    def _answer(self, requests: Sequence[Request], settings: Any) -> list[dict[str, Any] | Failure]:
        pictures = [_picture(request) for request in requests]
        rows = [index for index, picture in enumerate(pictures) if not isinstance(picture, Failure)]
        results: list[Any] = list(pictures)
        if rows:
            texts, seeds = [requests[row].prompt.text for row in rows], [requests[row].seed for row in rows]
            written = self.generate_text(texts, [pictures[row] for row in rows], seeds, settings.answer_temperature, settings.max_tokens)
            for row, text, mask, ids in zip(rows, written.texts, written.mask, written.ids, strict=True):
                # A reply cut off by the limit is not the model's answer; the scorer must be able to tell.
                is_whole = bool((ids[mask] == self.chat.eos).any())
                results[row] = {"answer": text, "extra": {"tokens": int(mask.sum()), "is_whole": is_whole}}
        return results


def _picture(request: Request) -> np.ndarray | Failure | None:
    """The request's one picture, None when it asks about none, or the failure to read it."""
    given = list(request.prompt.meta.get("images") or ())
    if len(given) > 1:
        message = f"Janus reads one picture per question; {request.id} has {len(given)}. Join them into one picture."
        return Failure("generate", "error", message)
    if not given:
        return None
    try:
        return images.check_image(given[0]) if isinstance(given[0], np.ndarray) else images.decode_image(Path(given[0]))
    except images.ImageError as error:
        is_missing = not isinstance(given[0], np.ndarray) and not Path(given[0]).exists()
        return Failure("generate", "missing" if is_missing else "error", str(error))


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
