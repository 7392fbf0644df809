"""A model family for tests: noise drawn from the request's seed, with faults on demand.

`path` holds `weights.txt` (its fingerprint) and may hold `faults.json`: {"delay": seconds, "<prompt id>": fault, "*": fault}; `calls.log`
beside it gets one line per generated image.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fakes.faults import commit, read_faults

from mmalign.types import Failure, MmalignError, Request, Sample, digest


@dataclass(frozen=True)
class Sampling:
    brightness: float = 1.0
    steps: int = 4


def recognises(path: Path) -> bool:
    return (path / "weights.txt").is_file()


@dataclass
class Dots:
    path: Path
    name: str = "dots"
    family: str = "dots"
    capabilities: frozenset[str] = frozenset({"image"})
    settings: Mapping[str, Any] = field(default_factory=lambda: {"brightness": 1.0, "steps": 4})
    determinism: str = "bitwise"

    @property
    def fingerprint(self) -> str:
        return digest((self.path / "weights.txt").read_text())

    def generate(self, requests: Sequence[Request]) -> list[Sample | Failure]:
        faults = read_faults(self.path / "faults.json")
        for request in requests:
            commit(faults, request.prompt.id, len(requests))
        time.sleep(float(faults.get("delay", 0.0)) * len(requests))
        with open(self.path / "calls.log", "a") as log:
            log.writelines(f"{request.id}\n" for request in requests)
        samples: list[Sample | Failure] = [self._draw(request, faults.get(request.prompt.id)) for request in requests]
        return samples[1:] if "short" in {faults.get(request.prompt.id) for request in requests} else samples

    def _draw(self, request: Request, fault: str | None) -> Sample | Failure:
        if fault == "refuse":
            return Failure("generate", "refusal", "the model refused")
        height, width = request.size or (8, 8)
        noise = np.random.default_rng(request.seed).integers(0, 256, (height, width, 3))
        pixels = np.clip(noise * float(request.settings["brightness"]), 0, 255).astype(np.uint8)
        return Sample(request, image=pixels, extra={"mean": float(pixels.mean())})


def load(path: Path, *, device: str = "cpu", dtype: str = "float32", extra: Mapping[str, Path] | None = None) -> Dots:
    if not (path / "weights.txt").is_file():
        raise MmalignError(f"The weights {path / 'weights.txt'} are missing. Copy them there.")
    if read_faults(path / "faults.json").get("load") == "raise":
        raise ValueError("a header that makes no sense")
    commit(read_faults(path / "faults.json"), "load", 1)
    return Dots(path)
