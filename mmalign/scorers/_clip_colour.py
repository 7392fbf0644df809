"""Which of ten colours an object has: GenEval's zero-shot CLIP classifier on masked crops.

Source: djghosh13/geneval evaluation/evaluate_images.py at af4902f and clip_benchmark 1.4.0 (zero_shot_classifier, run_classification).
Changed: float32 where the official run uses fp16 autocast, and the features' dot product always in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mmalign.images import clip_pixels
from mmalign.scorers._geneval_verdict import COLOURS, Detection
from mmalign.scorers._weights import tokenizer
from mmalign.scorers._whole import load_whole

if TYPE_CHECKING:
    import numpy as np
    import torch

BACKGROUND = (0x99, 0x99, 0x99)
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
MAX_TOKENS = 77


def crop(image_HWC: np.ndarray, detection: Detection) -> np.ndarray:
    """The object's box cut from the image, with everything outside its mask in grey #999."""
    import numpy as np

    if detection.mask is not None:
        image_HWC = np.where(detection.mask[..., None], image_HWC, np.array(BACKGROUND, np.uint8))
    left, top, right, bottom = (round(float(edge)) for edge in detection.box)
    return image_HWC[top:bottom, left:right]


@dataclass(frozen=True)
class Group:
    """Objects of one class in one image [H, W, 3], whose colours are asked."""

    image: np.ndarray
    name: str
    detections: Sequence[Detection]


class ColourClassifier:
    """A loaded CLIP with its ten-colour text classifiers, one per class name, made when first asked for."""

    def __init__(self, spec: str, device: str, dtype: str) -> None:
        from transformers import CLIPModel

        self.model = load_whole(CLIPModel, spec, device, dtype, "geneval.clip")
        self.tokenizer = tokenizer(spec, "geneval.clip")
        self._classifiers: dict[str, torch.Tensor] = {}

    @cached_property
    def is_official(self) -> bool:
        """Whether this has the architecture of OpenAI's ViT-L/14 (weights cannot be told apart by it; the fingerprint does)."""
        vision = self.model.config.vision_config
        sizes = vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size, vision.hidden_act
        return sizes == (1024, 24, 14, 224, "quick_gelu")

    def colours(self, groups: Sequence[Group], batch_size: int = 64) -> list[list[str] | FloatingPointError]:
        """The most similar colour of each object of each group; the earlier of COLOURS where two are equally similar.

        Crops of all groups share batches. A group one of whose logits is not finite gives the error in its place.
        """
        import torch
        from torch.nn import functional

        side = self.model.config.vision_config.image_size
        parameter = next(self.model.parameters())
        owners = [at for at, group in enumerate(groups) for _ in group.detections]
        crops = [clip_pixels(crop(group.image, detection), side) for group in groups for detection in group.detections]
        found: list[list[str] | FloatingPointError] = [[] for _ in groups]
        for start in range(0, len(crops), batch_size):
            x_BCHW = torch.cat(crops[start : start + batch_size])
            some = owners[start : start + batch_size]
            with torch.inference_mode():
                features_BD = self.model.get_image_features(pixel_values=x_BCHW.to(parameter.device, parameter.dtype)).pooler_output
                unit_BD = functional.normalize(features_BD.float(), dim=-1)
                classifiers_BDC = torch.stack([self._classifier(groups[at].name) for at in some])
                logits_BC = 100 * (unit_BD[:, None] @ classifiers_BDC)[:, 0]
            for at, is_finite, index in zip(some, logits_BC.isfinite().all(1).tolist(), logits_BC.argmax(1).tolist(), strict=True):
                known = found[at]
                if not is_finite:
                    found[at] = FloatingPointError("The colour logits of CLIP hold NaN or infinity")
                elif isinstance(known, list):
                    known.append(COLOURS[index])
        return found

    def _classifier(self, name: str) -> torch.Tensor:
        """[D, 10]: per colour the re-normalised mean of its templates' normalised embeddings."""
        import torch
        from torch.nn import functional

        if name not in self._classifiers:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            with torch.inference_mode():
                features = self.model.get_text_features(**tokens.to(next(self.model.parameters()).device)).pooler_output
            unit_CTD = functional.normalize(features.float(), dim=-1).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self._classifiers[name] = functional.normalize(unit_CTD.mean(1), dim=-1).T
        return self._classifiers[name]
