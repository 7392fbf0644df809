"""UniPercept: a VLM's ratings of an image's aesthetics, quality, and structure and texture (0 to 100 each); served.

Paper: arXiv 2512.21675; thunderbolt215/UniPercept at 34660ff, package unipercept-reward 1.0.3, which pins torch 2.8 and transformers 4.49:
it runs in an environment of its own (recipe: mmalign/adapters/unipercept_server.py) behind `mmalign serve`, and this is its client. A
rating is the expectation over the 101 two-letter tokens that stand for 0 to 100. The value is one rating, or the mean of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mmalign.config import Secret
from mmalign.scorers import remote
from mmalign.types import Failure, Sample, Score, Value, digest

NEEDS = ("endpoint",)
VERSION = 1
SERVED = "unipercept_server"
RATINGS = {"aesthetics": "iaa", "quality": "iqa", "structure": "ista"}


@dataclass(frozen=True)
class Config:
    """Where the server is (see the scorer `remote`), and which `rating` is the value."""

    url: str = "http://127.0.0.1:8192"
    rating: Literal["mean", "aesthetics", "quality", "structure"] = "mean"
    token: Secret = field(default_factory=lambda: Secret("MMALIGN_TOKEN"))
    timeout: float = 300.0
    retries: int = 5


def load(config: Config = Config(), device: str = "cpu") -> UniPercept:
    link = remote.Config(url=config.url, token=config.token, timeout=config.timeout, retries=config.retries)
    return UniPercept(remote.connect("unipercept", link, SERVED), config.rating)


@dataclass(frozen=True)
class UniPercept:
    """The client as a scorer. Parts: the three ratings."""

    served: remote.RemoteScorer
    rating: str = "mean"
    name: str = "unipercept"
    range: tuple[float, float] = (0.0, 100.0)

    @property
    def fingerprint(self) -> str:
        return digest("unipercept", VERSION, self.rating, self.served.fingerprint)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return [self._chosen(score) if isinstance(score, Value) else score for score in self.served.score(samples)]

    def _chosen(self, value: Value) -> Score:
        absent = [part for part in RATINGS.values() if part not in value.parts]
        if absent:
            return Failure("score", "parse", f"The server gave no '{absent[0]}' rating, only {sorted(value.parts)}.")
        parts = {name: value.parts[part] for name, part in RATINGS.items()}
        return replace(value, x=parts.get(self.rating, sum(parts.values()) / len(parts)), parts=parts)
