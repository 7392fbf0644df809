"""Share of a prompt's facts that a picture of the shapes world fulfils, read by the exact oracle (0 to 1).

Its heat map is the truth that attribution is held against: 1 on the pixels of things whose shape the prompt names, 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from mmalign.scorers._samples import image_of
from mmalign.testbed import oracle
from mmalign.testbed.world import clauses_of, facts, strict
from mmalign.types import Failure, Sample, Score, Value, digest

VERSION = 1


@dataclass(frozen=True)
class Config:
    """`form`: share = satisfied facts / facts; strict = 1 only when every fact holds and nothing else is in the picture."""

    form: Literal["share", "strict"] = "share"


@dataclass(frozen=True)
class ShapesScorer:
    config: Config
    name: str = "shapes"
    range: tuple[float, float] = (0.0, 1.0)

    @property
    def fingerprint(self) -> str:
        return digest(self.name, VERSION, asdict(self.config))

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Score:
        prompt = sample.request.prompt
        if "include" not in prompt.meta:
            return Failure("score", "missing", f"prompt {prompt.id!r} states no facts: its meta has no 'include' list of clauses")
        image = image_of(sample)
        if isinstance(image, Failure):
            return image
        clauses = clauses_of(prompt)
        (reading,) = oracle.read(image[None])
        verdicts = facts(clauses, reading.scene)
        share = sum(verdicts.values()) / len(verdicts)
        is_strict = float(strict(clauses, reading.scene, reading.unclear))
        wrong = [name for name, holds in verdicts.items() if not holds]
        surplus = len(reading.scene) - sum(clause.count for clause in clauses)
        notes = wrong + ([f"{surplus:+d} things"] if surplus else []) + ([f"{reading.unclear} unclear"] if reading.unclear else [])
        return Value(
            x=share if self.config.form == "share" else is_strict,
            parts={"share": share, "strict": is_strict},
            heatmap=oracle.truth(image, reading.scene, {clause.shape for clause in clauses}),
            detail="; ".join(notes) or "all facts hold",
        )


def load(config: Config = Config(), device: str = "cpu") -> ShapesScorer:
    """The oracle runs on the CPU whatever the device."""
    return ShapesScorer(config)
