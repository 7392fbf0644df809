"""A server for scorers: one process, any number of clients, batches joined across them (protocol: remote.py).

Bound to this machine unless told otherwise, and beyond it only with a token. A scorer runs in one thread of its own, which takes what is
waiting, up to a batch; a batch that fails is halved until only the guilty item fails. Images live in memory by their sha256, the least
recently used go first. Nothing that a client sends is executed or unpickled, and no client's fault stops the server.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mmalign.config import Secret
from mmalign.remote import PROTOCOL, is_loopback, pack_score, unpack
from mmalign.types import Failure, MmalignError, Sample, Score, UsageError
from mmalign.worker import BatchFailure, Picture, Recipe, Served

MAX_JSON, MAX_IMAGE = 64 << 20, 128 << 20


@dataclass(frozen=True)
class Settings:
    """`batch_size`: items a scorer gets at once; `linger`: seconds to wait for more of them; `timeout`: seconds a request may take."""

    host: str = "127.0.0.1"
    port: int = 8190
    token: Secret = field(default_factory=lambda: Secret("MMALIGN_TOKEN"))
    batch_size: int = 16
    linger: float = 0.005
    timeout: float = 600.0
    image_memory: int = 1 << 30

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.token.is_set():
            raise UsageError(
                f"Serving on {self.host} opens the scorers to other machines, and no token is set. "
                f"Export {self.token.name}=SECRET (the clients need the same), or leave --host at 127.0.0.1."
            )


class Images:
    """Decoded images by sha256, up to a number of bytes; the least recently used are dropped."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._size = capacity, 0
        self._held: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, sha: str, data: bytes) -> None:
        """Keep an image; ImageError when it is none."""
        from mmalign.images import decode_image

        pixels = decode_image(data)
        with self._lock:
            if sha not in self._held:
                self._size += pixels.nbytes
            self._held[sha] = pixels
            while self._size > self._capacity and len(self._held) > 1:
                self._size -= self._held.popitem(last=False)[1].nbytes

    def take(self, names: Sequence[str]) -> dict[str, Any]:
        """Those of these images that are here."""
        with self._lock:
            found = {sha: self._held[sha] for sha in names if sha in self._held}
            for sha in found:
                self._held.move_to_end(sha)
            return found


