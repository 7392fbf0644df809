"""What runs on this machine, and the one command that makes the rest run. Nothing heavy is imported unless asked to (`deep`)."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from ast import literal_eval
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mmalign
from mmalign import data, registry
from mmalign.config import Secret
from mmalign.screen import columns
from mmalign.types import MmalignError

# The modules that each extra of pyproject.toml brings.
EXTRAS = {
    "ray": ("ray",),
    "ocr": ("rapidocr", "onnxruntime", "rapidfuzz"),
    "safety": ("detoxify",),
    "attribution": ("shap", "cv2"),
    "open_clip": ("open_clip",),
    "groundingdino": ("groundingdino",),
    "trackers": ("tensorboard", "trackio", "wandb"),
    "test": ("pytest", "hypothesis", "jaxtyping", "selenium"),
}
ENDPOINT = Secret("OPENAI_API_KEY")

_SCORERS = re.compile(r"^    scorers\b[^=\n]*=\s*(\([^)]*\))", re.MULTILINE)


@dataclass(frozen=True)
class Need:
    """One thing a file cannot run without: what it is, whether it is here, and the command that brings it."""

    text: str
    is_met: bool
    fix: str


@dataclass(frozen=True)
class Readiness:
    """A registered file with its needs."""

    entry: registry.Entry
    needs: tuple[Need, ...]

    @property
    def unmet(self) -> tuple[Need, ...]:
        return tuple(need for need in self.needs if not need.is_met)

    @property
    def mark(self) -> str:
        return "needs " + ", ".join(need.text for need in self.unmet) if self.unmet else "ready"

    @property
    def short_mark(self) -> str:
        """The mark with the kinds of what is missing only, such as "needs data, weights"."""
        return "needs " + ", ".join(dict.fromkeys(need.text.partition(":")[0] for need in self.unmet)) if self.unmet else "ready"


def readiness(kind: str, plugs: Sequence[Path] = ()) -> list[Readiness]:
    """Every entry of a kind with its needs; a suite needs its data and what its scorers need."""
    found = registry.entries(kind, plugs)
    if kind != "evaluators":
        return [Readiness(entry, tuple(map(_need, entry.needs))) for entry in found.values()]
    scorers = {item.entry.name: item for item in readiness("scorers", plugs)}
    states = {item.source.name: item.state for item in data.listing()}
    return [Readiness(entry, _suite_needs(entry, scorers, states)) for entry in found.values()]


def environment() -> dict[str, Any]:
    """The machine and the installation: versions, cores, memory, GPUs, packages that are absent or do not fit."""
    return {
        "mmalign": mmalign.__version__,
        "from": str(Path(mmalign.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": cores(),
        "memory_gb": _memory_gb(),
        "gpus": gpus(),
        "packages": packages(),
    }


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """Name and memory of each NVIDIA GPU, asked of its driver; [] without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip().splitlines()
    except (subprocess.SubprocessError, OSError) as error:
        return [f"nvidia-smi fails: {error}"]


def packages() -> dict[str, str]:
    """Each required package with its version; one that is absent or of the wrong version says so after the word 'needs'."""
    found = {}
    for text in _requirements():
        name = re.match(r"[\w.-]+", text)
        assert name is not None, text
        try:
            version = metadata.version(name[0])
        except metadata.PackageNotFoundError:
            found[name[0]] = f"absent, needs {text}"
            continue
        found[name[0]] = version if _fits(text, version) else f"{version}, needs {text}"
    return found


