"""OpenUni (S-Lab): learned queries behind a frozen InternVL3 that tell SANA what to draw.

Paper: OpenUni (arXiv 2505.23661). A checkpoint is an overlay file (wusize/openuni: openuni_b_... for 1.6B, openuni_l_... for 3.6B) over
three repositories: OpenGVLab/InternVL3-1B or -2B (--model-extra internvl3=PATH), the SANA it was trained with (--model-extra sana=PATH)
and mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers (--model-extra dc-ae=PATH), or folders of these names inside the checkpoint. The file's
folder has no config, so it is given as openuni:FOLDER. Editing is not supported. Licence of overlay and official code: S-Lab 1.0,
non-commercial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.models.layers.extras import config_of

if TYPE_CHECKING:
    from mmalign.models._openuni_serve import OpenUniModel


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults are those of the official script (wusize/OpenUni at d1703fc, scripts/text2image.py).

    `task` is image (draw prompt.text) or answer (InternVL3 replies to prompt.text about prompt.meta["images"], at most one).
    """

    steps: int = 20
    guidance: float = 4.5
    task: str = "image"
    answer_temperature: float = 0.0
    max_tokens: int = 1024


def recognises(path: Path) -> bool:
    """Whether the folder's config.json is an OpenUni's, as a saved one's is."""
    return config_of(path).get("model_type") == "openuni"


def load(path: Path, *, device: str = "cpu", dtype: str = "float32", extra: Mapping[str, Path] | None = None) -> OpenUniModel:
    """The model in a folder, ready to draw. `dtype` is that of all but the image coder, which stays in float32."""
    from mmalign.models._openuni_serve import open_model

    return open_model(Path(path), Sampling(), device, dtype, extra or {})