class Desk:
    """One scorer with its queue and its thread."""

    def __init__(self, served: Served, settings: Settings) -> None:
        self.served, self._settings = served, settings
        self._waiting: queue.SimpleQueue[tuple[Sample, Future[Score]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"scorer {served.recipe.entry.name}", daemon=True)
        self._thread.start()

    def submit(self, samples: Sequence[Sample]) -> list[Future[Score]]:
        futures: list[Future[Score]] = [Future() for _ in samples]
        for sample, future in zip(samples, futures, strict=True):
            self._waiting.put((sample, future))
        return futures

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join(timeout=10)

    @property
    def facts(self) -> dict[str, Any]:
        low, high = self.served.description.facts["range"]
        limits = [side if math.isfinite(side) else None for side in (low, high)]
        return {"fingerprint": self.served.description.fingerprint, "range": limits, "waiting": self._waiting.qsize()}

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, deadline = [first], time.monotonic() + self._settings.linger
            while len(batch) < self._settings.batch_size:
                try:
                    entry = self._waiting.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
                if entry is None:
                    self._waiting.put(None)  # this batch first, then the end
                    break
                batch.append(entry)
            wanted = [(sample, future) for sample, future in batch if future.set_running_or_notify_cancel()]
            if wanted:
                scores = self._score([sample for sample, _ in wanted])
                for (_, future), score in zip(wanted, scores, strict=True):
                    future.set_result(score)

    def _score(self, samples: list[Sample]) -> list[Score]:
        reply = self.served.run([Picture(sample, None) for sample in samples])
        if not isinstance(reply, BatchFailure):
            return [outcome.result for outcome in reply]  # type: ignore[misc]
        if len(samples) == 1:
            return [Failure("score", reply.kind, reply.message)]
        middle = len(samples) // 2
        return self._score(samples[:middle]) + self._score(samples[middle:])


class Server(ThreadingHTTPServer):
    """The listening server; `with` it, or call `stop`. `url` says where it is (port 0 takes a free one)."""

    daemon_threads = True

    def __init__(self, recipes: Mapping[str, Recipe], settings: Settings = Settings(), device: str = "cpu") -> None:
        if not recipes:
            raise UsageError("There is no scorer to serve; name one, such as --scorers hpsv2,ocr.")
        self.settings, self.images = settings, Images(settings.image_memory)
        self.desks = {name: Desk(Served(recipe, device, keeps_maps=True), settings) for name, recipe in recipes.items()}
        try:
            super().__init__((settings.host, settings.port), Handler)
        except OSError as error:
            raise MmalignError(f"Cannot listen on {settings.host}:{settings.port}: {error}. Choose another --port.") from error

    @property
    def url(self) -> str:
        return f"http://{self.settings.host}:{self.server_address[1]}"

    def start(self) -> Server:
        """Serve in a thread."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, name="serve", daemon=True).start()
        return self

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for desk in self.desks.values():
            desk.close()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no event; anything else is the base class's to report."""
        import sys

        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class Refusal(Exception):
    """A request that gets an error status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """One connection. Every answer is a JSON object; every refusal says why."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds of silence after which a connection is closed

    def do_GET(self) -> None:
        self._answer(lambda: self._health())

    def do_PUT(self) -> None:
        self._answer(lambda: self._image())

    def do_POST(self) -> None:
        self._answer(lambda: self._scores())

    def _answer(self, make: Any) -> None:
        try:
            self._admit()
            status, content = make()
        except Refusal as refusal:
            status, content = refusal.status, {"error": str(refusal)}
            self.close_connection = True  # the body may not have been read
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _admit(self) -> None:
        if "Origin" in self.headers:
            raise Refusal(403, "Requests from web pages are refused.")
        token = self.server.settings.token
        if token.is_set():
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), token.reveal().encode()):
                raise Refusal(401, f"The token is absent or wrong; set {token.name} to the server's.")

    def _body(self, most: int) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            raise Refusal(411, "The request does not say how long it is.")
        if int(length) > most:
            raise Refusal(413, f"The request has {length} bytes; at most {most} are read. Send fewer items at once.")
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            raise Refusal(400, "The request ended before its end.")
        return body

    def _health(self) -> tuple[int, dict[str, Any]]:
        if self.path != "/v1/health":
            raise Refusal(404, f"There is nothing at {self.path}.")
        return 200, {"protocol": PROTOCOL, "scorers": {name: desk.facts for name, desk in self.server.desks.items()}}

    def _image(self) -> tuple[int, dict[str, Any]]:
        from mmalign.images import ImageError

        folder, _, sha = self.path.rpartition("/")
        if folder != "/v1/images":
            raise Refusal(404, f"There is nothing at {self.path}.")
        body = self._body(MAX_IMAGE)
        if hashlib.sha256(body).hexdigest() != sha:
            raise Refusal(400, f"The image's sha256 is not {sha}.")
        try:
            self.server.images.add(sha, body)
        except ImageError as error:
            raise Refusal(422, str(error)) from error
        return 201, {"image": sha}

    def _scores(self) -> tuple[int, dict[str, Any]]:
        if self.path != "/v1/scores":
            raise Refusal(404, f"There is nothing at {self.path}.")
        try:
            body = json.loads(self._body(MAX_JSON))
            desk = self.server.desks.get(body["scorer"])
            names = [item.get("image") for item in body["items"]]
            found = self.server.images.take([sha for sha in names if sha])
            missing = sorted({sha for sha in names if sha and sha not in found})
            samples = [unpack(item, found.get(sha)) for item, sha in zip(body["items"], names, strict=True)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refusal(400, f"The request is not of the protocol's form: {type(error).__name__}: {error}.") from error
        if desk is None:
            raise Refusal(404, f"No scorer '{body['scorer']}' is served here; there are {', '.join(self.server.desks)}.")
        if missing:
            return 409, {"missing": missing}
        futures = desk.submit(samples)
        deadline = time.monotonic() + self.server.settings.timeout
        try:
            scores = [future.result(max(0.0, deadline - time.monotonic())) for future in futures]
        except NotDone:
            for future in futures:
                future.cancel()
            raise Refusal(504, f"The scorer '{body['scorer']}' did not answer within {self.server.settings.timeout:g} s.") from None
        return 200, {"fingerprint": desk.served.description.fingerprint, "scores": [pack_score(score) for score in scores]}

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: requests are many, and their faults are in the answers."""


def serve(recipes: Mapping[str, Recipe], settings: Settings = Settings(), device: str = "cpu", ready: Any = lambda server: None) -> None:
    """Load the scorers and serve them until interrupted; `ready` is called with the server once it listens."""
    server = Server(recipes, settings, device)
    ready(server)
    try:
        server.serve_forever()
    finally:
        server.server_close()
        for desk in server.desks.values():
            desk.close()
