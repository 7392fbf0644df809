"""DeQA-Score: how a VLM trained on ratings of image quality rates an image, between bad and excellent (0.2 to 1); served.

Paper: You et al., arXiv 2501.11561; zhiyuanyou/DeQA-Score at 8e4abc8. The model is mPLUG-Owl2 with code of its own for an old transformers:
it runs in an environment of its own (recipe: mmalign/adapters/deqa_server.py) behind `mmalign serve`, and this is its client. The served
value is the expectation over excellent, good, fair, poor, bad as 5 to 1 (part `rating`); the value here is that over 5, as in Flow-GRPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mmalign.config import Secret
from mmalign.scorers import remote
from mmalign.types import Sample, Score, Value, digest

NEEDS = ("endpoint",)
VERSION = 1
SERVED = "deqa_server"


@dataclass(frozen=True)
class Config:
    """Where the server is; see the scorer `remote`."""

    url: str = "http://127.0.0.1:8191"
    token: Secret = field(default_factory=lambda: Secret("MMALIGN_TOKEN"))
    timeout: float = 120.0
    retries: int = 5


def load(config: Config = Config(), device: str = "cpu") -> Deqa:
    link = remote.Config(url=config.url, token=config.token, timeout=config.timeout, retries=config.retries)
    return Deqa(remote.connect("deqa", link, SERVED))


@dataclass(frozen=True)
class Deqa:
    """The client as a scorer."""

    served: remote.RemoteScorer
    name: str = "deqa"
    range: tuple[float, float] = (0.2, 1.0)

    @property
    def fingerprint(self) -> str:
        return digest("deqa", VERSION, self.served.fingerprint)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        scores = self.served.score(samples)
        return [replace(score, x=score.x / 5, parts={"rating": score.x}) if isinstance(score, Value) else score for score in scores]
