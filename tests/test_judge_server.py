"""The judge's client against a real OpenAI-compatible server: `transformers serve` with the bundled vision-language model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mmalign
from mmalign.judge import Endpoint, Judge, Question, Reply

MODEL = Path(mmalign.__file__).parent / "testbed" / "checkpoints" / "tiny-janus"
SERVE = "from transformers.cli.transformers import main; main()"
SECONDS_TO_START = 300
PICTURE_TOKENS = 64

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server in a process of its own; it needs no network and no GPU."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="`transformers serve` needs fastapi and uvicorn, which the extra [test] brings")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    words = ["serve", str(MODEL), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as out:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen([sys.executable, "-c", SERVE, *words], stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end:
        assert server.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"the server gave no sign of life:\n{log.read_text()[-3000:]}")


def picture(colour: tuple[int, int, int]) -> np.ndarray:
    """A square of one colour on white."""
    image = np.full((32, 32, 3), 255, np.uint8)
    image[8:24, 8:24] = colour
    return image


def test_a_real_server_is_shown_the_picture_and_gives_what_the_client_records(url: str) -> None:
    judge = Judge(Endpoint(str(MODEL), base_url=url, max_tokens=16, retries=0, timeout=120.0, concurrency=2))
    red, blue = (Question("describe the image", (picture(colour),)) for colour in ((220, 30, 30), (30, 60, 220)))
    first, second, again = judge.ask([red, blue, red])
    assert isinstance(first, Reply) and isinstance(second, Reply) and isinstance(again, Reply), (first, second, again)
    assert first.text != second.text, "the reply follows the picture"
    assert first.text == again.text, "temperature 0 reached the server"
    assert first.prompt_tokens == second.prompt_tokens > PICTURE_TOKENS and 0 < first.answer_tokens <= 16
    assert "tiny-janus" in first.model and judge.usage.models == {first.model: 3}
    assert judge.usage.answer_tokens == first.answer_tokens + second.answer_tokens + again.answer_tokens


def test_a_limit_a_system_message_and_jpeg_reach_the_server(url: str) -> None:
    judge = Judge(Endpoint(str(MODEL), base_url=url, max_tokens=2, retries=0, timeout=120.0, image="jpeg"))
    plain = Question("describe the image", (picture((30, 60, 220)),), is_text_first=True)
    told = Question(plain.text, plain.images, system="you are a strict judge", is_text_first=True)
    short, instructed = judge.ask([plain, told])
    assert isinstance(short, Reply) and isinstance(instructed, Reply), (short, instructed)
    assert short.answer_tokens == 2 and short.is_cut
    assert instructed.prompt_tokens > short.prompt_tokens
