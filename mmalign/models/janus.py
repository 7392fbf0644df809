"""Janus and Janus-Pro (DeepSeek): one autoregressive model that draws, describes and answers.

Papers: Janus (arXiv 2410.13848), Janus-Pro (arXiv 2501.17811). Loads the Hugging Face layout (deepseek-community/Janus-Pro-*,
`JanusForConditionalGeneration`) and the original one (deepseek-ai/Janus*, model_type multi_modality), of any size.
Weights: DeepSeek Model License (use restrictions).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.models._janus_layout import HUGGING_FACE, ORIGINAL, model_type
from mmalign.types import UsageError

if TYPE_CHECKING:
    from mmalign.models._janus_serve import JanusModel


@dataclass(frozen=True)
class Sampling:
    """Sampling settings with the official defaults; a checkpoint's generation_config.json may set another guidance.

    `task` is image (draw prompt.text), answer (reply to prompt.text about prompt.meta["images"], at most one) or choose (the letter of the
    likeliest of prompt.meta["options"] as that reply).
    With an `instruction` ({prompt} stands for the text) the model first writes its reasoning and then draws from both, as T2I-R1 does.
    """

    guidance: float = 5.0  # generation_inference.py of deepseek-ai/Janus: cfg_weight 5, temperature 1
    temperature: float = 1.0
    task: str = "image"
    answer_temperature: float = 0.0  # greedy, as inference.py there
    max_tokens: int = 512
    instruction: str = ""
    reasoning_temperature: float = 1.0
    reasoning_tokens: int = 256

    def __post_init__(self) -> None:
        if self.instruction and "{prompt}" not in self.instruction:
            raise ValueError(f"instruction must say where the prompt goes: '{self.instruction}' holds no {{prompt}}")


def recognises(path: Path) -> bool:
    """Whether the folder's config.json is a Janus of either layout."""
    return model_type(path) in (HUGGING_FACE, ORIGINAL)


def load(path: Path, *, device: str = "cpu", dtype: str = "float32", extra: Mapping[str, Path] | None = None) -> JanusModel:
    """The model in a folder, ready to draw. `dtype` is float32, bfloat16 or float16; Janus has no `extra` parts."""
    if extra:
        raise UsageError(f"Janus is whole in one folder; it takes no extra part, and got {', '.join(sorted(extra))}.")
    from mmalign.models._janus_serve import open_model

    return open_model(Path(path), Sampling(), device, dtype)
