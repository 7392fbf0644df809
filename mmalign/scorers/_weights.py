"""Official weight files: read without unpickling, renamed by tables, whole or refused; and the identity of loaded weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.reach import hub_fault, is_cache_only
from mmalign.types import MmalignError, digest

if TYPE_CHECKING:
    import torch

HARMLESS = "position_ids"  # a constant that old checkpoints carry and new classes compute


def tokenizer(spec: str, option: str) -> Any:
    """The tokenizer of a folder or a hub id."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(spec, local_files_only=is_cache_only(spec))
    except (OSError, ValueError, KeyError) as error:
        raise MmalignError(
            f"The tokenizer '{spec}' ({option}) cannot be loaded: {hub_fault(error, spec)} "
            f"Give a folder or a hub id with --set {option}=PATH."
        ) from error


def official_file(spec: str, option: str) -> Path:
    """The path of an official weight file: a local path, or "owner/name:file" on the hub (fetched once, then cached)."""
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    repository, colon, name = spec.partition(":")
    if not colon or repository.count("/") != 1:
        raise MmalignError(f"There is no file '{spec}' ({option}). Give a path, or a hub file as OWNER/NAME:FILE, with --set {option}=...")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, local_files_only=is_cache_only()))
    except (OSError, ValueError) as error:  # what huggingface_hub raises when it is offline, refused or misspelt
        raise MmalignError(
            f"The file {name} of the hub repository {repository} ({option}) cannot be fetched: {hub_fault(error)} "
            f"Download it on a machine with network and give its path with --set {option}=PATH."
        ) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or torch file, from its "state_dict" or "model" where it has one; nothing but tensors is unpickled."""
    import pickle

    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise MmalignError(f"The weight file {path} cannot be read: {first_line(error)} Download it again.") from error
    state = content.get("state_dict", content.get("model", content)) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise MmalignError(f"The weight file {path} holds a {type(content).__name__} that is no mapping of names to tensors.")
    return dict(state)


def fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state dict; MmalignError names the tensors when one is missing, left over or of another shape."""
    own = module.state_dict()
    wrong = [(key, tuple(state[key].shape), tuple(own[key].shape)) for key in state if key in own and state[key].shape != own[key].shape]
    check_whole(source, type(module).__name__, own.keys() - state.keys(), state.keys() - own.keys(), wrong)
    module.load_state_dict(dict(state))


def check_whole(source: str, kind: str, missing: Iterable[str], surplus: Iterable[str], misshapen: Iterable[Any]) -> None:
    """MmalignError unless a checkpoint has exactly the tensors of its class."""
    problems = [
        f"{len(names)} {what}, first {names[0]}"
        for what, found in (("missing", missing), ("unknown", surplus), ("of another shape", misshapen))
        if (names := sorted(str(name) for name in found if not str(name).endswith(HARMLESS)))
    ]
    if problems:
        raise MmalignError(f"The weights {source} are not those of a {kind}: tensors {'; '.join(problems)}.")


def rename(state: Mapping[str, torch.Tensor], names: Mapping[str, str], source: str) -> dict[str, torch.Tensor]:
    """Tensors under new names by a table of patterns.

    In a pattern `*` is a number and `@` the rest of the name; in the new name `?` stands for q, k and v, into which the tensor's
    first axis is split, and a leading `^` transposes. A name without a place is an MmalignError.
    """
    patterns = [(re.compile(re.escape(old).replace(r"\*", r"(\d+)").replace("@", "(.+)")), new) for old, new in names.items()]
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        found = next(((match, new) for pattern, new in patterns if (match := pattern.fullmatch(key))), None)
        if found is None:
            raise MmalignError(f"The weight file {source} holds the tensor '{key}', which has no place in the model.")
        match, new = found
        for group in match.groups():
            new = re.sub(r"[*@]", group, new, count=1)
        parts = zip("qkv", tensor.chunk(3), strict=True) if "?" in new else [("", tensor)]
        for letter, part in parts:
            renamed[new.replace("?", letter).removeprefix("^")] = part.T.contiguous() if new.startswith("^") else part
    return renamed


def fingerprint_tensors(*modules: torch.nn.Module, n_values: int = 1024) -> str:
    """A digest of networks' tensor names, shapes and spread-out values: equal weights give an equal one, wherever they came from."""
    import torch

    seen = hashlib.sha256()
    for module in modules:
        for key, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().flatten()
            values = flat[:: max(1, flat.numel() // n_values)].to("cpu", torch.float32).numpy().tobytes()
            seen.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode() + values)
    return seen.hexdigest()[:32]


def fingerprint_tokenizer(words: Any) -> str:
    """A digest of a tokenizer's vocabulary."""
    return digest("vocabulary", words.get_vocab())


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