def examine(plugs: Sequence[Path] = (), deep: bool = False) -> dict[str, Any]:
    """The whole examination as JSON-able data; `is_sound` says whether the required packages are there and fit."""
    found = {kind: readiness(kind, plugs) for kind in registry.KINDS}
    surroundings = environment()
    misfits = [name for name, state in surroundings["packages"].items() if "needs" in state]
    commands = ([install_command()] if misfits else []) + fixes([item for items in found.values() for item in items])
    return {
        **surroundings,
        **{kind: {item.entry.name: item.mark for item in items} for kind, items in found.items()},
        "imports": import_all(plugs) if deep else {},
        "fixes": commands,
        "is_sound": not misfits,
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """An examination as text."""
    shown = [f"mmalign {found['mmalign']} from {found['from']}, Python {found['python']}, {found['platform']}"]
    shown.append(f"{found['cores']} cores, {found['memory_gb']} GB memory, {', '.join(found['gpus']) or 'no NVIDIA GPU'}")
    misfits = [f"{name} {state}" for name, state in found["packages"].items() if "needs" in state]
    shown.append(f"packages: {'; '.join(misfits) or 'all present and fitting'}")
    for kind in registry.KINDS:
        shown += [f"{registry.NOUNS[kind]:<14}{line}" for line in columns(list(found[kind].items()))]
    shown += [f"{name}: {state}" for name, state in found["imports"].items()]
    shown += ["to run the rest:", *(f"  {command}" for command in found["fixes"])] if found["fixes"] else ["everything listed runs here"]
    return shown


def import_all(plugs: Sequence[Path] = ()) -> dict[str, str]:
    """Import what is otherwise only looked at, in a process of its own: torch and its devices, its companions, every registered file."""
    report = {name: _import_apart(f"import {name} as it; print(it.__version__)") for name in ("torch", "transformers", "diffusers", "peft")}
    report["torch devices"] = _import_apart(
        "import torch; print(', '.join(['cpu', *map(torch.cuda.get_device_name, range(torch.cuda.device_count()))]))"
    )
    for kind in registry.KINDS:
        for entry in registry.entries(kind, plugs).values():
            try:
                registry.load(entry)
                report[f"{kind}/{entry.name}"] = "imports"
            except MmalignError as error:
                report[f"{kind}/{entry.name}"] = str(error)
    return report


def _import_apart(code: str) -> str:
    """What a fresh interpreter prints for this code, or the last line of its error; a crash there is an answer, not our end."""
    done = subprocess.run([sys.executable, "-c", f"import mmalign; {code}"], capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return (lines[-1] if lines else "") if done.returncode == 0 else f"fails: {lines[-1] if lines else f'exit code {done.returncode}'}"


def install_command(extras: Sequence[str] = ()) -> str:
    """The pip command that installs mmalign with these extras, for a checkout or for an installed package."""
    root = Path(mmalign.__file__).resolve().parent.parent
    is_checkout = (root / "pyproject.toml").is_file()
    wanted = f"[{','.join(extras)}]" if extras else ""
    if is_checkout:
        return f"{sys.executable} -m pip install -c {root}/constraints.txt -e '{root}{wanted}'"
    return f"{sys.executable} -m pip install 'mmalign{wanted}'"


def fixes(found: Sequence[Readiness]) -> list[str]:
    """The commands that meet every unmet need, each once; all extras together are one command."""
    unmet = [need for item in found for need in item.unmet]
    extras = sorted({need.text.removeprefix("extra: ") for need in unmet if need.text.startswith("extra: ")})
    others = [need.fix for need in unmet if not need.text.startswith("extra: ")]
    return ([install_command(extras)] if extras else []) + list(dict.fromkeys(others))


def _need(text: str) -> Need:
    what, _, name = (part.strip() for part in text.partition(":"))
    if what == "extra":
        if name not in EXTRAS:
            raise MmalignError(f"The need '{text}' names no extra of mmalign. Extras: {', '.join(EXTRAS)}.")
        return Need(text, all(importlib.util.find_spec(module) for module in EXTRAS[name]), install_command([name]))
    if what == "weights":
        return Need(text, _is_cached(name), f"hf download {name}")
    if what == "endpoint":
        return Need(text, ENDPOINT.is_set(), f"export {ENDPOINT.name}=... (or put that line into .env)")
    if what == "package":
        return Need(text, importlib.util.find_spec(name) is not None, f"{sys.executable} -m pip install {name}")
    if what == "folder":
        place = data.data_home() / name
        return Need(text, place.exists(), f"put {name} at {place}, or name its place with --set (see: mmalign explain SUITE)")
    raise MmalignError(f"The need '{text}' must begin with 'extra:', 'weights:', 'package:', 'folder:' or 'endpoint'.")


def _is_cached(name: str) -> bool:
    """Whether a checkpoint is at hand: a folder, or a snapshot in the Hugging Face cache."""
    if Path(name).exists():
        return True
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    return any((cache / f"models--{name.replace('/', '--')}" / "snapshots").glob("*"))


def _suite_needs(entry: registry.Entry, scorers: Mapping[str, Readiness], states: Mapping[str, str]) -> tuple[Need, ...]:
    needs = list(map(_need, entry.needs))
    for source in registry.card(entry).data:
        if source.optional:
            continue
        needs.append(Need(f"data: {source.name}", states.get(source.name) == "ready", f"mmalign data add {source.name} --from PATH"))
    for name in scorers_of(entry):
        item = scorers.get(name)
        needs.extend(item.needs if item else [Need(f"scorer: {name}", False, f"mmalign ls scorers {name}")])
    return tuple(dict.fromkeys(needs))


def scorers_of(entry: registry.Entry) -> tuple[str, ...]:
    """The scorers a suite uses by default: its literal tuple, read from the source, or the loaded suite where options decide."""
    literal = _SCORERS.search(entry.path.read_text(encoding="utf-8"))
    names = literal_eval(literal[1]) if literal else registry.load(entry).Evaluator().scorers
    return tuple(map(registry.normalise, names))


def _requirements() -> list[str]:
    pyproject = Path(mmalign.__file__).resolve().parent.parent / "pyproject.toml"
    if pyproject.is_file():
        return list(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"])
    return [text for text in metadata.requires("mmalign") or () if "extra ==" not in text]


def _fits(requirement: str, version: str) -> bool:
    from packaging.requirements import Requirement

    return Requirement(requirement).specifier.contains(version, prereleases=True)


def _memory_gb() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
