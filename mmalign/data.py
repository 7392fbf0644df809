"""Benchmark data: pinned public sources, checked by sha256, kept in one folder. Nothing is ever replaced by another file silently.

A source is declared in the `data:` list of a protocol card (evaluators/cards/<suite>.yaml), so that it is found without an import.
The folder is $MMALIGN_DATA, or ~/.cache/mmalign/data; a file lies there as <name>/<file>. Where a publisher names no checksum (`sha256` "")
the file that is added pins itself: its sha256 is noted beside it, in the form that `sha256sum -c` reads. Such a source may be many files,
named by a pattern below its folder ("*/validation-*.parquet").
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from mmalign import reach
from mmalign.types import MmalignError, Source, UsageError

CARDS = Path(__file__).resolve().parent.parent / "evaluators" / "cards"
CARDS_INSTALLED = Path(__file__).resolve().parent / "evaluators" / "cards"
TIMEOUT_SECONDS = 20
JOINED = "/*.txt"
NOTED = "added.sha256"

State = Literal["ready", "absent", "wrong"]


@dataclass(frozen=True)
class Listed:
    """One line of `mmalign data`: a source, where it lies or would lie, and whether the file there is the pinned one."""

    source: Source
    path: Path
    state: State


def data_home() -> Path:
    """The folder that holds all benchmark data."""
    given = os.environ.get("MMALIGN_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "mmalign" / "data"


def sources(cards: Iterable[Path] = ()) -> dict[str, Source]:
    """All declared sources by name: the built-in cards, then the card files given. Two different sources with one name are an error."""
    folder = CARDS if CARDS.is_dir() else CARDS_INSTALLED
    found: dict[str, Source] = {}
    for card in [*sorted(folder.glob("*.yaml")), *cards]:
        for source in _declared(card):
            if found.setdefault(source.name, source) != source:
                raise MmalignError(f"Two cards declare different data under the name '{source.name}'; one of them is {card}. Rename it.")
    return found


def data_path(name: str, cards: Iterable[Path] = ()) -> Path:
    """The checked file of source `name`; fetched from its pinned address when it is absent. MmalignError says what to do otherwise."""
    source = _find(name, cards)
    path = _place(source)
    state = _state(source, path)
    if state == "absent":
        return fetch(name, cards)
    if not source.sha256 and state == "wrong":
        raise MmalignError(f"{path} is not what was added as '{name}' (see {NOTED} there). Add it again: {_command(name)}")
    if source.sha256:
        _check(source, path)
    return path


def add(name: str, path: Path, cards: Iterable[Path] = ()) -> Path:
    """Copy a file (or a checkout that holds it) into the data folder after checking its sha256; returns its place there.

    A source whose address ends in /*.txt is the text files of a folder, joined: one {"item_id": stem, "prompt": text} a line, by name.
    """
    source = _find(name, cards)
    if source.url.endswith(JOINED) and Path(path).is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            return add(name, _join(source, Path(path), Path(scratch)), cards)
    if not source.sha256:
        return _add_noted(source, Path(path))
    found = _search(source, Path(path))
    _check(source, found)
    place = _place(source)
    _copy(found, place, lambda copy: _check(source, copy))  # the file may have changed, or the disk filled, since the first look
    return place


def fetch(name: str, cards: Iterable[Path] = ()) -> Path:
    """Download a source from its pinned address into the data folder; MmalignError with the offline command when that fails."""
    import pooch
    import requests

    source = _find(name, cards)
    place = _place(source)
    if not source.sha256:
        raise MmalignError(
            f"The data '{name}' is not in {place}. No checksum of it is published, so it is not fetched: "
            f"take {source.file} from {source.url}, then run: {_command(name)}"
        )
    if source.url.endswith(JOINED):
        address = "/".join(source.url.split("/")[:5])
        raise MmalignError(
            f"The data '{name}' is not in {place.parent}; it is made of many small files. Clone {address}, then run: {_command(name)}"
        )
    downloader = pooch.HTTPDownloader(timeout=TIMEOUT_SECONDS)
    if silence := reach.silence(source.url):
        raise MmalignError(_bring(source, silence))
    try:
        known = None if _is_git(source) else f"{_kind(source)}:{source.sha256}"
        pooch.retrieve(source.url, known, fname=place.name, path=place.parent, downloader=downloader)
        if known is None and _state(source, place) != "ready":
            place.unlink()
            raise ValueError("another git blob")
    except (requests.RequestException, OSError) as error:
        raise MmalignError(_bring(source, f"{source.url} cannot be reached ({type(error).__name__})")) from error
    except ValueError as error:  # pooch's word, and ours, for a checksum that differs
        raise MmalignError(
            f"The file at {source.url} is not the pinned '{name}': expected {_kind(source)} {source.sha256}. Nothing was kept. "
            f"If you have the right file, run: {_command(name)}"
        ) from error
    return place


def _bring(source: Source, why: str) -> str:
    """What to do about a file that cannot be fetched."""
    return (
        f"The data '{source.name}' is not in {_place(source).parent}, and {why}. Bring the file {source.file} "
        f"({_kind(source)} {source.sha256}) from a machine that is online (it is {source.url}), then run: {_command(source.name)}"
    )


def listing(cards: Iterable[Path] = ()) -> list[Listed]:
    """Every source with its state, by name."""
    found = sorted(sources(cards).items())
    return [Listed(source, _place(source), _state(source, _place(source))) for _, source in found]


def load_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file without their ends; a last line without a newline counts, empty last lines do not."""
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n") if path.stat().st_size else []


def load_json_lines(path: Path) -> list[dict[str, Any]]:
    """One JSON object per line; MmalignError names the line that is none."""
    rows = []
    for number, line in enumerate(load_lines(path), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MmalignError(f"{path}, line {number}: not JSON ({error.msg}). Expected one JSON object per line.") from error
        if not isinstance(row, dict):
            raise MmalignError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
        rows.append(row)
    return rows


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(source: Source, path: Path) -> str:
    """What the source is pinned by: the file's sha256, or its id as a git blob or its md5, where a publisher names no other."""
    if _kind(source) == "md5":
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if not _is_git(source):
        return sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()


def _is_git(source: Source) -> bool:
    return len(source.sha256) == 40


def _kind(source: Source) -> str:
    return {40: "git blob", 32: "md5"}.get(len(source.sha256), "sha256")


def _declared(card: Path) -> list[Source]:
    import yaml

    try:
        content = yaml.safe_load(card.read_text(encoding="utf-8")) or {}
        return [Source(**entry) for entry in content.get("data") or ()]
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise MmalignError(f"The data list of the card {card} cannot be read: {error}") from error


def _find(name: str, cards: Iterable[Path]) -> Source:
    known = sources(cards)
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(sorted(known))}."
        raise UsageError(f"Unknown data '{name}'. {hint}")
    return known[name]


def _place(source: Source) -> Path:
    folder = data_home() / source.name
    return folder if "*" in source.file else folder / source.file


def _state(source: Source, path: Path) -> State:
    if not source.sha256:
        noted = data_home() / source.name / NOTED
        lines = load_lines(noted) if noted.is_file() else []
        return ("ready" if lines == _notes(noted.parent, source.file) else "wrong") if lines else "absent"
    if not path.is_file():
        return "absent"
    return "ready" if _hash(source, path) == source.sha256 else "wrong"


def _notes(folder: Path, pattern: str) -> list[str]:
    """One line a file: its sha256 and its path below the folder."""
    return [f"{sha256(file)}  {file.relative_to(folder).as_posix()}" for file in sorted(folder.glob(pattern))]


def _add_noted(source: Source, path: Path) -> Path:
    """Copy the file or files of a source without a published checksum, and note what they are; the note comes last."""
    is_file = path.is_file() and "*" not in source.file
    files = [path] if is_file else sorted(path.glob(source.file))
    if not files:
        raise MmalignError(f"{path} holds no {source.file} to add as '{source.name}'. Take it from {source.url} and give its folder.")
    folder = data_home() / source.name
    (folder / NOTED).unlink(missing_ok=True)
    given = {file.resolve() for file in files}  # they may be those of the data folder itself
    for old in sorted(folder.glob(source.file)):
        if old.resolve() not in given:
            old.unlink()
    for file in files:
        place = folder / (source.file if is_file else file.relative_to(path))
        if place.resolve() != file.resolve():
            _copy(file, place)
    notes = _notes(folder, source.file)
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / NOTED
        written.write_text("".join(line + "\n" for line in notes), encoding="utf-8", newline="\n")
        _copy(written, folder / NOTED)
    return _place(source)


def _copy(file: Path, place: Path, check: Callable[[Path], None] | None = None) -> None:
    """Copy a file so that `place` holds all of it or what was there before."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    os.close(handle)
    try:
        shutil.copyfile(file, temporary)
        if check:
            check(Path(temporary))
        os.replace(temporary, place)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _check(source: Source, path: Path) -> None:
    got = _hash(source, path)
    if got != source.sha256:
        raise MmalignError(
            f"{path} is not the pinned data '{source.name}': expected {_kind(source)} {source.sha256}, got {got}. "
            f"Take it from {source.url}, then run: {_command(source.name)}"
        )


def _search(source: Source, path: Path) -> Path:
    """The file itself, or the one inside a folder: under its own name, or where the source's repository keeps it."""
    inside = source.url.split("/", 6)[-1]  # https://raw.githubusercontent.com/<owner>/<name>/<commit>/<path in the repository>
    candidates = [path] if not path.is_dir() else [path / source.file, path / inside, path / Path(inside).name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise MmalignError(f"There is no file {candidates[0]} to add as '{source.name}'. Give the path of {source.file}, or of its folder.")


def _join(source: Source, path: Path, scratch: Path) -> Path:
    """The joined file of a folder of texts, or of a checkout that holds the folder where the source's address says."""
    inside = path / source.url.removesuffix(JOINED).split("/", 7)[-1]  # https://github.com/<owner>/<name>/tree/<commit>/<folder>
    texts = sorted((inside if inside.is_dir() else path).glob("*.txt"))
    rows = [{"item_id": text.stem, "prompt": text.read_text(encoding="utf-8")} for text in texts]
    joined = scratch / source.file
    joined.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return joined


def _command(name: str) -> str:
    return f"mmalign data add {shlex.quote(name)} --from PATH"
