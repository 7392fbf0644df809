"""Pictures with texts to learn from: a folder, a JSONL file or webdataset shards, indexed once and read when they are drawn.

Which pair stands at a position of the shuffled stream depends on (seed, position) alone, on any number of processes; so the sampler's whole
state is a position, which a training step gives, and a run continues with exactly the sample it would have seen. The index keeps names
and offsets, never pictures or texts. Shards are read by the standard tarfile: the `webdataset` package shuffles a stream in a buffer,
which cannot be resumed to the sample.

    folder          a picture beside a .txt of the same name; or a single .jsonl inside it; or .tar shards inside it
    file.jsonl      {"image" or "file_name": path from the file's folder, "text", "caption" or "prompt": ...} a line; "question"
                    and "answer" (or LLaVA's "conversations", of which the first exchange counts) ask about the picture
    a-{000..127}.tar  members x.png (.jpg, .jpeg, .webp) with x.txt, or with x.json that holds the fields above
"""

from __future__ import annotations

import json
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol

from mmalign import distributed, images
from mmalign.types import MmalignError, Prompt, UsageError, digest

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
IMAGE_FIELDS, TEXT_FIELDS = ("image", "file_name"), ("text", "caption", "prompt")
PATIENCE = 100  # pairs in a row that may be unreadable
READERS = 4  # threads that decode
Needs = Literal["text", "answer"]
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Pair:
    """A picture (uint8 [H, W, 3]) and its text; `question` and `answer` are about the same picture, empty where the data has none."""

    prompt: Prompt
    image: Any
    question: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Skipped:
    """A pair that could not be read: its name and why."""

    name: str
    reason: str


class Source(Protocol):
    """Pairs by number. `read` gives a name, the picture's encoded bytes or file, and its fields; MmalignError when it cannot."""

    fingerprint: str

    def __len__(self) -> int: ...

    def name(self, number: int) -> str: ...

    def read(self, number: int) -> tuple[bytes | Path, Mapping[str, Any]]: ...


