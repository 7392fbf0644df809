"""Which of ten colours an object has: GenEval's zero-shot CLIP classifier on masked crops.

Source: djghosh13/geneval evaluation/evaluate_images.py at af4902f and clip_benchmark 1.4.0 (zero_shot_classifier, run_classification).
Changed: float32 where the official run uses fp16 autocast, and the features' dot product always in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def colours(self, image_HWC: np.ndarray, name: str, detections: Sequence[Detection]) -> list[str]:
        """The most similar colour of each object; the earlier of COLOURS where two are equally similar."""
        import torch
        from torch.nn import functional

        if not detections:
            return []
        side = self.model.config.vision_config.image_size
        parameter = next(self.model.parameters())
        x_BCHW = torch.cat([clip_pixels(crop(image_HWC, detection), side) for detection in detections])
        with torch.inference_mode():
            features_BD = self.model.get_image_features(pixel_values=x_BCHW.to(parameter.device, parameter.dtype)).pooler_output
            logits_BC = 100 * functional.normalize(features_BD.float(), dim=-1) @ self._classifier(name)
        if not torch.isfinite(logits_BC).all():
            raise FloatingPointError("The colour logits of CLIP hold NaN or infinity")
        return [COLOURS[index] for index in logits_BC.argmax(1).tolist()]

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
