"""The truth of a run: one SQLite (WAL) index and content-addressed PNG files, written by one process at a time.

Layout of a run directory (`<results>/<model>/<suite>/`):

    store/index.sqlite          samples and scores by key; a row is there only after its image is durable
    store/images/<aa>/<sha>.png sha256 of the file's bytes
    store/lock                  held with flock by the one writer: {"pid", "host", "command"}

Every write is durable when the call returns (WAL with synchronous=FULL, one commit per call; images are fsynced and renamed
before their row is committed), so `kill -9` at any moment costs at most the calls that had not returned. Everything is checked
when read: a sample whose image is missing or has another sha does not exist, a score measured on another image does not exist,
and a failure comes back as a Failure or, once dropped, not at all; it can never come back as a Value.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import socket
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mmalign.types import Failure, MmalignError, Request, Sample, Score, UsageError, Value, digest

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    key TEXT PRIMARY KEY, request TEXT NOT NULL, state TEXT NOT NULL, image_sha TEXT, answer TEXT,
    seconds REAL NOT NULL, body TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 1
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (
    key TEXT PRIMARY KEY, request TEXT NOT NULL, scorer TEXT NOT NULL, state TEXT NOT NULL, content TEXT NOT NULL, x REAL,
    seconds REAL NOT NULL, body TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 1
) WITHOUT ROWID;
"""
# States of a record: `done` has a value, `failed` is a hole that stays until it is dropped, `dropped` is a hole to be redone.


def slug(name: str) -> str:
    """A folder name for a model, suite or prompt name: one path component, never hidden, never `..`.

    `org/model` becomes `org--model`; a name that needs any other change gets eight digits of its digest, so two names never meet.
    """
    plain = name.replace("/", "--")
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip(".-")[:80]
    is_reversible = safe == plain and plain.replace("--", "/") == name
    return safe if safe and is_reversible else f"{safe or 'unnamed'}-{digest(name)[:8]}"


def image_path(directory: Path, sha: str) -> Path:
    """Where a run directory keeps the image with this sha256."""
    return directory / "store" / "images" / sha[:2] / f"{sha}.png"


def is_intact(directory: Path, sha: str) -> bool:
    """Whether the image is there with the content its name promises."""
    try:
        return hashlib.sha256(image_path(directory, sha).read_bytes()).hexdigest() == sha
    except OSError:
        return False


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that any reader, after any crash, sees the old content or the new, never a part.

    A temporary file in the same folder is written, fsynced and renamed, then the folder is fsynced. Costs two fsyncs.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content)
        _sync_folder(path.parent)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a disk can do to a write into one sentence with the fix; what was committed before stays intact."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        text = str(error).lower()
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "disk is full" in text:
            fix = "the disk (or your quota) is full. Free some space"
        elif number in (errno.EROFS, errno.EACCES, errno.EPERM) or "readonly" in text or "unable to open" in text:
            fix = "the folder cannot be written. Make it writable, or choose another with --results"
        elif isinstance(error, sqlite3.DatabaseError) and ("malformed" in text or "not a database" in text):
            fix = "the index is damaged. Move the file away (the images beside it are kept and need no index to be looked at)"
        else:
            fix = f"the system reported: {error}. Repair that"
        raise MmalignError(
            f"Could not use {path}: {fix}, then run the same command again; everything saved so far is intact."
        ) from error


@dataclass(frozen=True)
class Scored:
    """A score as kept: what was said, of which content (image sha or answer digest), and how long it took."""

    score: Score
    content: str
    seconds: float = 0.0
    attempts: int = 1


def content_of(sample: Sample) -> str:
    """What a score of this sample is about: the image's sha256, or a digest of the answer."""
    return sample.image_sha or digest("answer", sample.answer)


