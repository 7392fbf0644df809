"""Size of the image as JPEG of quality 95, in kilobytes of 1000 bytes: a measure of detail that is easy to train towards, either way.

Black et al., arXiv 2305.13301; yifan123/flow_grpo flow_grpo/rewards.py at ac4c86e. `direction`: "large" is their incompressibility, the
size itself; "small" is their compressibility, -size / 500 (the earlier ddpo-pytorch has -size). No weights; the encoder is Pillow's,
default subsampling.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmalign.scorers._samples import Item, score_in_batches
from mmalign.types import Sample, Score, Value, digest

VERSION = 1
QUALITY = 95


@dataclass(frozen=True)
class Config:
    direction: Literal["large", "small"] = "large"


def load(config: Config = Config(), device: str = "cpu") -> JpegSize:
    """The encoder runs on the CPU whatever the device."""
    return JpegSize(config)


@dataclass(frozen=True)
class JpegSize:
    config: Config
    name: str = "jpeg_size"

    @property
    def range(self) -> tuple[float, float]:
        return (0.0, float("inf")) if self.config.direction == "large" else (float("-inf"), 0.0)

    @property
    def fingerprint(self) -> str:
        return digest(self.name, VERSION, self.config)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, 1, self._measure, text=None)

    def _measure(self, items: Sequence[Item]) -> list[Value]:
        sizes = [_kilobytes(item) for item in items]
        return [Value(size if self.config.direction == "large" else -size / 500, {"kilobytes": size}) for size in sizes]


def _kilobytes(item: Item) -> float:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(item.pixels).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000
