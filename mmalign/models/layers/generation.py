"""How a checkpoint of Show-o's kind says it wants to be sampled from: three numbers in its generation_config.json.

Names and counting are those of the official scripts (showlab/Show-o at 45a5a2d, Gen-Verse/MMaDA at 3cdb870): `guidance_scale`, which is
`guidance` minus 1, `generation_timesteps` and `generation_temperature`, the noise of the order. The released checkpoints set none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmalign.types import MmalignError

FILE = "generation_config.json"
NAMES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "guidance": ("guidance_scale", lambda scale: 1 + float(scale)),
    "steps": ("generation_timesteps", int),
    "order_noise": ("generation_temperature", float),
}


def checkpoint_settings(folder: Path, sampling: Any) -> Any:
    """The sampling settings with those that the folder sets; MmalignError when its file is damaged."""
    file = folder / FILE
    if not file.is_file():
        return sampling
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        given = {name: kind(content[official]) for name, (official, kind) in NAMES.items() if content.get(official) is not None}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise MmalignError(f"{file} does not say how to sample: {error}. Download it again, or remove it.") from error
    return replace(sampling, **given)


def write_settings(folder: Path, guidance: float, steps: int) -> None:
    """Makes these the folder's settings."""
    content = {"guidance_scale": guidance - 1, "generation_timesteps": steps}
    (folder / FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")
