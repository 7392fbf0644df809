"""Pictures from a real local server: what is sent, what comes back, faults that pass, faults that stay, refusals."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from mmalign import hub
from mmalign.images import encode_png
from mmalign.models import openai_images as family
from mmalign.types import Failure, MmalignError, Prompt, Request, Sample, UsageError


def picture(seed=0, height=8, width=12):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def drawn(image, **more):
    return 200, {"created": 1, "data": [{"b64_json": base64.b64encode(encode_png(image)).decode(), **more}]}


@pytest.fixture
def serve(tmp_path):
    """Opens a server whose answers a test writes; gives a loaded model and the list of requests it got."""
    opened, closing = [], threading.Event()

    def open_one(answer, **options):
        asked, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    asked.append((self.path, body))
                    number = len(asked)
                made = answer(body, number)
                if made is None:  # silence until the test ends
                    closing.wait(60)
                    return
                data = made[1] if isinstance(made[1], bytes) else json.dumps(made[1]).encode()
                self.send_response(made[0])
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format, *args): ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        opened.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        folder = tmp_path / f"server-{len(opened)}"
        folder.mkdir()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        content = {"model_type": "openai_images", "model": "painter", "base_url": url, "pause": 0.01, "retries": 2, "timeout": 30.0}
        (folder / "config.json").write_text(json.dumps(content | options))
        return family.load(folder), asked

    yield open_one
    closing.set()
    for server in opened:
        server.shutdown()
        server.server_close()


def request(text="a red circle", seed=7, size=(8, 12), **settings):
    return Request(Prompt("p", text), 0, seed, size, settings)


def test_the_request_is_as_written_and_the_picture_comes_back_to_the_bit(serve):
    model, asked = serve(lambda body, number: drawn(picture(3), revised_prompt="a crimson circle"), extra={"quality": "high"})
    (made,) = model.generate([request(seed=2**40 + 5, steps=20, guidance=4.5)])
    assert isinstance(made, Sample) and np.array_equal(made.image, picture(3)) and made.extra == {"revised_prompt": "a crimson circle"}
    ((path, body),) = asked
    assert path == "/v1/images/generations"
    assert body == {
        "model": "painter",
        "prompt": "a red circle",
        "n": 1,
        "size": "12x8",
        "response_format": "b64_json",
        "seed": 5,
        "num_inference_steps": 20,
        "guidance_scale": 4.5,
        "quality": "high",
    }


def test_a_server_that_takes_no_seed_and_no_format_gets_none(serve):
    model, asked = serve(lambda body, number: drawn(picture()), seed=False, response_format="")
    model.generate([request(size=None)])
    assert set(asked[0][1]) == {"model", "prompt", "n"}


def test_many_requests_keep_their_order_and_run_at_once(serve):
    barrier = threading.Barrier(4, timeout=60)

    def answer(body, number):
        if number <= 4:
            barrier.wait()  # passes only when four requests are under way together
        return drawn(picture(int(body["prompt"])))

    model, _ = serve(answer, concurrency=4)
    made = model.generate([request(str(n)) for n in range(9)])
    assert all(np.array_equal(sample.image, picture(n)) for n, sample in enumerate(made))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_fault_is_retried(serve, status):
    model, asked = serve(lambda body, number: (status, {"error": {"message": "busy"}}) if number < 3 else drawn(picture()))
    assert isinstance(model.generate([request()])[0], Sample) and len(asked) == 3


@pytest.mark.parametrize(
    ("answer", "kind", "words", "attempts"),
    [
        ((503, {"error": {"message": "starting"}}), "error", r"answered 503 \(3 attempts\)", 3),
        ((400, {"error": {"message": "size is odd"}}), "error", "size is odd", 1),
        ((400, {"error": {"message": "no", "code": "content_policy_violation"}}), "refusal", "declined the prompt", 1),
        ((200, {"created": 1, "data": []}), "parse", "no data", 3),
        ((200, {"created": 1, "data": [{"url": "http://x/y.png"}]}), "parse", "response_format", 3),
        ((200, {"created": 1, "data": [{"b64_json": "bm8gcGljdHVyZQ=="}]}), "parse", "cannot be read", 3),
        (drawn(picture(height=9)), "error", "drew 9 x 12 pixels", 1),
    ],
)
def test_what_stays_is_a_typed_failure(serve, answer, kind, words, attempts):
    import re

    model, asked = serve(lambda body, number: answer)
    (made,) = model.generate([request()])
    assert isinstance(made, Failure) and (made.stage, made.kind) == ("generate", kind)
    assert re.search(words, made.message) and len(asked) == attempts


def test_one_bad_request_leaves_the_others_alone(serve):
    model, _ = serve(lambda body, number: (400, {"error": {"message": "odd"}}) if body["prompt"] == "bad" else drawn(picture()))
    made = model.generate([request(), request("bad"), request()])
    assert [isinstance(sample, Sample) for sample in made] == [True, False, True]


def test_silence_is_a_timeout(serve):
    model, _ = serve(lambda body, number: None, timeout=0.3, retries=0)
    (made,) = model.generate([request()])
    assert isinstance(made, Failure) and made.kind == "timeout" and "within 0.3 s" in made.message


def test_a_server_that_is_not_there_is_an_error(serve, tmp_path):
    content = {"model_type": "openai_images", "model": "m", "base_url": "http://127.0.0.1:9/v1", "retries": 0}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (made,) = family.load(tmp_path).generate([request()])
    assert isinstance(made, Failure) and made.kind == "error" and "cannot be reached" in made.message


@pytest.mark.parametrize("status", [401, 404])
def test_what_no_retry_mends_ends_the_run(serve, status):
    model, asked = serve(lambda body, number: (status, {"error": {"message": "who?"}}))
    with pytest.raises(MmalignError, match="Check model"):
        model.generate([request()])
    assert len(asked) == 1


def test_a_folder_names_the_server_and_wrong_options_are_sentences(serve, tmp_path):
    model, _ = serve(lambda body, number: drawn(picture()))
    spec = hub.resolve_model(str(tmp_path / "server-1"))
    assert spec.family == "openai_images" and spec.name == model.name == "server-1"
    other, _ = serve(lambda body, number: drawn(picture()), model="another")
    assert other.fingerprint != model.fingerprint
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "openai_images", "model": "m", "retrys": 1}))
    with pytest.raises(UsageError, match="retries"):
        family.load(tmp_path)
