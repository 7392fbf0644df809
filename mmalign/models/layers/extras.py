"""The further folders and files that a checkpoint needs: named with --model-extra, or lying inside the checkpoint under the same name.

Standard library only: families read configs with it before anything heavy is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.types import UsageError


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's config.json; {} when there is none or it cannot be read."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def extra_folders(path: Path, extra: Mapping[str, Path], needed: Mapping[str, str]) -> dict[str, Path]:
    """The folder of each needed part: as given, else inside the checkpoint. `needed` says what each part is, for the errors.

    UsageError when a part is missing, its folder does not exist, or a part is given that the family does not know.
    """
    check_extras(extra, needed)
    found = {}
    for name, what in needed.items():
        folder = Path(extra[name]).expanduser() if name in extra else path / name
        if not folder.is_dir():
            reason = f"--model-extra names {folder}, which is no folder" if name in extra else f"{folder} does not exist"
            raise UsageError(f"The checkpoint {path} needs '{name}', {what}; {reason}. Give it with --model-extra {name}=FOLDER.")
        found[name] = folder
    return found


def check_extras(extra: Mapping[str, Path], known: Mapping[str, str]) -> None:
    """UsageError when a part is given that the family does not know; `known` says what each part is."""
    unknown = sorted(set(extra) - set(known))
    if unknown:
        raise UsageError(f"--model-extra {unknown[0]}=...: this family takes {_listed(known)}. Correct the name.")


def extra_file(path: Path, extra: Mapping[str, Path], name: str, file: str, what: str) -> Path:
    """A needed file: as given (itself, or the folder that holds it under its own name), else inside the checkpoint; UsageError if none."""
    given = Path(extra[name]).expanduser() if name in extra else path / file
    found = given / file if given.is_dir() else given
    if not found.is_file():
        reason = f"--model-extra names {given}, where it is not" if name in extra else f"{found} does not exist"
        raise UsageError(f"The checkpoint {path} needs '{name}', {what}; {reason}. Give it with --model-extra {name}=FILE.")
    return found


def copy_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copies a folder's files that match, so that a saved checkpoint is whole."""
    import shutil

    target.mkdir(parents=True, exist_ok=True)
    for pattern in patterns:
        for file in source.glob(pattern):
            shutil.copy2(file, target / file.name)


def _listed(needed: Mapping[str, str]) -> str:
    return ", ".join(f"'{name}' ({what})" for name, what in needed.items())
