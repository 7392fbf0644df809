"""DeQA-Score in its own environment, for `mmalign serve`; the scorer `deqa` is its client.

Recipe (one GPU with 24 GB; the versions are the authors'). mmalign itself is installed without its dependencies:

    python3.11 -m venv deqa && . deqa/bin/activate
    pip install "torch==2.1.2" "transformers==4.36.1" "accelerate==0.21.0" "numpy<2"
    pip install pillow sentencepiece protobuf einops timm icecream
    pip install --no-deps mmalign && pip install pyyaml rich
    python -m mmalign serve --plug $(python -c "import mmalign.adapters as a; print(a.__path__[0])")/deqa_server.py \\
        --scorers deqa_server --device cuda --port 8191

The checkpoint runs code of its own (trust_remote_code), so `revision` should name a commit that you have read. The value is the
rating, 1 to 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.types import Failure, Sample, Score, Value, digest

NEEDS = ("environment: mmalign/adapters/deqa_server.py",)
VERSION = 1


@dataclass(frozen=True)
class Config:
    """`model`: hub id or folder; `revision`: a commit of it."""

    model: str = "zhiyuanyou/DeQA-Score-Mix3"
    revision: str = "main"
    batch_size: int = 8


def load(config: Config = Config(), device: str = "cuda") -> DeqaServer:
    import torch
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": True, "revision": config.revision, "attn_implementation": "eager", "torch_dtype": torch.float16}
    return DeqaServer(config, AutoModelForCausalLM.from_pretrained(config.model, device_map=device, **options))


class DeqaServer:
    """The loaded model, whose own `score` pads to a square with the mean colour and takes the expectation over the five words."""

    name = "deqa_server"
    range = (1.0, 5.0)

    def __init__(self, config: Config, model: Any) -> None:
        self.config, self.model = config, model
        commit = getattr(model.config, "_commit_hash", None) or config.revision
        self.fingerprint = digest("deqa_server", VERSION, config.model, commit)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One rating or failure per sample, in order."""
        from PIL import Image

        ratings: dict[int, float] = {}
        shown = [position for position, sample in enumerate(samples) if sample.image is not None]
        for start in range(0, len(shown), self.config.batch_size):
            batch = shown[start : start + self.config.batch_size]
            pictures: list[Any] = [samples[position].image for position in batch]
            found = self.model.score([Image.fromarray(picture) for picture in pictures])
            ratings |= dict(zip(batch, (float(rating) for rating in found), strict=True))
        none = Failure("score", "missing", "the sample holds no image")
        return [Value(ratings[position]) if position in ratings else none for position in range(len(samples))]
