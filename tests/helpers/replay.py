"""An OpenAI-compatible server on this machine whose answers a test writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], tuple[int, Any, float]]  # (request, its number) -> status, body, seconds to wait


def said(text: str | None, finish: str = "stop", model: str = "judge-2026-01-01", **message: Any) -> tuple[int, Any, float]:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice], "usage": usage}, 0.0


class Replay:
    """An OpenAI-compatible server whose answers a test writes."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        lock, closing = threading.Lock(), threading.Event()
        replay = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    replay.requests.append(body)
                    replay.keys.append(self.headers["Authorization"])
                    number = len(replay.requests)
                status, content, seconds = answer(body, number)
                closing.wait(seconds)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.closing = closing
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serving(answer: Answer) -> Iterator[Replay]:
    """A server for the time of a `with` block."""
    server = Replay(answer)
    try:
        yield server
    finally:
        server.close()


def text_of(body: dict[str, Any]) -> str:
    """The text of a request's question."""
    return next(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")