class Store:
    """The index and images of one run directory. Open it with `Store.write` (one process at a time) or `Store.read`."""

    def __init__(self, directory: Path, index: sqlite3.Connection | None, lock: TextIO | None) -> None:
        self.directory = directory
        self._index = index
        self._lock = lock

    @classmethod
    def write(cls, directory: Path, *, command: str = "", wait: bool = False, on_wait: Callable[[str], None] | None = None) -> Store:
        """Open for writing. A second writer gets a UsageError that names the first, or waits for it with `wait`."""
        folder = directory / "store"
        with disk_errors(folder):
            (folder / "images").mkdir(parents=True, exist_ok=True)
            lock = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (held for the life of the store)
        try:
            _acquire(lock, directory, wait, on_wait)
            with disk_errors(folder / "index.sqlite"):
                lock.truncate(0)
                lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "command": command}))
                lock.flush()
                for leftover in folder.glob("images/*/.*.tmp"):  # of a writer that was killed; we hold the lock, so nobody's
                    leftover.unlink()
                index = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
                index.execute("PRAGMA journal_mode=WAL")
                index.execute("PRAGMA synchronous=FULL")
                index.execute("BEGIN IMMEDIATE")
                _check_version(index.execute("PRAGMA user_version").fetchone()[0] or SCHEMA_VERSION, folder)
                for statement in SCHEMA.split(";"):
                    index.execute(statement)
                index.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
                index.execute("COMMIT")
        except BaseException:
            lock.close()
            raise
        return cls(directory, index, lock)

    @classmethod
    def read(cls, directory: Path) -> Store:
        """Open for reading only, beside a writer or without; a directory that does not exist is an empty store."""
        path = directory / "store" / "index.sqlite"
        if not path.exists():
            return cls(directory, None, None)
        # Without a log beside it nobody is writing, and `immutable` keeps SQLite from creating one.
        mode = "mode=ro" if path.with_name("index.sqlite-wal").exists() else "immutable=1"
        with disk_errors(path):
            index = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, isolation_level=None)
            version = index.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:  # created by a writer that was killed before its first commit
            index.close()
            return cls(directory, None, None)
        _check_version(version, path.parent)
        return cls(directory, index, None)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index and let the next writer in."""
        if self._index is not None:
            self._index.close()
            self._index = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- reading ------------------------------------------------------------------------------------------------------

    def samples(self, requests: Mapping[str, Request]) -> dict[str, Sample | Failure]:
        """The samples and failures kept under these keys. A sample whose image is missing or altered is left out."""
        found: dict[str, Sample | Failure] = {}
        for key, state, image_sha, answer, seconds, body in self._select(
            "SELECT key, state, image_sha, answer, seconds, body FROM samples WHERE state != 'dropped' AND key IN", requests
        ):
            content = _parse(body)
            if content is None:
                continue
            if state == "failed":
                found[key] = Failure(**content)
            elif answer is not None or (image_sha is not None and is_intact(self.directory, image_sha)):
                found[key] = Sample(requests[key], answer=answer, image_sha=image_sha, seconds=seconds, extra=content)
        return found

    def scores(self, contents: Mapping[str, str]) -> dict[str, Scored]:
        """The scores kept under these keys, each only if it was measured on the content given here (`content_of`)."""
        found: dict[str, Scored] = {}
        for key, state, content, x, seconds, body, attempts in self._select(
            "SELECT key, state, content, x, seconds, body, attempts FROM scores WHERE state != 'dropped' AND key IN", contents
        ):
            record = _parse(body)
            if record is None or content != contents[key]:
                continue
            if state == "failed":
                found[key] = Scored(Failure(**record), content, seconds, attempts)
            elif isinstance(x, float) and math.isfinite(x):
                found[key] = Scored(Value(x, record["parts"], detail=record["detail"]), content, seconds, attempts)
        return found

    def retried(self, sample_keys: Iterable[str], score_keys: Iterable[str]) -> int:
        """How many of these records were made more than once."""
        queries = (("samples", sample_keys), ("scores", score_keys))
        return sum(len(list(self._select(f"SELECT key FROM {table} WHERE attempts > 1 AND key IN", keys))) for table, keys in queries)

    def _select(self, query: str, keys: Iterable[str]) -> Iterator[tuple[Any, ...]]:
        wanted = list(keys)
        if self._index is None:
            return
        with disk_errors(self.directory / "store" / "index.sqlite"):
            for start in range(0, len(wanted), 500):  # SQLite's safe number of variables
                some = wanted[start : start + 500]
                yield from self._index.execute(f"{query} ({','.join('?' * len(some))})", some).fetchall()

    # -- writing ------------------------------------------------------------------------------------------------------

    def add_samples(self, samples: Sequence[tuple[str, Sample | Failure, Request]]) -> None:
        """Keep samples (their `image` holding PNG bytes) and failures under their keys; durable when this returns."""
        pictures = [sample.image for _, sample, _ in samples if isinstance(sample, Sample) and sample.image is not None]
        self._add_images(pictures)
        records: list[tuple[Any, ...]] = []
        for key, sample, request in samples:
            if isinstance(sample, Failure):
                records.append((key, request.id, "failed", None, None, 0.0, _dump(_failure(sample))))
            else:
                sha = None if sample.image is None else hashlib.sha256(sample.image).hexdigest()
                records.append((key, request.id, "done", sha, sample.answer, sample.seconds, _dump(dict(sample.extra))))
        self._commit(
            "INSERT INTO samples (key, request, state, image_sha, answer, seconds, body) VALUES (?,?,?,?,?,?,?) "
            "ON CONFLICT (key) DO UPDATE SET request=excluded.request, state=excluded.state, image_sha=excluded.image_sha, "
            "answer=excluded.answer, seconds=excluded.seconds, body=excluded.body, attempts=attempts + 1",
            records,
        )

    def add_scores(self, scorer: str, scores: Sequence[tuple[str, Scored, Request]]) -> None:
        """Keep what a scorer said under its keys; durable when this returns."""
        records: list[tuple[Any, ...]] = []
        for key, scored, request in scores:
            score = scored.score
            if isinstance(score, Failure):
                state, x, body = "failed", None, _dump(_failure(score))
            else:
                state, x, body = "done", score.x, _dump({"parts": dict(score.parts), "detail": score.detail})
            records.append((key, request.id, scorer, state, scored.content, x, scored.seconds, body))
        self._commit(
            "INSERT INTO scores (key, request, scorer, state, content, x, seconds, body) VALUES (?,?,?,?,?,?,?,?) "
            "ON CONFLICT (key) DO UPDATE SET request=excluded.request, state=excluded.state, content=excluded.content, "
            "x=excluded.x, seconds=excluded.seconds, body=excluded.body, attempts=attempts + 1",
            records,
        )

    def drop_failures(self, sample_keys: Iterable[str], score_keys: Iterable[str]) -> int:
        """Make the failures among these keys be redone; values are not touched. Returns how many there were."""
        failed = {
            table: [key for (key,) in self._select(f"SELECT key FROM {table} WHERE state = 'failed' AND key IN", keys)]
            for table, keys in (("samples", sample_keys), ("scores", score_keys))
        }
        for table, keys in failed.items():
            self._commit(f"UPDATE {table} SET state = 'dropped' WHERE key = ?", [(key,) for key in keys])
        return sum(len(keys) for keys in failed.values())

    def _add_images(self, pictures: Sequence[bytes]) -> None:
        folders = set()
        with disk_errors(self.directory / "store" / "images"):
            for content in pictures:
                path = image_path(self.directory, hashlib.sha256(content).hexdigest())
                if not path.parent.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    folders.add(path.parent.parent)
                _replace(path, content)
                folders.add(path.parent)
            for folder in folders:
                _sync_folder(folder)

    def _commit(self, statement: str, records: Sequence[tuple[Any, ...]]) -> None:
        assert self._index is not None and self._lock is not None, "this store is open for reading only"
        if not records:
            return
        with disk_errors(self.directory / "store" / "index.sqlite"):
            self._index.execute("BEGIN IMMEDIATE")
            try:
                self._index.executemany(statement, records)
                self._index.execute("COMMIT")
            except BaseException:
                if self._index.in_transaction:
                    self._index.execute("ROLLBACK")
                raise


def _acquire(lock: TextIO, directory: Path, wait: bool, on_wait: Callable[[str], None] | None) -> None:
    """Take the writer's lock. It ends with the process that holds it, so no lock outlives a killed run."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        holder = _holder(lock)
    except OSError as error:
        raise MmalignError(
            f"The file system of {directory} offers no file locks ({error}), so two runs could overwrite each other. "
            "Choose a folder on another file system with --results."
        ) from error
    sentence = f"The run directory {directory} is in use by {holder}."
    if not wait:
        raise UsageError(f"{sentence} Let it finish, or add --wait to start when it ends.")
    if on_wait is not None:
        on_wait(sentence)
    fcntl.flock(lock, fcntl.LOCK_EX)


def _holder(lock: TextIO) -> str:
    lock.seek(0)
    try:
        held = json.loads(lock.read())
        return f"process {held['pid']} on {held['host']}" + (f" ({held['command']})" if held["command"] else "")
    except (ValueError, KeyError, TypeError):  # read between its lock and its signature
        return "another process"


def _check_version(version: int, folder: Path) -> None:
    if version != SCHEMA_VERSION:
        raise MmalignError(
            f"The index in {folder} has format {version}, this version of mmalign reads format {SCHEMA_VERSION}. "
            "Use the version that wrote it, or choose another folder with --results."
        )


def _failure(failure: Failure) -> dict[str, str]:
    return {"stage": failure.stage, "kind": failure.kind, "message": failure.message}


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def _parse(body: str) -> dict[str, Any] | None:
    try:
        content = json.loads(body)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
