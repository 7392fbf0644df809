"""A scorer that runs somewhere else: `mmalign serve` on this or another machine, spoken to over HTTP.

An outage, a refused token or an unreadable answer is a typed failure after the retries, never a number. The identity is that of the scorer
served; if it changes during a run, the rest of the run fails. For a token, export MMALIGN_TOKEN or put it into .env.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from mmalign.config import Secret
from mmalign.remote import Client
from mmalign.scorers._samples import image_of
from mmalign.types import Failure, MmalignError, Sample, Score, UsageError, digest

NEEDS = ("endpoint",)
VERSION = 1


@dataclass(frozen=True)
class Config:
    """`url` of the server; `scorer`: which of those it serves (may be empty when it serves one); the rest as in remote.Client."""

    url: str = "http://127.0.0.1:8190"
    scorer: str = ""
    token: Secret = field(default_factory=lambda: Secret("MMALIGN_TOKEN"))
    timeout: float = 120.0
    retries: int = 5
    batch_size: int = 16
    concurrency: int = 4


def load(config: Config = Config(), device: str = "cpu") -> RemoteScorer:
    """Ask the server what it serves. The device is the server's."""
    return connect("remote", config, config.scorer)


def connect(name: str, config: Config, wanted: str) -> RemoteScorer:
    """The scorer `wanted` of the server, under the name `name` here; MmalignError when it does not serve it."""
    client = Client(config.url, config.token, config.timeout, config.retries)
    served = client.health()["scorers"]
    if not wanted and len(served) != 1:
        raise UsageError(f"The server at {config.url} serves {', '.join(sorted(served))}: choose one with --set {name}.scorer=NAME.")
    wanted = wanted or next(iter(served))
    if wanted not in served:
        raise MmalignError(f"The server at {config.url} does not serve '{wanted}'; it serves {', '.join(sorted(served)) or 'nothing'}.")
    low, high = served[wanted]["range"]
    limits = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
    return RemoteScorer(name, client, wanted, str(served[wanted]["fingerprint"]), limits, config.batch_size, config.concurrency)


@dataclass(frozen=True)
class RemoteScorer:
    """The client as a scorer. Batches go out `concurrency` at a time; the server joins those of several clients."""

    name: str
    client: Client
    scorer: str
    served_fingerprint: str
    range: tuple[float, float]
    batch_size: int
    concurrency: int

    @property
    def fingerprint(self) -> str:
        return digest("remote", VERSION, self.scorer, self.served_fingerprint)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order. An image that cannot be read is not sent."""
        scores: dict[int, Score] = {}
        for position, sample in enumerate(samples):
            pixels = image_of(sample) if sample.image is not None else None
            if isinstance(pixels, Failure):
                scores[position] = pixels
        sent = [position for position in range(len(samples)) if position not in scores]
        batches = [sent[start : start + self.batch_size] for start in range(0, len(sent), self.batch_size)]
        with ThreadPoolExecutor(max(1, min(self.concurrency, len(batches)))) as pool:
            answers = pool.map(
                lambda batch: self.client.score(self.scorer, self.served_fingerprint, [samples[at] for at in batch]), batches
            )
            for batch, answer in zip(batches, answers, strict=True):
                scores |= dict(zip(batch, answer, strict=True))
        return [scores[position] for position in range(len(samples))]
