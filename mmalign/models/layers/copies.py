"""Files of a checkpoint that training does not change, put beside what it did change."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def place(source: Path, target: Path) -> None:
    """A file or folder under another path: hard links where the file system allows (a decoder of 24 GB costs nothing), else copies.

    Nothing here writes into a weight file in place, so linked checkpoints cannot change one another.
    """
    if source.is_dir():
        for child in sorted(source.iterdir()):
            place(child, target / child.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)
