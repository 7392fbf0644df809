"""The hub's silence: found within seconds, said in a sentence by whatever needed the hub, and never for a folder that is here."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from mmalign import hub, reach
from mmalign.scorers import _clip, _folders, _weights
from mmalign.types import MmalignError

CLOSED = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No memory of an earlier answer, no setting of this machine."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_ETAG_TIMEOUT", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    reach._asked.cache_clear()
    yield
    reach._asked.cache_clear()


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_any_answer_is_an_answer_and_one_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, format: str, *args: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "60")  # a busy machine may take its time
        assert reach.hub_silence() == "" and not reach.is_cache_only("owner/name")
        server.shutdown()
    assert len(asked) == 1


def test_silence_has_a_reason_and_limits_a_look_up_to_the_cache(monkeypatch: pytest.MonkeyPatch, mute: str, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    assert f"{CLOSED} cannot be reached" in reach.hub_silence() and "refused" in reach.hub_silence()
    assert reach.is_cache_only("owner/name")
    assert not reach.is_cache_only(str(tmp_path)), "a folder that is here needs no hub"
    assert reach.hub_fault(OSError("no config\nsecond line"), str(tmp_path)) == "no config."
    monkeypatch.setenv("HF_ENDPOINT", mute)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    assert f"{mute} " in reach.hub_silence() and reach.is_cache_only()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert reach.hub_silence() == "HF_HUB_OFFLINE is set"


def test_a_name_that_is_never_found_costs_no_more_than_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.1")
    released = threading.Event()
    monkeypatch.setattr(reach, "_ask", lambda address, patience: str(released.wait(60)))
    assert "does not answer within 0.1 s" in reach.hub_silence()
    released.set()


def test_an_answer_is_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    now = time.monotonic()
    assert reach.hub_silence()
    monkeypatch.setattr(reach, "_ask", lambda address, patience: "")
    monkeypatch.setattr(time, "monotonic", lambda: now + 2 * reach.MEMORY)
    assert reach.hub_silence() == ""


def load_clip() -> object:
    return _clip.load("owner/clip", "clipscore.model", "cpu", "float32")


LOOKUPS: dict[str, Callable[[], object]] = {
    "model": lambda: hub.resolve_model("owner/model"),
    "tokenizer": lambda: _weights.tokenizer("owner/words", "git.model"),
    "file": lambda: _weights.official_file("owner/name:weights.pt", "hpsv2.weights"),
    "folder": lambda: _folders.folder("owner/folder", "orm.model"),
    "network": load_clip,
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_whatever_needs_the_hub_says_that_it_is_silent_and_does_not_insist(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import huggingface_hub.utils._http as library

    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    monkeypatch.setattr(library.time, "sleep", lambda seconds: pytest.fail("the hub's library is waiting to try again"))
    with pytest.raises(MmalignError, match=f"{CLOSED} cannot be reached .*is there a network"):
        LOOKUPS[name]()
