"""HPSv2: human preference as the cosine of a CLIP-H tuned on people's rankings; versions 2.0 and 2.1.

Paper: Wu et al., arXiv 2306.09341; tgxs002/HPSv2 hpsv2/img_score.py at 866735e. The score is the raw cosine, without logit scale, about
0.20 to 0.35; tables print it times 100. Versions are not comparable with each other, nor are scores of different prompts. Images go
through HPSv2's own preprocessing (`_preprocess.PadSquare`), not CLIP's. The official package scores with 2.0 by default, its table and
T2I-R1 use 2.1, which is the default here. Changed: the file is loaded once, images are batched, and the dot product is float32, where
autocast's half precision quantises a score of 0.28 by 0.0005.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmalign.scorers import _clip
from mmalign.scorers._clip_scorer import ClipScorer, cosine
from mmalign.scorers._preprocess import PadSquare
from mmalign.scorers._weights import official_file, tokenizer
from mmalign.types import digest

NEEDS = ("weights: xswu/HPSv2", "weights: laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
VERSION = 1
FILES = {"2.0": "xswu/HPSv2:HPS_v2_compressed.pt", "2.1": "xswu/HPSv2:HPS_v2.1_compressed.pt"}


@dataclass(frozen=True)
class Config:
    """`weights`: the official .pt file, by default that of `version` on the hub; `tokenizer`: any with CLIP's vocabulary.

    `antialias`: whether shrinking is antialiased, as today's torchvision does and the environment of the published scores did not.
    """

    version: Literal["2.0", "2.1"] = "2.1"
    weights: str | None = None
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    antialias: bool = True
    batch_size: int = 16
    dtype: _clip.Dtype = "float32"


def load(config: Config = Config(), device: str = "cpu") -> ClipScorer:
    path = official_file(config.weights or FILES[config.version], "hpsv2.weights")
    words = tokenizer(config.tokenizer, "hpsv2.tokenizer")
    clip = _clip.load_open_clip(path, words, lambda side: PadSquare(side, config.antialias), device, config.dtype)
    fingerprint = digest("hpsv2", VERSION, config.version, clip.fingerprint)
    return ClipScorer("hpsv2", (-1.0, 1.0), fingerprint, clip, cosine, config.batch_size)