class Pairs:
    """The endless shuffled stream: every epoch is a fresh order of all pairs. A pair that cannot be read is skipped and named, and the
    next readable one of the epoch's order stands in, so that one bad file moves nothing else."""

    def __init__(self, source: Source, seed: int, needs: Needs = "text") -> None:
        if not len(source):
            raise UsageError("There is no pair to learn from: the data holds no picture with a text.")
        self.source, self.seed, self.needs = source, seed, needs
        self._readers = ThreadPoolExecutor(READERS)
        self._ahead: dict[tuple[int, int], list[Future[tuple[Pair, list[Skipped]]]]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def draw(self, step: int, number: int) -> tuple[list[Pair], list[Skipped]]:
        """This process's share of a step's pairs, and what was skipped for them; the next step's are read meanwhile."""
        waiting = self._ahead.pop((step, number), None) or self._start(step, number)
        self._ahead = {(step + 1, number): self._start(step + 1, number)}
        found = [future.result() for future in waiting]
        return [pair for pair, _ in found], [item for _, skipped in found for item in skipped]

    def at(self, position: int) -> tuple[Pair, list[Skipped]]:
        """The pair of a position of the stream."""
        epoch, place = divmod(position, len(self.source))
        order, skipped = _order(f"{self.seed}/{epoch}", len(self.source)), list[Skipped]()
        for further in range(min(PATIENCE, len(order))):
            number = order[(place + further) % len(order)]
            try:
                return self.load(number), skipped
            except MmalignError as error:
                skipped.append(Skipped(self.source.name(number), str(error)))
        raise MmalignError(
            f"{len(skipped)} pairs in a row could not be read, the last of them {skipped[-1].name}: {skipped[-1].reason} Check the data."
        )

    def load(self, number: int) -> Pair:
        """One pair of the source, decoded; MmalignError when its picture or text is missing or damaged."""
        try:
            picture, fields = self.source.read(number)
        except OSError as error:
            raise MmalignError(f"It cannot be read: {error}.") from error
        question, answer = exchange_of(fields)
        text = next((str(fields[name]) for name in TEXT_FIELDS if fields.get(name)), "")
        if self.needs == "text" and not text:
            raise MmalignError(f"It has no text ({', '.join(TEXT_FIELDS)}).")
        if self.needs == "answer" and not answer:
            raise MmalignError("It has no question and answer.")
        return Pair(Prompt(self.source.name(number), text), images.decode_image(picture), question, answer)

    def prompts(self, number: int) -> list[Prompt]:
        """The texts of pairs spread evenly over the data, for pictures of the same prompts through a training."""
        found = []
        for at in range(0, len(self.source), max(1, len(self.source) // number)):
            try:
                found.append(self.load(at).prompt)
            except MmalignError:
                continue  # the training names it when it meets it
        return [prompt for prompt in found if prompt.text][:number]

    def _start(self, step: int, number: int) -> list[Future[tuple[Pair, list[Skipped]]]]:
        positions = distributed.share(list(range(step * number, (step + 1) * number)), "pairs")
        return [self._readers.submit(self.at, position) for position in positions]


def open_pairs(place: str, seed: int, needs: Needs = "text") -> Pairs:
    """The stream of the pairs at a place, with what each of them must have; UsageError when there are none."""
    return Pairs(open_source(place), seed, needs)


def open_source(place: str) -> Source:
    """What a folder, a .jsonl file or .tar shards hold (a list of shards as a-{000..127}.tar); UsageError for anything else."""
    path, shards = Path(place).expanduser(), _shards(place)
    if path.is_dir():
        listed, tars = sorted(path.glob("*.jsonl")), sorted(path.glob("*.tar"))
        if tars:
            return Shards(tars)
        if len(listed) > 1:
            raise UsageError(f"{path} holds {len(listed)} .jsonl files ({', '.join(file.name for file in listed)}). Name the one to use.")
        return Lines(listed[0]) if listed else Folder(path)
    if shards and all(file.is_file() for file in shards):
        return Shards(shards)
    if path.suffix == ".jsonl" and path.is_file():
        return Lines(path)
    missing = next((file for file in shards if not file.is_file()), path)
    raise UsageError(f"There are no pairs at {missing}. Give a folder, a .jsonl file or uncompressed .tar shards (a-{{000..127}}.tar).")


def exchange_of(fields: Mapping[str, Any]) -> tuple[str, str]:
    """The question and answer of a pair's fields; both empty when it has none."""
    turns = fields.get("conversations")
    if isinstance(turns, Sequence) and len(turns) > 1 and all(isinstance(turn, Mapping) and "value" in turn for turn in turns[:2]):
        question, answer = (str(turn["value"]) for turn in turns[:2])
        return question.replace("<image>", "").strip(), answer.strip()
    return str(fields.get("question") or ""), str(fields.get("answer") or "")


class Folder:
    """Pictures of a folder and of those below it, each with its text in a .txt beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
        self.fingerprint = digest("folder", self._names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, number: int) -> str:
        return self._names[number]

    def read(self, number: int) -> tuple[bytes | Path, Mapping[str, Any]]:
        picture = self.folder / self._names[number]
        text = picture.with_suffix(".txt")
        if not text.is_file():
            raise MmalignError(f"It has no text: there is no {text.name} beside it.")
        return picture, {"text": text.read_text(encoding="utf-8", errors="replace").strip()}


class Lines:
    """Rows of a JSONL file; pictures are found from its folder."""

    def __init__(self, file: Path) -> None:
        self.file, self._starts = file, array("q")
        start = 0
        with file.open("rb") as lines:
            for line in lines:
                if line.strip():
                    self._starts.append(start)
                start += len(line)
        self.fingerprint = digest("lines", len(self._starts), start)

    def __len__(self) -> int:
        return len(self._starts)

    def name(self, number: int) -> str:
        return f"{self.file.name}#{number + 1}"

    def read(self, number: int) -> tuple[bytes | Path, Mapping[str, Any]]:
        with self.file.open("rb") as lines:
            lines.seek(self._starts[number])
            fields = _fields(lines.readline())
        given = next((str(fields[name]) for name in IMAGE_FIELDS if fields.get(name)), "")
        if not given:
            raise MmalignError(f"It names no picture ({' or '.join(IMAGE_FIELDS)}).")
        return self.file.parent / given, fields


class Shards:
    """Members of uncompressed tar files, grouped by their name up to the first dot, as webdataset does. The index holds offsets alone."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files, self._names = list(files), list[str]()
        self._places = array("q")  # per pair: shard, offset and size of the picture, offset and size of the text, whether it is JSON
        for number, file in enumerate(self.files):
            for name, places in _groups(file):
                self._names.append(f"{file.name}/{name}")
                self._places.extend((number, *places))
        self.fingerprint = digest("shards", self._names[:1], self._names[-1:], len(self._names), sum(self._places))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, number: int) -> str:
        return self._names[number]

    def read(self, number: int) -> tuple[bytes | Path, Mapping[str, Any]]:
        shard, at, size, text_at, text_size, is_json = self._places[6 * number : 6 * number + 6]
        if text_at < 0:
            raise MmalignError("It has no text: its group holds no .txt and no .json.")
        with self.files[shard].open("rb") as tar:
            tar.seek(at)
            picture = tar.read(size)
            tar.seek(text_at)
            text = tar.read(text_size)
        return picture, _fields(text) if is_json else {"text": text.decode("utf-8", errors="replace").strip()}


def _groups(file: Path) -> Iterator[tuple[str, tuple[int, int, int, int, int]]]:
    """Name and places of every picture of a tar, with its text where there is one (-1 where there is none). A group with several texts
    takes its .json."""
    pictures: dict[str, tuple[int, int]] = {}
    texts: dict[str, tuple[int, int, int]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                name, kind = folder + slash + stem, "." + suffix.lower()
                if member.isfile() and kind in PICTURES:
                    pictures.setdefault(name, (member.offset_data, member.size))
                elif member.isfile() and kind in (".txt", ".json") and not (name in texts and kind == ".txt"):
                    texts[name] = (member.offset_data, member.size, int(kind == ".json"))
                tar.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps every header it has read
            end = tar.offset
        with file.open("rb") as whole:
            whole.seek(end)
            if whole.read(512).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"damaged at byte {end}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise MmalignError(f"The shard {file} is no whole, uncompressed tar ({error}). Unpack .tgz files, or leave it out.") from error
    for name, picture in pictures.items():
        yield name, (*picture, *texts.get(name, (-1, 0, 0)))


def _shards(place: str) -> list[Path]:
    """The .tar files that a name with {000..127} means, or the one it is; none when it means something else."""
    if not place.endswith(".tar"):
        return []
    match = _RANGE.search(place)
    if match is None:
        return [Path(place).expanduser()]
    first, last = match.groups()
    filled = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [Path(place[: match.start()] + number + place[match.end() :]).expanduser() for number in filled]


def _fields(line: bytes) -> Mapping[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise MmalignError(f"Its fields are no JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise MmalignError(f"Its fields must be a JSON object, got a {type(fields).__name__}.")
    return fields


@lru_cache(maxsize=8)
def _order(key: str, number: int) -> array[int]:
    """The shuffled numbers of an epoch."""
    order = array("q", range(number))
    Random(key).shuffle(order)
    return order
