"""PickScore: a CLIP-H trained on people's choices between two images; exp(logit scale) times the cosine.

Paper: Kirstain et al., arXiv 2305.01569; yuvalkirstain/PickScore at f79607f. The preference among images of one prompt is the softmax over
their scores; values lie around 16 to 26. `scale` = "flow-grpo" divides by 26, as yifan123/flow_grpo at ac4c86e does. Tokenizer and
preprocessing are those of laion's ViT-H-14, as the authors say. Changed: a row-wise dot product where Flow-GRPO takes the diagonal of all
pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmalign.scorers import _clip
from mmalign.scorers._clip_scorer import ClipScorer, cosine
from mmalign.scorers._weights import tokenizer
from mmalign.scorers._whole import load_whole
from mmalign.types import digest

NEEDS = ("weights: yuvalkirstain/PickScore_v1", "weights: laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
VERSION = 1
DIVISOR = {"logit": 1.0, "flow-grpo": 26.0}


@dataclass(frozen=True)
class Config:
    """`model`: folder or hub id of the CLIPModel; `processor`: of its tokenizer and image processor; `scale`: see above."""

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    scale: Literal["logit", "flow-grpo"] = "logit"
    batch_size: int = 16
    dtype: _clip.Dtype = "float32"


def load(config: Config = Config(), device: str = "cpu") -> ClipScorer:
    from transformers import CLIPModel

    model = load_whole(CLIPModel, config.model, device, config.dtype, "pickscore.model").requires_grad_(False)
    option = "pickscore.processor"
    preprocess = _clip.preprocess_of(config.processor, model, option, rounding="down")
    clip = _clip.Clip(model, tokenizer(config.processor, option), preprocess)
    factor = clip.logit_scale / DIVISOR[config.scale]
    fingerprint = digest("pickscore", VERSION, config.scale, clip.fingerprint)
    return ClipScorer(
        "pickscore",
        (-factor, factor),
        fingerprint,
        clip,
        lambda image_BD, text_BD: factor * cosine(image_BD, text_BD),
        config.batch_size,
    )
