"""BAGEL (ByteDance Seed): one language model of two experts that answers by text and draws by flow matching inside itself.

Paper: BAGEL (arXiv 2505.14683). Loads ByteDance-Seed/BAGEL-7B-MoT: llm_config.json, vit_config.json, ema.safetensors, ae.safetensors and
the tokenizer in one folder. Licence: Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.types import UsageError

if TYPE_CHECKING:
    from mmalign.models._bagel_serve import BagelModel

CONFIGS = ("llm_config.json", "vit_config.json")


@dataclass(frozen=True)
class Sampling:
    """Sampling settings with the official defaults (ByteDance-Seed/Bagel at 056b5fd, inferencer.py).

    `steps` are the intervals of the schedule: the official num_timesteps counts their ends, so its 50 is 49 here. Guidance acts at times t
    with `guided_from` < t <= `guided_to` (1 is noise); the guided velocity is then shortened to the length of the plain one, but to no
    less than `renorm_min` of itself. The official GenEval script (eval/gen/gen_images_mp.py) guides every step: guided_from 0. A prompt
    is cut at `tokens`. `task` is image (draw prompt.text), answer (reply to prompt.text about prompt.meta["images"], at most one) or
    choose.
    """

    steps: int = 49
    guidance: float = 4.0
    guided_from: float = 0.4
    guided_to: float = 1.0
    renorm_min: float = 0.0
    tokens: int = 256
    task: str = "image"
    answer_temperature: float = 0.0
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.steps < 1 or self.tokens < 3:
            raise ValueError(f"sampling needs at least one step and three tokens, got steps {self.steps}, tokens {self.tokens}")


def recognises(path: Path) -> bool:
    """Whether the folder has BAGEL's two configs."""
    return all((Path(path) / name).is_file() for name in CONFIGS)


def load(path: Path, *, device: str = "cpu", dtype: str = "float32", extra: Mapping[str, Path] | None = None) -> BagelModel:
    """The model in a folder, ready to draw. `dtype` is the language model's and the vision tower's; the autoencoder stays in float32."""
    if extra:
        raise UsageError(f"BAGEL is whole in one folder; it takes no extra part, and got {', '.join(sorted(extra))}.")
    from mmalign.models._bagel_serve import open_model

    return open_model(Path(path), Sampling(), device, dtype)
