"""A diffusers pipeline as a model that serves requests: reading a folder strictly, and images for any batch of requests."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmalign import config, hub
from mmalign.models._diffusion import Diffusion
from mmalign.models._diffusion_layouts import LAYOUTS, Layout
from mmalign.models.layers.lanes import lanes
from mmalign.models.layers.weights import check_names
from mmalign.trajectory import Policy
from mmalign.types import Failure, MmalignError, Request, Sample, UsageError, digest

REVISION = 1  # of the sampler: raise it when equal weights, seed and settings give other pictures
DTYPES = ("float32", "bfloat16", "float16")
INDEX, GENERATION = "model_index.json", "generation_config.json"
# Parts that change no latent: what looks at finished pictures (diffusers' safety checker blacks them out) or only writes PNG files.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "image_processor")
LIBRARIES = ("diffusers", "transformers")


class DiffusionModel(Diffusion):
    """A pipeline with a name, a fingerprint and `generate`."""

    family = "diffusion"
    capabilities = frozenset({"image", "train"})

    def __init__(self, path: Path, layout: Layout, sampling: Any, dtype: str) -> None:
        super().__init__(layout, sampling.tokens)
        self.path, self.name, self.sampling_type = path, path.resolve().name, type(sampling)
        self.settings: Mapping[str, Any] = asdict(sampling)
        self.fingerprint = digest(self.family, hub.fingerprint_weights(path), dtype, REVISION)
        self.determinism = "bitwise" if self.device.type == "cpu" else "kernel"

    def generate(self, requests: Sequence[Request]) -> list[Sample | Failure]:
        """Per request an image, or a failure where its size cannot be drawn; each depends on its request alone (bitwise on the CPU)."""
        started = time.perf_counter()
        results: list[Any] = [None] * len(requests)
        keys: list[Any] = []
        for row, request in enumerate(requests):
            try:
                self.layout.shape(request.size or self.size)
            except UsageError as error:
                results[row] = Failure("generate", "error", f"{request.id}: {error}")
            keys.append((self._settings(request), request.size or self.size))
        for group in lanes(keys, None):
            rows = [row for row in group.rows if results[row] is None]
            for row, picture in zip(rows, self._draw([requests[row] for row in rows], *group.key), strict=True):
                results[row] = picture
        share = (time.perf_counter() - started) / max(1, len(requests))
        return [
            result if isinstance(result, Failure) else Sample(request, image=result, seconds=share)
            for request, result in zip(requests, results, strict=True)
        ]

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the pipeline's folder with the denoiser's `state` (its own if None); every other part is copied as it was read."""
        folder, part = Path(folder), self.layout.denoiser
        folder.mkdir(parents=True, exist_ok=True)
        index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
        for name in [name for name in index if not name.startswith("_") and (self.path / name).is_dir() and name != part]:
            shutil.copytree(self.path / name, folder / name, dirs_exist_ok=True)
        (folder / part).mkdir(exist_ok=True)
        for file in [self.path / INDEX, self.path / GENERATION, self.path / part / "config.json"]:
            if file.is_file():
                shutil.copy2(file, folder / file.relative_to(self.path))
        tensors = {name: tensor.detach().contiguous() for name, tensor in (self.net.state_dict() if state is None else state).items()}
        save_file(tensors, folder / part / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

    def policy(self, settings: Any) -> Policy:
        """The deterministic sampler of these settings."""
        return Policy(settings.guidance, noise=self.layout.rules[0], levels=(0.0,) * settings.steps)

    def _settings(self, request: Request) -> Any:
        chosen = config.build(self.sampling_type, {**self.settings, **request.settings}, f"settings of {request.id}")
        if chosen.steps < 1 or chosen.tokens < 1:
            raise UsageError(f"Sampling needs at least one step and one token; got steps {chosen.steps}, tokens {chosen.tokens}.")
        return chosen

    def _draw(self, requests: Sequence[Request], settings: Any, size: tuple[int, int]) -> list[Any]:
        if not requests:
            return []
        prompts = self.encode_prompts([request.prompt.text for request in requests], settings.negative, settings.tokens)
        return self.pictures(self.draw(prompts, self.policy(settings), [request.seed for request in requests], size))


def open_model(path: Path, name: str, sampling: Any, device: str, dtype: str) -> DiffusionModel:
    """Read a pipeline's folder; MmalignError says which part, file or parameter is wrong."""
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'; diffusion pipelines run in {', '.join(DTYPES)}.")
    layout_type = LAYOUTS[name]
    return DiffusionModel(path, layout_type(read_pipeline(path, name, layout_type, device, dtype)), own_settings(path, sampling), dtype)


def own_settings(path: Path, sampling: Any) -> Any:
    """The pipeline's defaults, with what the folder's generation_config.json says. Official folders have none; a small member needs other
    steps, guidance and text length than a large one of its kind, and this is where it says so."""
    file = path / GENERATION
    if not file.is_file():
        return sampling
    known = {"num_inference_steps": "steps", "guidance_scale": "guidance", "max_sequence_length": "tokens"}
    found = json.loads(file.read_text(encoding="utf-8"))
    return replace(sampling, **{known[name]: value for name, value in found.items() if name in known})


def read_pipeline(path: Path, name: str, layout: type[Layout], device: str, dtype: str) -> Any:
    """The diffusers pipeline, each part read by its own class: every parameter present, none left over, no remote code."""
    pipeline = _class_of(name)
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    wanted = {part: value for part, value in index.items() if isinstance(value, list) and len(value) == 2}
    parts: dict[str, Any] = {}
    for part, (library, cls) in wanted.items():
        if library is None or part in UNUSED:
            parts[part] = None
        elif part == "scheduler":
            parts[part] = read_scheduler(path, layout)
        else:
            if library not in LIBRARIES:
                raise MmalignError(f"{path / INDEX} wants '{part}' from '{library}'; only classes of {' and '.join(LIBRARIES)} are loaded.")
            if not (path / part).is_dir():
                raise MmalignError(f"The pipeline {path} lacks its part '{part}' ({cls}). Download the folder again.")
            parts[part] = _read_part(path / part, library, cls, "float32" if part == "vae" else dtype)
    extra = {"requires_safety_checker": False} if name == "StableDiffusionPipeline" else {}
    pipe = pipeline(**parts, **extra)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(device).eval().requires_grad_(False)
    getattr(pipe, layout.denoiser).requires_grad_(True)
    return pipe


def _class_of(name: str) -> Any:
    """A pipeline class. Its import pulls image processors that nothing here uses, for which transformers would advise torchvision."""
    import diffusers
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return getattr(diffusers, name)
    finally:
        logging.set_verbosity(level)


def read_scheduler(path: Path, layout: type[Layout]) -> Any:
    """The kind of schedule that has log-probabilities, with the folder's numbers: Euler for flow matching, DDIM for noise prediction."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    settings = json.loads((path / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    if "ddim" not in layout.rules:
        if settings.get("flow_shift") is not None:  # a multistep solver's name for the same number
            settings["shift"] = settings["flow_shift"]
        return FlowMatchEulerDiscreteScheduler.from_config(settings)
    return DDIMScheduler.from_config({**settings, "clip_sample": False})


def _read_part(folder: Path, library: str, cls: str, dtype: str) -> Any:
    import importlib

    kind = getattr(importlib.import_module(library), cls, None)
    if kind is None:
        raise MmalignError(f"The installed {library} has no class {cls}, which {folder} needs. Update {library}.")
    if not issubclass(kind, torch.nn.Module):
        return kind.from_pretrained(folder)
    options = {"torch_dtype": getattr(torch, dtype)} if library == "diffusers" else {"dtype": getattr(torch, dtype)}
    try:
        module, found = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise MmalignError(f"The part {folder} cannot be read as {cls}: {error}. Download the folder again.") from error
    # Old CLIP files carry a table of positions that newer code computes.
    check_names(found["missing_keys"], [name for name in found["unexpected_keys"] if not name.endswith("position_ids")], folder)
    return module
