"""mmalign: evaluate and align text-to-image and unified multimodal models."""

import sys as _sys
from pathlib import Path as _Path

from mmalign.shim import TorchvisionHook as _TorchvisionHook

__version__ = "0.1.0"

# In a checkout, evaluators/, trainers/ and leaderboards/ stand beside this package and not inside it; an installed wheel has them inside.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "evaluators").is_dir():
    __path__.append(str(_root))

_sys.meta_path.insert(0, _TorchvisionHook())
