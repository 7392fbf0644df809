"""Checkpoints: what a model's name on the command line means, where its files are, and a fingerprint of them.

Standard library only, so that a name is resolved before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign import reach, registry
from mmalign.types import MmalignError, UsageError, digest

CHECKPOINTS = Path(__file__).parent / "testbed" / "checkpoints"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
SIDE_FILES = (".json", ".jinja", ".txt", ".model")
WHOLE = 256 * 2**20  # bytes up to which a file is read whole
CONFIGS = ("config.json", "model_index.json", "llm_config.json")  # of a checkpoint, a pipeline, BAGEL
BLOCK, BLOCKS = 64 * 1024, 1024  # of a larger file: bytes of a block, blocks spread over it
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


TRAINING_FILE = "training.json"


@dataclass(frozen=True)
class ModelSpec:
    """A resolved model: the name for results, its family, its folder, its hub revision ("" for a folder) and how it was found."""

    name: str
    family: str
    path: Path
    revision: str = ""
    how: str = ""


def resolve_model(spec: str, plugs: Sequence[Path] = ()) -> ModelSpec:
    """What a model's name means: a bundled name, a folder, `family:FOLDER`, or a hub id, optionally with `@revision`.

    A bundled name comes first; a folder of the same name is ./name. A hub id is downloaded (or found in the cache, which is all that
    is tried when HF_HUB_OFFLINE is set). UsageError when it is none of these, MmalignError when its files are incomplete.
    """
    family, _, rest = spec.partition(":")
    if rest and registry.normalise(family) in registry.entries("models", plugs):
        entry = registry.find("models", family, plugs)
        path = Path(rest).expanduser()
        if not path.is_dir():
            raise UsageError(f"There is no folder {path} (from '{spec}'). Give the folder that holds the {entry.name} files.")
        return ModelSpec(_name(path), entry.name, path, how=f"family {entry.name} as given")
    bundled = CHECKPOINTS / spec
    if spec in bundled_names():
        return _detected(spec, bundled, "", "bundled", plugs)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _detected(_name(path), path, "", "folder", plugs)
    identity, _, revision = spec.partition("@")
    if not path.exists() and _HUB_ID.fullmatch(identity):
        folder = _download(identity, revision or None)
        return _detected(identity, folder, folder.name, "hub", plugs)
    raise UsageError(_unknown(spec, path, plugs))


def bundled_names() -> list[str]:
    """The checkpoints that ship with the package."""
    return sorted(path.parent.name for name in CONFIGS for path in CHECKPOINTS.glob(f"*/{name}"))


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, or model_index.json of a diffusers pipeline; MmalignError when it is missing or damaged."""
    file = next((path / name for name in CONFIGS if (path / name).is_file()), path / CONFIGS[0])
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MmalignError(
            f"{path} has no config.json (nor a pipeline's model_index.json), so it is no checkpoint. Give the folder that holds it, "
            f"or family:{path} for a family without one, such as folder:{path} for images that exist already."
        ) from error
    except (ValueError, OSError) as error:
        raise MmalignError(f"{file} cannot be read as JSON: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise MmalignError(f"{file} must hold a JSON object, got a {type(content).__name__}. Download it again.")
    return content


def fingerprint_weights(path: Path) -> str:
    """32 hex digits that change with the weights and configs of a folder, in seconds also for 16 GB.

    Digested: names and contents of the configs and tokenizer files; of every weight file the name, the size, the safetensors header
    (each tensor's name, type and shape) and its content: whole up to 256 MB, else 1024 blocks of 64 KB spread over it, first and last
    included. A change only between the blocks of a larger file goes unseen; training changes all of them.
    """
    if not path.is_dir():
        raise MmalignError(f"There is no folder {path}, so it has no fingerprint.")
    parts = []
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if not file.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if file.suffix in WEIGHTS:
            parts.append((name.as_posix(), file.stat().st_size, _sample(file)))
        elif file.suffix in SIDE_FILES:
            parts.append((name.as_posix(), file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()))
    return digest("weights", parts)


def sample_file(file: Path) -> str:
    """sha256 of a file's size and content: all of it, or blocks spread over a file larger than WHOLE."""
    size = file.stat().st_size
    content = hashlib.sha256(struct.pack("<Q", size))
    with file.open("rb") as stream:
        starts = [0] if size <= WHOLE else [(size - BLOCK) * index // (BLOCKS - 1) for index in range(BLOCKS)]
        for start in starts:
            stream.seek(start)
            content.update(stream.read(WHOLE if size <= WHOLE else BLOCK))
    return content.hexdigest()


def _sample(file: Path) -> str:
    """The sampled digest of a weight file, with its whole header when it is safetensors."""
    if file.suffix != ".safetensors":
        return sample_file(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = stream.read(length) if 8 + length <= file.stat().st_size else b""
    return hashlib.sha256(header).hexdigest() + sample_file(file)


def _detected(name: str, path: Path, revision: str, how: str, plugs: Sequence[Path]) -> ModelSpec:
    """The spec of a folder with a config.json (or model_index.json), whose family is the first that recognises it."""
    content = read_config(path)
    kind = content.get("model_type", content.get("_class_name"))
    for family, entry in registry.entries("models", plugs).items():
        if registry.load(entry).recognises(path):
            return ModelSpec(name, family, path, revision, f"{how} {path}: family {family} (model_type {kind})")
    known = ", ".join(registry.entries("models", plugs))
    raise UsageError(
        f"No model family recognises {path} (model_type {kind!r} in its config). Known families: {known}. "
        f"Name one as FAMILY:{path}, or add a family with --plug."
    )


def _download(identity: str, revision: str | None) -> Path:
    """The local folder of a hub repository: from the cache if it is there, else downloaded unless offline."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.jinja", "*.txt", "*.model", *(f"*{suffix}" for suffix in WEIGHTS)]
    where = f"'{identity}'" + (f" at revision {revision}" if revision else "")
    try:
        return Path(snapshot_download(identity, revision=revision, allow_patterns=wanted, local_files_only=reach.is_cache_only()))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MmalignError(
            f"The checkpoint {where} is neither a folder here nor in the cache, and it cannot be downloaded: {reach.hub_fault(error)} "
            f"On a machine with a network run `hf download {identity}`, copy the folder here and give its path."
        ) from error


def _name(path: Path) -> str:
    """The run's name for a checkpoint that was trained here, else the folder's."""
    return str(training_facts(path).get("name") or path.resolve().name)


def training_facts(path: Path) -> dict[str, Any]:
    """What `mmalign train` wrote beside a checkpoint it trained ({} for any other): name, trainer, base, rewards."""
    file = path / TRAINING_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _unknown(spec: str, path: Path, plugs: Sequence[Path]) -> str:
    if path.is_file():
        return f"The model '{spec}' is a file. Give the folder that holds it together with its config.json."
    family, _, rest = spec.partition(":")
    if rest:
        return f"Unknown model family '{family}' in '{spec}'" + registry.suggest(family, registry.entries("models", plugs))
    return f"There is no model '{spec}': no folder of that name, no bundled checkpoint" + registry.suggest(spec, bundled_names())
