"""How well a unified model understands a picture as its prompt: the geometric mean of the prompt's token probabilities (GvU's reward).

Paper: GvU (arXiv 2603.06043), eq. 4-5: P(T|I) = exp((1/L) sum_j ln p(T_j | instruction, I, T_<j)), by teacher forcing. As a metric it is
judged by a fixed checkpoint; as GvU's reward it is judged by the model in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mmalign import hub, registry
from mmalign.scorers._samples import Item, score_in_batches
from mmalign.types import Sample, Score, UsageError, Value, digest

VERSION = 1
NEEDS = ("weights: a unified model with an understanding branch, such as the bundled tiny-janus",)


@dataclass(frozen=True)
class Config:
    """`model` is any checkpoint that answers about pictures; `question` precedes the prompt's text."""

    model: str = "tiny-janus"
    question: str = "Describe the image."
    mean: Literal["geometric", "product", "arithmetic"] = "geometric"


class SelfUnderstanding:
    """A loaded judge."""

    name = "self_understanding"
    range = (0.0, 1.0)

    def __init__(self, config: Config, model: Any) -> None:
        self.config, self.model = config, model
        self.fingerprint = digest(self.name, VERSION, asdict(config), model.fingerprint)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        # One picture at a time: padding of a neighbour must not move a value in its last bits.
        return score_in_batches(samples, 1, lambda items: [Value(self._probability(item)) for item in items])

    def _probability(self, item: Item) -> float:
        import torch

        from mmalign.grpo import sequence_probability

        with torch.no_grad():
            log_prob, mask = self.model.text_log_prob([self.config.question], [item.pixels], [item.text])
        return float(sequence_probability(log_prob.double(), mask, self.config.mean)[0])


def load(config: Config = Config(), device: str = "cpu") -> SelfUnderstanding:
    spec = hub.resolve_model(config.model)
    model = registry.load(registry.find("models", spec.family)).load(spec.path, device=device)
    if "answer" not in model.capabilities:
        raise UsageError(f"self_understanding.model={config.model}: a {spec.family} cannot be asked about pictures.")
    return SelfUnderstanding(config, model)
