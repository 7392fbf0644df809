"""Share of a prompt's facts that a picture of the shapes world fulfils, read by the exact oracle (0 to 1).

Its heat map is the truth that attribution is held against: 1 on the pixels of things whose shape the prompt names, 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from mmalign.scorers._rows import buckets
from mmalign.scorers._samples import image_of
from mmalign.testbed import oracle
from mmalign.testbed.world import clauses_of, facts, strict
from mmalign.types import Failure, Prompt, Sample, Score, Value, digest

VERSION = 1
TOGETHER = 256  # pictures read at once


@dataclass(frozen=True)
class Config:
    """`form`: share = satisfied facts / facts; strict = 1 only when every fact holds and nothing else is in the picture; exact = satisfied
    facts / (facts + things of shapes not asked for + unreadable cells), which is 1 where strict is and sees what share does not."""

    form: Literal["share", "strict", "exact"] = "share"


@dataclass(frozen=True)
class ShapesScorer:
    config: Config
    name: str = "shapes"
    range: tuple[float, float] = (0.0, 1.0)

    @property
    def fingerprint(self) -> str:
        return digest(self.name, VERSION, asdict(self.config))

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order; pictures of one size are read together."""
        images = [self._image(sample) for sample in samples]
        scores: list[Score] = [image if isinstance(image, Failure) else Value(0.0) for image in images]
        shown = [(at, image) for at, image in enumerate(images) if not isinstance(image, Failure)]
        for group in buckets([image.shape for _, image in shown], TOGETHER):
            readings = oracle.read(np.stack([shown[position][1] for position in group]))
            for position, reading in zip(group, readings, strict=True):
                at, image = shown[position]
                scores[at] = self._judge(samples[at].request.prompt, image, reading)
        return scores

    def _image(self, sample: Sample) -> np.ndarray | Failure:
        prompt = sample.request.prompt
        if "include" not in prompt.meta:
            return Failure("score", "missing", f"prompt {prompt.id!r} states no facts: its meta has no 'include' list of clauses")
        return image_of(sample)

    def _judge(self, prompt: Prompt, image: np.ndarray, reading: oracle.Reading) -> Value:
        clauses = clauses_of(prompt)
        verdicts = facts(clauses, reading.scene)
        share = sum(verdicts.values()) / len(verdicts)
        is_strict = float(strict(clauses, reading.scene, reading.unclear))
        wrong = [name for name, holds in verdicts.items() if not holds]
        surplus = len(reading.scene) - sum(clause.count for clause in clauses)
        notes = wrong + ([f"{surplus:+d} things"] if surplus else []) + ([f"{reading.unclear} unclear"] if reading.unclear else [])
        asked = {clause.shape for clause in clauses}
        strange = sum(thing.shape not in asked for thing in reading.scene) + reading.unclear
        forms = {"share": share, "strict": is_strict, "exact": sum(verdicts.values()) / (len(verdicts) + strange)}
        return Value(
            x=forms[self.config.form],
            parts={"share": share, "strict": is_strict},
            heatmap=oracle.truth(image, reading.scene, asked),
            detail="; ".join(notes) or "all facts hold",
        )


def load(config: Config = Config(), device: str = "cpu") -> ShapesScorer:
    """The oracle runs on the CPU whatever the device."""
    return ShapesScorer(config)
