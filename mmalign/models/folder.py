"""Images that exist already, in the layout of any official benchmark: what another program drew is scored like a model's own.

Layouts, tried in this order for prompt `id` and image `index` (n is the prompt's number where the suite gives one in meta["index"]):

    00007/samples/0001.png   GenEval (djghosh13/geneval at 46e8bc7); 1.png and 00001.png too
    <id>/0001.png            a folder per prompt
    <id>_1.png               flat, index after the id; <id>-1.png too
    <id>.png                 flat, one image per prompt
    <text>_000001.png        T2I-CompBench: the prompt's text and a number
    <id>/<index>.png etc. where <id> may also be the prompt's number, plain or padded to five digits

A missing image is a `missing` failure and an unreadable one an `error`; neither is ever drawn anew or left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from mmalign import hub, images
from mmalign.types import Failure, MmalignError, Request, Sample, UsageError, digest

WIDTHS = (4, 0, 5, 6)  # digits that names pad their numbers to; 0 = as it is


@dataclass(frozen=True)
class Sampling:
    """Nothing is sampled, so there is nothing to set."""


@dataclass(frozen=True)
class Folder:
    """A folder of PNG files as a model: `generate` reads."""

    root: Path
    name: str
    fingerprint: str
    files: frozenset[str]
    family: str = "folder"
    capabilities: frozenset[str] = frozenset({"image"})
    settings: Mapping[str, Any] = field(default_factory=dict)
    determinism: str = "bitwise"

    def generate(self, requests: Sequence[Request]) -> list[Sample | Failure]:
        """Each request's image as it lies there, at any size."""
        return [self._read(request) for request in requests]

    def _read(self, request: Request) -> Sample | Failure:
        tried = list(candidates(request))
        file = next((name for name in tried if name in self.files), None)
        if file is None:
            shown = ", ".join(tried[:3])
            return Failure(
                "generate",
                "missing",
                f"{self.root} has no image {request.index} of prompt {request.prompt.id!r}: tried {shown} and others.",
            )
        try:
            return Sample(request, image=images.decode_image(self.root / file), extra={"file": file})
        except images.ImageError as error:
            return Failure("generate", "error", str(error))


def candidates(request: Request) -> Iterator[str]:
    """File names, relative to the folder, under which the request's image may lie; names that would leave the folder are left out."""
    prompt, index = request.prompt, request.index
    stems = [prompt.id]
    number = prompt.meta.get("index", prompt.id)
    if str(number).isdigit():
        stems += [f"{int(number):05d}", str(int(number))]
    numbers = [f"{index:0{width}d}" for width in WIDTHS]
    names = [f"{stem}/samples/{n}.png" for stem in stems for n in numbers]
    names += [f"{stem}/{n}.png" for stem in stems for n in numbers]
    names += [f"{stem}{mark}{n}.png" for stem in stems for mark in "_-" for n in numbers]
    if index == 0:
        names += [f"{stem}.png" for stem in stems]
    names += [f"{prompt.text}_{n}.png" for n in reversed(numbers)]
    yield from dict.fromkeys(name for name in names if _is_inside(name))


def recognises(path: Path) -> bool:
    """Never by itself: a folder of images has no config. It is named: folder:PATH."""
    return False


def load(path: Path, *, device: str = "cpu", dtype: str = "float32", extra: Mapping[str, Path] | None = None) -> Folder:
    """The folder as a model. Its fingerprint digests each file's name, size and sampled content, so that a changed image is a new model."""
    root = Path(path)
    if extra:
        raise UsageError(f"A folder of images has no extra parts; got {', '.join(sorted(extra))}.")
    if not root.is_dir():
        raise UsageError(f"There is no folder {root}. Give the folder that holds the images.")
    files = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.png") if file.is_file())
    if not files:
        raise MmalignError(f"There is no PNG file in {root}. Images are read as PNG only, because JPEG changes scores; convert them first.")
    content = digest("folder", [(name, hub.sample_file(root / name)) for name in files])
    return Folder(root, root.resolve().name or "root", content, frozenset(files))


def _is_inside(name: str) -> bool:
    parts = PurePath(name).parts
    return ".." not in parts and not PurePath(name).is_absolute() and "\0" not in name
