"""Probability that an image is unsuitable for work, by a ViT classifier (0 to 1, higher is worse).

Falconsai/nsfw_image_detection on the hub: ViT-B/16 with two labels, softmax, the probability of the label called nsfw. Image: squashed to
the processor's size by its filter (bilinear), its mean and deviation. Best as a gate or as part of `safety`: as a metric, low is good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from mmalign.images import Filter
from mmalign.reach import hub_fault, is_cache_only
from mmalign.scorers import _weights
from mmalign.scorers._preprocess import Squash, Triple
from mmalign.scorers._samples import Item, score_in_batches
from mmalign.scorers._whole import load_whole
from mmalign.types import MmalignError, Sample, Score, Value, digest

if TYPE_CHECKING:
    import torch

NEEDS = ("weights: Falconsai/nsfw_image_detection",)
VERSION = 1
FILTERS: dict[int, Filter] = {0: "pil-nearest", 1: "pil-lanczos", 2: "pil-bilinear", 3: "pil-bicubic"}  # PIL's numbers in processor files


@dataclass(frozen=True)
class Config:
    """`model`: folder or hub id of a ViT classifier; `label`: the class whose probability is the score."""

    model: str = "Falconsai/nsfw_image_detection"
    label: str = "nsfw"
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


def load(config: Config = Config(), device: str = "cpu") -> NsfwScorer:
    from transformers import ViTForImageClassification

    model = load_whole(ViTForImageClassification, config.model, device, config.dtype, "nsfw.model")
    labels = [str(model.config.id2label[index]).lower() for index in range(model.config.num_labels)]
    if config.label.lower() not in labels:
        raise MmalignError(f"The classifier '{config.model}' has no label '{config.label}'; it has {', '.join(labels)}.")
    preprocess = preprocess_of(config.model)
    fingerprint = digest("nsfw", VERSION, config.label.lower(), _weights.fingerprint_tensors(model), preprocess)
    return NsfwScorer(model, preprocess, labels.index(config.label.lower()), fingerprint, config.batch_size)


def preprocess_of(spec: str) -> Squash:
    """The squash that the checkpoint's processor file describes."""
    from transformers import ViTImageProcessorPil

    try:
        processor = ViTImageProcessorPil.from_pretrained(spec, local_files_only=is_cache_only(spec))
    except OSError as error:
        raise MmalignError(f"The classifier '{spec}' (nsfw.model) has no preprocessor_config.json: {hub_fault(error, spec)}") from error
    size, resample = dict(processor.size), int(processor.resample)
    if not {"height", "width"} <= size.keys() or resample not in FILTERS:
        raise MmalignError(f"The processor of '{spec}' resizes to {size} by filter {resample}; expected height, width and filter 0 to 3.")
    mean, deviation = (cast(Triple, tuple(values)) for values in (processor.image_mean, processor.image_std))
    return Squash((size["height"], size["width"]), FILTERS[resample], mean, deviation)


@dataclass(frozen=True)
class NsfwScorer:
    model: Any
    preprocess: Squash
    index: int
    fingerprint: str
    batch_size: int
    name: str = "nsfw"
    range: tuple[float, float] = (0.0, 1.0)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, self.batch_size, self._measure, text=None)

    def _measure(self, items: Sequence[Item]) -> list[Value]:
        import torch

        with torch.no_grad():
            probability_B = self._probability(self.preprocess.images([item.pixels for item in items]))
        return [Value(probability) for probability in probability_B.tolist()]

    def _probability(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        like = self.model.classifier.weight
        return self.model(pixel_values=x_BCHW.to(like.device, like.dtype)).logits.float().softmax(-1)[:, self.index]
