"""Where the pictures of an understanding benchmark lie: a folder of the user's, because they are distributed apart from the questions."""

from __future__ import annotations

from pathlib import Path

from mmalign.types import UsageError


def folder(given: str, suite: str, what: str) -> Path:
    """The folder that the option `images` names, or the suite's own place in the data folder; UsageError when it is not there."""
    from mmalign.data import data_home

    path = Path(given).expanduser() if given else data_home() / f"{suite}-images"
    if not path.is_dir():
        advice = f"There is no folder {path}; name one with --set {suite}.images=DIR."
        raise UsageError(f"The suite '{suite}' needs its pictures: {what}. {advice}")
    return path.resolve()
