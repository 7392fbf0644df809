"""Checkpoint folders in the layouts that authors publish: config.json beside safetensors or .bin files, in one piece or in shards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.reach import hub_fault, is_cache_only
from mmalign.scorers._weights import read_tensors
from mmalign.types import MmalignError

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


def folder(spec: str, option: str, patterns: Sequence[str] = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")) -> Path:
    """The folder of a path or a hub id (fetched once, then cached); MmalignError when it cannot be had."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(spec, allow_patterns=list(patterns), local_files_only=is_cache_only()))
    except (OSError, ValueError) as error:  # what huggingface_hub raises when it is offline, refused or misspelt
        raise MmalignError(
            f"There is no folder '{spec}' ({option}), and the hub does not give it: {hub_fault(error)} "
            f"Download it on a machine with network and give its path with --set {option}=PATH."
        ) from error


def config_of(path: Path) -> dict[str, Any]:
    """The folder's config.json."""
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MmalignError(f"The folder {path} has no readable config.json: {error}. Download the checkpoint again.") from error
    if not isinstance(content, dict):
        raise MmalignError(f"The file {path / 'config.json'} holds no mapping of options.")
    return content


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder by name, whichever of the four layouts it has. Every shard that the index names must be there."""
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        raise MmalignError(f"The folder {path} holds no weights; expected one of {', '.join(WEIGHT_FILES)}.")
    if found.suffix != ".json":
        return read_tensors(found)
    index = json.loads(found.read_text(encoding="utf-8"))["weight_map"]
    state: dict[str, torch.Tensor] = {}
    for name in sorted(set(index.values())):
        state.update(read_tensors(path / name))
    if missing := sorted(index.keys() - state.keys()):
        raise MmalignError(
            f"The shards of {path} lack {len(missing)} tensors that the index names, first {missing[0]}. Download them again."
        )
    return state


def known_options(config: Mapping[str, Any], cls: Any) -> dict[str, Any]:
    """The options of a config.json that belong to a transformers config class, without those that name the original's own class."""
    fields = cls().to_dict()
    drop = ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map")
    return {key: value for key, value in config.items() if key in fields and key not in drop}
