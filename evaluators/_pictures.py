"""Where the pictures of an understanding benchmark lie: a folder of the user's, or the data folder, when the questions' file holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmalign.types import UsageError

GAP = 16  # white pixels between pictures that are joined


def folder(given: str, suite: str, what: str) -> Path:
    """The folder that the option `images` names, or the suite's own place in the data folder; UsageError when it is not there."""
    path = Path(given).expanduser() if given else _place(suite)
    if not path.is_dir():
        advice = f"There is no folder {path}; name one with --set {suite}.images=DIR."
        raise UsageError(f"The suite '{suite}' needs its pictures: {what}. {advice}")
    return path.resolve()


def unpacked(content: bytes, suite: str) -> str:
    """The path of a picture that came inside a file of questions: written, as it is, into the suite's place in the data folder.

    Its name is its content's digest, so that one picture is one file and a request's key follows the content.
    """
    import hashlib

    kind = "png" if content.startswith(b"\x89PNG") else "jpg"
    path = _place(suite).resolve() / f"{hashlib.sha256(content).hexdigest()[:32]}.{kind}"
    if not path.is_file() or path.stat().st_size != len(content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(path)


def joined(paths: Sequence[str], suite: str) -> str:
    """The path of one picture that shows the given ones side by side, of equal height, in order; for models that read one a question."""
    import numpy as np

    from mmalign.images import decode_image, encode_png, resize

    pictures = [decode_image(Path(path)) for path in paths]
    height = max(picture.shape[0] for picture in pictures)
    row = []
    for picture in pictures:
        width = max(1, round(picture.shape[1] * height / picture.shape[0]))
        row += [np.full((height, GAP, 3), 255, np.uint8), resize(picture, (height, width), "pil-bicubic")]
    return unpacked(encode_png(np.concatenate(row[1:], axis=1)), suite)


def _place(suite: str) -> Path:
    from mmalign.data import data_home

    return data_home() / f"{suite}-images"
