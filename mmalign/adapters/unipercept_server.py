"""UniPercept in its own environment, for `mmalign serve`; the scorer `unipercept` is its client.

Recipe (one GPU with 24 GB; the package pins torch 2.8.0 and transformers 4.49.0). mmalign itself is installed without its dependencies:

    python3.11 -m venv unipercept && . unipercept/bin/activate
    pip install unipercept-reward==1.0.3
    pip install --no-deps mmalign && pip install pyyaml rich
    python -m mmalign serve --plug $(python -c "import mmalign.adapters as a; print(a.__path__[0])")/unipercept_server.py \\
        --scorers unipercept_server --device cuda --port 8192

The value is the mean of the three ratings; the parts are iaa, iqa and ista, 0 to 100 each, as the package names them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.types import Failure, Sample, Score, Value, digest

NEEDS = ("environment: mmalign/adapters/unipercept_server.py",)
VERSION = 1
RATINGS = ("iaa", "iqa", "ista")


@dataclass(frozen=True)
class Config:
    """`model`: hub id or folder; empty is the package's own choice."""

    model: str = ""


def load(config: Config = Config(), device: str = "cuda") -> UniPerceptServer:
    from importlib.metadata import version

    from unipercept_reward import UniPerceptRewardInferencer  # type: ignore[import-not-found,unused-ignore]

    options = {"model_path": config.model} if config.model else {}
    return UniPerceptServer(UniPerceptRewardInferencer(device=device, **options), version("unipercept-reward"), config.model)


class UniPerceptServer:
    """The loaded package, which reads images from files."""

    name = "unipercept_server"
    range = (0.0, 100.0)

    def __init__(self, inferencer: Any, release: str, model: str) -> None:
        self.inferencer = inferencer
        self.fingerprint = digest("unipercept_server", VERSION, release, model)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """Three ratings or a failure per sample, in order."""
        from mmalign.images import encode_png

        shown = [position for position, sample in enumerate(samples) if sample.image is not None]
        with tempfile.TemporaryDirectory(prefix="mmalign-") as folder:
            paths = [Path(folder) / f"{position}.png" for position in shown]
            for position, path in zip(shown, paths, strict=True):
                path.write_bytes(encode_png(samples[position].image))
            found = self.inferencer.reward(image_paths=[str(path) for path in paths]) if paths else []
        by_position = dict(zip(shown, found, strict=True))
        return [_rating(by_position.get(position), position in by_position) for position in range(len(samples))]


def _rating(found: Any, is_shown: bool) -> Score:
    if not is_shown:
        return Failure("score", "missing", "the sample holds no image")
    if not found:
        return Failure("score", "error", "unipercept-reward could not rate this image; its log says why")
    parts = {name: float(found[name]) for name in RATINGS}
    return Value(sum(parts.values()) / len(parts), parts)
