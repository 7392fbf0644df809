"""Keeps transformers and diffusers importable beside a torchvision whose compiled part does not fit the installed torch.

transformers, diffusers and timm decide by torchvision's package metadata that it is there, import it, and die: the Python half of
torchvision registers meta kernels for operators that only its compiled half defines (pytorch/vision#9085, pytorch#157648). Defining the
two operators in plain torch lets the import through; nothing in mmalign needs more of torchvision. The package's `__init__` installs
`TorchvisionHook`, which does nothing until one of those libraries is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IMPORTERS = ("transformers", "diffusers", "peft", "timm", "open_clip", "torchvision")

_kept: list[Any] = []  # an operator library lives as long as its object


class TorchvisionHook:
    """A finder that finds nothing: it mends torchvision just before the first import of a library that would import it."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name in IMPORTERS and self in sys.meta_path:
            sys.meta_path.remove(self)
            ensure_torchvision()
        return None


def ensure_torchvision() -> bool:
    """Define torchvision's operators when its compiled part cannot be loaded. Returns whether that was necessary."""
    if "torchvision" in sys.modules or _kept:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False

    import torch

    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
        return False
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", nms, "CPU")
        _kept.append(library)
        return True


def nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression: boxes [N, 4] as x0, y0, x1, y1 and scores [N] -> kept indices, best first.

    A box goes when its intersection over union with a better kept box exceeds the threshold.
    """
    import torch

    area_N = (dets[:, 2] - dets[:, 0]) * (dets[:, 3] - dets[:, 1])
    order = scores.argsort(descending=True, stable=True)
    kept = []
    while order.numel():
        best, rest = order[0], order[1:]
        kept.append(best)
        overlap = (torch.minimum(dets[best, 2:], dets[rest, 2:]) - torch.maximum(dets[best, :2], dets[rest, :2])).clamp(min=0).prod(dim=1)
        order = rest[overlap <= iou_threshold * (area_N[best] + area_N[rest] - overlap)]
    return torch.stack(kept) if kept else order
