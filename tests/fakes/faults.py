"""Faults that the test model and scorer commit when a file asks for them."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_faults(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def commit(faults: Mapping[str, Any], place: str, batch: int) -> None:
    """Do what is asked for this prompt id (or `load`): raise, out of memory, hang, a hang that holds the interpreter, die."""
    fault = faults.get(place)
    if fault == "raise":
        raise ValueError(f"no luck with {place}; key {os.environ.get('CANARY_KEY', '')}")
    if fault == "oom" or (fault == "oom in batches" and batch > 1):
        raise MemoryError("out of memory")
    if fault == "hang":
        time.sleep(3600)
    if fault == "spin":
        re.match(r"(a+)+$", "a" * 64 + "b")  # exponential, and never lets another thread run
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
