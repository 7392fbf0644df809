"""A scorer for tests: mean brightness from 0 to 1, with faults on demand (`faults.json` in the folder `faults`, read at each call)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fakes.faults import commit, read_faults

from mmalign.types import MmalignError, Sample, Score, Value, digest


@dataclass(frozen=True)
class Config:
    faults: Path = Path("nowhere")
    version: int = 1
    judge: str = "eye"


@dataclass
class Brightness:
    config: Config
    name: str = "brightness"
    range: tuple[float, float] = (0.0, 1.0)

    @property
    def fingerprint(self) -> str:
        return digest("brightness", self.config.version, self.config.judge)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        faults = read_faults(self.config.faults / "faults.json")
        for sample in samples:
            commit(faults, sample.request.prompt.id, len(samples))
        time.sleep(float(faults.get("delay", 0.0)) * len(samples))
        if self.config.faults.is_dir():
            with open(self.config.faults / "calls.log", "a") as log:
                log.writelines(f"{sample.request.id}\n" for sample in samples)
        scores: list[Any] = [self._one(sample, faults.get(sample.request.prompt.id)) for sample in samples]
        return scores[1:] if "short" in {faults.get(sample.request.prompt.id) for sample in samples} else scores

    def _one(self, sample: Sample, fault: str | None) -> Any:
        x = float(np.asarray(sample.image).mean() / 255)
        broken = {"nan": Value(float("nan")), "inf": Value(0.5, {"bright": float("inf")}), "untyped": x, "text": Value("bright")}  # type: ignore[arg-type]
        return broken.get(fault or "", Value(x, {"bright": float(x > 0.5)}, detail=f"saw {x:.3f}"))


def load(config: Config, device: str = "cpu") -> Brightness:
    if config.judge == "absent":
        raise MmalignError("The weights of the judge 'absent' are missing. Run `mmalign doctor`.")
    return Brightness(config)
