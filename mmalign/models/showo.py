"""Show-o (Show Lab): one transformer that reads text causally and draws by filling in masked image tokens.

Paper: Show-o (arXiv 2408.12528). Loads showlab/show-o and showlab/show-o-512x512 with, beside them, microsoft/phi-1_5 (sizes of the
trunk and the tokenizer) and showlab/magvitv2 (image tokenizer), given as --model-extra phi-1_5=PATH --model-extra magvitv2=PATH or as
folders of these names inside the checkpoint. The variant with a CLIP tower is not supported. Licence: Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.models.layers.extras import config_of
from mmalign.models.layers.generation import checkpoint_settings

if TYPE_CHECKING:
    from mmalign.models._showo_serve import ShowoModel


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults are those of the official instructions (showlab/Show-o at 45a5a2d: guidance_scale 5, 50 steps).

    `guidance` w mixes u + w (c - u) as everywhere here, so it is the official guidance_scale plus 1. `temperature` divides the logits that
    codes are drawn from, `order_noise` (officially "temperature") scales the noise that decides which codes are kept. `task` is image
    (draw prompt.text) or answer (reply to prompt.text about prompt.meta["images"], at most one).
    """

    guidance: float = 6.0
    temperature: float = 1.0
    steps: int = 50
    order_noise: float = 1.0
    task: str = "image"
    answer_temperature: float = 0.0  # greedy: the official top_k is 1
    max_tokens: int = 100


def recognises(path: Path) -> bool:
    """Whether the folder's config.json is a Show-o's."""
    return config_of(path).get("_class_name") == "Showo"


def load(path: Path, *, device: str = "cpu", dtype: str = "float32", extra: Mapping[str, Path] | None = None) -> ShowoModel:
    """The model in a folder, ready to draw. `dtype` is that of the trunk; the image tokenizer stays in float32."""
    from mmalign.models._showo_serve import open_model

    return open_model(Path(path), checkpoint_settings(Path(path), Sampling()), device, dtype, extra or {})
