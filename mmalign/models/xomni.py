"""X-Omni (Tencent Hunyuan): one autoregressive model of text and semantic image tokens; a FLUX decoder makes the pixels.

Paper: X-Omni (arXiv 2507.22058). Loads X-Omni/X-Omni-{En,Zh,SFT,PT} (model_type x-omni; its remote code is never run) with, beside it, the
folder of black-forest-labs/FLUX.1-dev, of which text encoders, image coder and schedule are used: --model-extra flux=PATH, or a folder
`flux` inside the checkpoint. Licence: Apache-2.0; FLUX.1-dev is non-commercial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.models.layers.extras import config_of

if TYPE_CHECKING:
    from mmalign.models._xomni_serve import XOmniModel

MODEL_TYPE = "x-omni"


@dataclass(frozen=True)
class Sampling:
    """Sampling settings with the defaults of the official generate.py (X-Omni-Team/X-Omni at 2b8237b).

    A code less probable than `min_p` times the most probable one is never drawn, nor, unless `top_k` is 0, one outside the `top_k` most
    probable. That script leaves top_k to transformers 4.51, which means 50; here nothing is cut off that is not asked for. `task` is image
    (draw prompt.text), answer (reply to prompt.text about prompt.meta["images"], at most one) or choose. With an `instruction` ({prompt}
    stands for the text) the model first writes its reasoning and then draws from both.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    min_p: float = 0.03
    top_k: int = 0
    task: str = "image"
    answer_temperature: float = 0.0  # greedy, as chat.py there
    max_tokens: int = 512
    instruction: str = ""
    reasoning_temperature: float = 1.0
    reasoning_tokens: int = 256

    def __post_init__(self) -> None:
        if self.instruction and "{prompt}" not in self.instruction:
            raise ValueError(f"instruction must say where the prompt goes: '{self.instruction}' holds no {{prompt}}")


def recognises(path: Path) -> bool:
    """Whether the folder's config.json is an X-Omni's."""
    return config_of(path).get("model_type") == MODEL_TYPE


def load(path: Path, *, device: str = "cpu", dtype: str = "float32", extra: Mapping[str, Path] | None = None) -> XOmniModel:
    """The model in a folder, ready to draw. `dtype` is the trunk's; tokenizer and decoder run in what the config's vision_config says."""
    from mmalign.models._xomni_serve import open_model

    return open_model(Path(path), Sampling(), device, dtype, extra or {})
