"""A plug-in reward for tests: the mean of the red channel, with prompts that ask for it to fail or to be no number."""

from dataclasses import dataclass

import numpy as np

from mmalign.types import Failure, Value


@dataclass(frozen=True)
class Config:
    broken: bool = False


@dataclass(frozen=True)
class Redness:
    config: Config
    name: str = "redness"
    fingerprint: str = "redness-1"
    range: tuple[float, float] = (0.0, 1.0)

    def score(self, samples):
        if self.config.broken:
            return [Failure("score", "error", "redness is broken on purpose") for _ in samples]
        return [Value(float(np.asarray(sample.image, np.float64)[..., 0].mean() / 255)) for sample in samples]


def load(config=Config(), device="cpu"):
    return Redness(config)
