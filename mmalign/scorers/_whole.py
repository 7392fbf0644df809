"""Load a network only if it is whole: a checkpoint with missing weights would run, and score at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmalign.reach import hub_fault, is_cache_only
from mmalign.types import MmalignError


def load_whole(cls: Any, spec: str, device: str, dtype: str, option: str, may_lack: Sequence[str] = ()) -> Any:
    """A transformers model of class `cls` from a folder or a hub id, in evaluation mode.

    `option` is the setting to correct (named in errors); `may_lack` are parts of names whose absence is harmless. MmalignError when the
    checkpoint cannot be had (offline, absent, damaged, of another kind), or lacks a weight, or has one of another shape.
    """
    import torch

    advice = f"Give a folder or a hub id with --set {option}=PATH; `hf download {spec}` on a machine that is online fills the cache."
    try:
        model, info = cls.from_pretrained(spec, output_loading_info=True, local_files_only=is_cache_only(spec))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise MmalignError(f"The {cls.__name__} '{spec}' cannot be loaded: {hub_fault(error, spec)} {advice}") from error
    missing = [key for key in info["missing_keys"] if not any(part in key for part in may_lack)]
    if missing or info["mismatched_keys"]:
        raise MmalignError(
            f"The {cls.__name__} '{spec}' is not whole: {len(missing)} weights are missing (such as {next(iter(missing), 'none')}) and "
            f"{len(info['mismatched_keys'])} have another shape. They would be random, and so would every score. {advice}"
        )
    return model.to(device=device, dtype=getattr(torch, dtype)).eval()
