"""The store: durable, single writer, checked when read, intact after a full disk or a kill."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign import store as stores
from mmalign.store import Scored, Store, content_of, image_path, slug, write_atomic
from mmalign.types import Failure, MmalignError, Prompt, Request, Sample, UsageError, Value

ROOT = Path(__file__).resolve().parent.parent


def request(number: int = 0) -> Request:
    return Request(Prompt(f"p{number}", "a red cube"), 0, seed=number)


def sample(number: int = 0, png: bytes | None = None) -> Sample:
    return Sample(request(number), image=png or f"pixels {number}".encode(), seconds=0.5, extra={"steps": 4})


def add(store: Store, *numbers: int) -> None:
    store.add_samples([(f"k{number}", sample(number), request(number)) for number in numbers])


def requests(*numbers: int) -> dict[str, Request]:
    return {f"k{number}": request(number) for number in numbers}


def test_what_is_added_is_found_after_closing(tmp_path: Path) -> None:
    hole = Failure("generate", "oom", "too large for the card")
    with Store.write(tmp_path) as store:
        add(store, 0)
        store.add_samples([("k1", hole, request(1)), ("k2", Sample(request(2), answer="yes"), request(2))])
        scored = Scored(Value(0.1, {"a": 1 / 3}, detail="é"), "sha", 0.2)
        store.add_scores("s", [("v", scored, request(0)), ("f", Scored(Failure("score", "parse", "?"), "sha"), request(1))])
    for reopened in (Store.write(tmp_path), Store.read(tmp_path)):
        with reopened as store:
            found = store.samples(requests(0, 1, 2, 3))
            assert found["k0"] == Sample(request(0), image_sha=hashlib.sha256(b"pixels 0").hexdigest(), seconds=0.5, extra={"steps": 4})
            assert found["k1"] == hole
            assert found["k2"].answer == "yes"
            assert "k3" not in found
            scores = store.scores({"v": "sha", "f": "sha"})
            assert scores["v"].score == Value(0.1, {"a": 1 / 3}, detail="é")
            assert isinstance(scores["f"].score, Failure)


def test_reading_creates_nothing(tmp_path: Path) -> None:
    with Store.read(tmp_path / "absent") as store:
        assert store.samples(requests(0)) == {} and store.scores({"k": "c"}) == {}
    assert list(tmp_path.iterdir()) == []
    with Store.write(tmp_path) as store:
        add(store, 0)
    before = sorted(tmp_path.rglob("*"))
    with Store.read(tmp_path) as store:
        assert set(store.samples(requests(0))) == {"k0"}
    assert sorted(tmp_path.rglob("*")) == before


def test_reading_beside_a_writer(tmp_path: Path) -> None:
    with Store.write(tmp_path) as writer:
        add(writer, 0)
        with Store.read(tmp_path) as reader:
            assert set(reader.samples(requests(0))) == {"k0"}


@pytest.mark.parametrize("damage", ["altered", "truncated", "empty", "missing"])
def test_a_damaged_image_does_not_exist(tmp_path: Path, damage: str) -> None:
    with Store.write(tmp_path) as store:
        add(store, 0, 1)
        path = image_path(tmp_path, hashlib.sha256(b"pixels 0").hexdigest())
        content = {"altered": b"pixels 9", "truncated": b"pix", "empty": b""}.get(damage)
        path.unlink() if content is None else path.write_bytes(content)
        assert set(store.samples(requests(0, 1))) == {"k1"}
        add(store, 0)  # made again
        assert set(store.samples(requests(0, 1))) == {"k0", "k1"}
        assert store.retried(["k0", "k1"], []) == 1


def test_a_score_of_another_image_does_not_exist(tmp_path: Path) -> None:
    with Store.write(tmp_path) as store:
        store.add_scores("s", [("v", Scored(Value(1.0), "sha of the first image"), request())])
        assert store.scores({"v": "sha of the second image"}) == {}
        assert set(store.scores({"v": "sha of the first image"})) == {"v"}


@pytest.mark.parametrize("change", ["x = NULL", "body = ''", "body = '[1]'", "state = 'dropped'"])
def test_a_damaged_record_is_never_a_value(tmp_path: Path, change: str) -> None:
    with Store.write(tmp_path) as store:
        store.add_scores("s", [("v", Scored(Value(1.0), "c"), request())])
    with sqlite3.connect(tmp_path / "store" / "index.sqlite") as index:
        index.execute(f"UPDATE scores SET {change}")
    with Store.write(tmp_path) as store:
        assert store.scores({"v": "c"}) == {}


def test_only_failures_are_dropped(tmp_path: Path) -> None:
    with Store.write(tmp_path) as store:
        add(store, 0)
        store.add_samples([("k1", Failure("generate", "error", "?"), request(1))])
        store.add_scores("s", [("v", Scored(Value(1.0), "c"), request()), ("f", Scored(Failure("score", "timeout", "?"), "c"), request())])
        assert store.drop_failures(["k0"], ["v"]) == 0
        assert store.drop_failures(["k0", "k1"], ["v", "f"]) == 2
        assert set(store.samples(requests(0, 1))) == {"k0"}
        assert set(store.scores({"v": "c", "f": "c"})) == {"v"}
        store.add_scores("s", [("f", Scored(Value(0.5), "c"), request())])
        assert store.scores({"f": "c"})["f"].score == Value(0.5)
        assert store.retried([], ["v", "f"]) == 1


def hold(directory: Path) -> subprocess.Popen[str]:
    """Another process that writes to a store and then keeps it."""
    code = (
        "import sys, pathlib\nfrom mmalign.store import Store\n"
        "store = Store.write(pathlib.Path(sys.argv[1]), command='mmalign eval --suite dots')\nprint('held', flush=True)\nsys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(directory)], cwd=ROOT, stdin=-1, stdout=-1, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_second_writer_is_told_who_holds_the_store(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    try:
        with pytest.raises(UsageError) as error:
            Store.write(tmp_path)
        text = str(error.value)
        assert str(tmp_path) in text and f"process {holder.pid} on " in text and "(mmalign eval --suite dots)" in text and "--wait" in text
        code = (
            "import sys, pathlib\nfrom mmalign.store import Store\n"
            "Store.write(pathlib.Path(sys.argv[1]), wait=True, on_wait=print)\nprint('mine')"
        )
        waiter = subprocess.Popen([sys.executable, "-u", "-c", code, str(tmp_path)], cwd=ROOT, stdout=-1, text=True)
        assert waiter.stdout is not None and f"process {holder.pid}" in waiter.stdout.readline()
        assert waiter.poll() is None
        holder.send_signal(signal.SIGKILL)  # the lock ends with its holder, however that ends
        assert waiter.communicate(timeout=60)[0] == "mine\n"
    finally:
        holder.kill()
        holder.communicate()


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    with Store.write(tmp_path) as store:
        add(store, 0)
    folder = image_path(tmp_path, hashlib.sha256(b"pixels 0").hexdigest()).parent
    (folder / ".half.png.123.tmp").write_bytes(b"half")
    with Store.write(tmp_path):
        assert [path.name for path in folder.iterdir()] == [f"{hashlib.sha256(b'pixels 0').hexdigest()}.png"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let its root mount a file system")
    try:
        kept = []
        with Store.write(small) as store, pytest.raises(MmalignError, match="is full. Free some space, then run the same command again"):
            for number in range(100):
                store.add_samples([(f"k{number}", sample(number, os.urandom(50_000)), request(number))])
                kept.append(number)
        assert 3 < len(kept) < 100
        with Store.write(small) as store:
            assert set(store.samples(requests(*range(100)))) == {f"k{number}" for number in kept}
            assert not list(small.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_index_is_a_sentence_and_loses_nothing(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("this machine does not let its root mount a file system")
    try:
        kept: list[str] = []
        with Store.write(tmp_path) as store, pytest.raises(MmalignError, match="full"):
            for start in range(0, 100_000, 200):
                batch = [(f"v{n}", Scored(Value(n / 7), "c"), request()) for n in range(start, start + 200)]
                store.add_scores("s", batch)
                kept += [key for key, _, _ in batch]
        with Store.read(tmp_path) as store:
            assert len(store.scores(dict.fromkeys((f"v{n}" for n in range(len(kept) + 200)), "c"))) == len(kept) > 0
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a read-only mount needs root")
def test_a_read_only_folder_is_a_sentence(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("this machine does not let its root mount a file system")
    try:
        with pytest.raises(MmalignError, match="cannot be written. Make it writable, or choose another with --results"):
            Store.write(tmp_path / "model" / "suite")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(("number", "text"), [(errno.ENOSPC, "is full"), (errno.EROFS, "cannot be written"), (errno.EIO, "reported")])
def test_disk_errors_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, text: str) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with Store.write(tmp_path) as store:
        add(store, 0)
        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(MmalignError, match=text) as error:
            add(store, 1)
        assert str(tmp_path) in str(error.value) and "intact" in str(error.value)
        monkeypatch.undo()
        assert set(store.samples(requests(0, 1))) == {"k0"}  # the row of an image that is not durable was not written
        add(store, 1)


def test_a_file_that_is_no_index_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "index.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(MmalignError, match="index is damaged. Move the file away"):
        Store.write(tmp_path)


def test_an_index_of_a_later_format_is_left_alone(tmp_path: Path) -> None:
    Store.write(tmp_path).close()
    with sqlite3.connect(tmp_path / "store" / "index.sqlite") as index:
        index.execute("PRAGMA user_version=9")
    with pytest.raises(MmalignError, match="has format 9, this version of mmalign reads format 1"):
        Store.write(tmp_path)
    with pytest.raises(MmalignError, match="has format 9"):
        Store.read(tmp_path)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "result.json"
    write_atomic(path, b"old")

    def stop(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(MmalignError):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [one.name for one in path.parent.iterdir()] == ["result.json"]


@given(st.text(max_size=200))
@settings(deadline=None)
def test_a_slug_is_one_visible_path_component(name: str) -> None:
    made = slug(name)
    assert made and "/" not in made and "\\" not in made and "\0" not in made and not made.startswith(".") and len(made) < 100
    assert (Path("/results") / made).resolve().parent == Path("/results")


@pytest.mark.parametrize(("name", "made"), [("tiny-janus", "tiny-janus"), ("deepseek-ai/Janus-Pro-1B", "deepseek-ai--Janus-Pro-1B")])
def test_plain_names_keep_their_name(name: str, made: str) -> None:
    assert slug(name) == made


def test_names_that_need_escaping_never_meet() -> None:
    names = ["../../x", "x", "..x", "x/", "/x", "x.", "x y", "x?y", "", ".", ".."]
    names += ["a" * 300, "a" * 299, "a/b", "a--b", "a-/b", "a/-b", "a---b"]
    assert len({slug(name) for name in names}) == len(names)


def test_rows_are_durable_and_many(tmp_path: Path) -> None:
    """10,000 rows in commits of 100: the figure is printed by `pytest -s`; correctness is what is asserted."""
    directory = tmp_path / "run"
    with Store.write(directory) as store:
        started = time.perf_counter()
        for start in range(0, 10_000, 100):
            store.add_scores("s", [(f"v{n}", Scored(Value(n / 7, {"part": 1.0}), "c"), request()) for n in range(start, start + 100)])
        seconds = time.perf_counter() - started
        copied = tmp_path / "copy"  # what another process (or the next boot) would see, without closing this one
        shutil.copytree(directory, copied)
    with Store.read(copied) as store:
        assert len(store.scores(dict.fromkeys((f"v{n}" for n in range(10_000)), "c"))) == 10_000
    sys.stderr.write(f"{10_000 / seconds:.0f} durable rows/s\n")


def test_content_of_tells_answers_apart() -> None:
    assert content_of(Sample(request(), answer="yes")) != content_of(Sample(request(), answer="no"))
    assert content_of(Sample(request(), image_sha="abc")) == "abc"


def test_the_store_imports_nothing_heavy() -> None:
    code = "import sys, mmalign.store, mmalign.stats; print([m for m in ('torch','numpy','PIL','pandas','pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"
    assert stores.SCHEMA_VERSION == 1
