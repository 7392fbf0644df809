"""Weight files of a checkpoint folder: safetensors, or PyTorch's own files read without running their pickled code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mmalign.types import MmalignError

SHOWN = 5
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
WRAPPERS = ("model", "state_dict")  # under which training scripts put the tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the tensors, safetensors preferred: those of the index, or the single file. MmalignError when one is missing."""
    for suffix in ("safetensors", "bin"):
        for stem in STEMS:
            index = folder / f"{stem}.{suffix}.index.json"
            if index.is_file():
                files = [folder / name for name in sorted(set(_index(index).values()))]
                absent = [file.name for file in files if not file.is_file()]
                if absent:
                    raise MmalignError(
                        f"The checkpoint {folder} lacks {len(absent)} of the {len(files)} weight files that {index.name} lists: "
                        f"{_some(absent)}. Download the folder again."
                    )
                return files
            if (folder / f"{stem}.{suffix}").is_file():
                return [folder / f"{stem}.{suffix}"]
    raise MmalignError(
        f"There are no weights in {folder}: expected model.safetensors or pytorch_model.bin, whole or in parts with an index. "
        f"It has {_some(sorted(path.name for path in folder.iterdir())) or 'no files'}. Download the folder again."
    )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its stored name, on the CPU in its stored precision."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors.update(read_file(file))
    return tensors


def read_file(file: Path) -> dict[str, Tensor]:
    """Every tensor of one weight file, on the CPU in its stored precision; in PyTorch's files also below `model` or `state_dict`."""
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pytorch(file)


def check_names(missing: Iterable[str], unexpected: Iterable[str], where: object) -> None:
    """MmalignError that names the parameters a checkpoint lacks or has too many; nothing when both are empty."""
    lacking, extra = sorted(missing), sorted(unexpected)
    if lacking or extra:
        raise MmalignError(
            f"The weights in {where} do not fit their config.json: {len(lacking)} parameters are missing ({_some(lacking) or 'none'}) and "
            f"{len(extra)} are unexpected ({_some(extra) or 'none'}). The folder mixes two checkpoints, or a file was only partly copied."
        )


def check_shapes(tensors: dict[str, Tensor], model: nn.Module, where: object) -> None:
    """MmalignError that names the tensors whose shape is not the model's."""
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {list(weight.shape)}"
        for name, weight in model.state_dict().items()
        if name in tensors and tensors[name].shape != weight.shape
    ]
    if wrong:
        raise MmalignError(f"The weights in {where} do not have the sizes of its config.json: {_some(wrong)}. The folder mixes two.")


def _index(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise MmalignError(f"The weight index {path} is damaged ({error!r}). Download it again.") from error


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise MmalignError(f"The weight file {file} cannot be read: {error}. Download it again.") from error


def _read_pytorch(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MmalignError(
            f"The weight file {file} is damaged, or holds more than tensors, which is refused because such a file can run code: {first} "
            "Download it again, or convert it to safetensors where you trust it."
        ) from error
    if isinstance(content, dict):
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise MmalignError(f"The weight file {file} is not a mapping of names to tensors. Give the folder of a whole checkpoint.")
    return content


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
