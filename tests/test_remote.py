"""Scorers over real loopback sockets: equal values, uploads, joined batches, faults, tokens, outages; adapters with stand-in packages."""

from __future__ import annotations

import http.client
import json
import math
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import tiny_questions as tiny

from mmalign import registry, remote, serve
from mmalign.config import Secret
from mmalign.reward import load_scorer
from mmalign.scorers import deqa, unipercept
from mmalign.scorers import remote as client
from mmalign.types import Failure, MmalignError, Sample, UsageError, Value
from mmalign.worker import Recipe

FAKES = Path(__file__).parent / "fakes"
SLOW = '''"""A scorer that waits, counts its batches, fails on demand and draws a map."""
import threading, time
from dataclasses import dataclass
import numpy as np
from mmalign.types import Failure, Value

BATCHES = []
GATE = threading.Event()
GATE.set()

@dataclass(frozen=True)
class Config:
    version: int = 1

class Slow:
    name, range = "waiting", (float("-inf"), 1.0)
    def __init__(self, config):
        self.fingerprint = f"waiting-{config.version}"
    def score(self, samples):
        BATCHES.append(len(samples))
        GATE.wait(30)
        texts = [sample.request.prompt.text for sample in samples]
        if "raise" in texts:
            raise RuntimeError("broken for good")
        third = np.arange(6, dtype=np.float32).reshape(2, 3) / 3
        no = Failure("score", "refusal", "no")
        return [no if text == "refuse" else Value(0.1 + 0.2, {"n": len(text)}, third, text) for text in texts]

def load(config, device="cpu"):
    return Slow(config)
'''


@pytest.fixture(scope="module")
def plug(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plug") / "waiting.py"
    path.write_text(SLOW)
    return path


def recipe(name: str, *plugs: Path, **options: Any) -> Recipe:
    return Recipe(registry.find("scorers", name, plugs), options)


@pytest.fixture(autouse=True)
def no_token(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMALIGN_TOKEN", raising=False)


@pytest.fixture
def server(plug) -> Iterator[serve.Server]:
    recipes = {"waiting": recipe("waiting", plug), "brightness": recipe("brightness", FAKES / "brightness.py")}
    with serve.Server(recipes, serve.Settings(port=0, batch_size=4, timeout=5.0)) as running:
        module = sys.modules[recipes["waiting"].entry.module]
        module.BATCHES.clear()
        module.GATE.set()
        running.module = module  # type: ignore[attr-defined]
        yield running


def connect(url: str, scorer: str = "waiting", **options: Any) -> client.RemoteScorer:
    made = client.load(client.Config(**{"url": url, "scorer": scorer, "retries": 2, "timeout": 20.0} | options))
    return client.RemoteScorer(
        **{**vars(made), "client": remote.Client(url, timeout=made.client.timeout, retries=made.client.retries, pause=0.01)}
    )


def test_a_remote_value_is_the_local_one_bit_for_bit(server):
    samples = tiny.seven()
    local = load_scorer("brightness", plugs=[FAKES / "brightness.py"])
    far = connect(server.url, "brightness", batch_size=3)
    assert far.score(samples) == local.score(samples)
    assert far.range == local.range and far.fingerprint != local.fingerprint


def test_parts_details_maps_failures_and_open_ranges_travel(server):
    far = connect(server.url)
    good, refused = far.score([tiny.sample("a car", 1), tiny.sample("refuse", 2)])
    assert (good.x, good.parts, good.detail) == (0.1 + 0.2, {"n": 5.0}, "a car")
    assert np.array_equal(good.heatmap, np.arange(6, dtype=np.float32).reshape(2, 3) / 3)
    assert refused == Failure("score", "refusal", "no")
    assert far.range == (-math.inf, 1.0)


def test_one_bad_item_fails_alone(server):
    scores = connect(server.url).score([tiny.sample(text, at) for at, text in enumerate(["a", "b", "raise", "c"])])
    assert [isinstance(score, Value) for score in scores] == [True, True, False, True] and "broken for good" in scores[2].message


def test_an_unreadable_image_is_a_failure_and_is_not_sent(server):
    scores = connect(server.url).score(
        [tiny.sample("a", 1, image=b"none"), tiny.sample("b", 2), tiny.sample("c", 3, image=np.zeros((1, 1, 3), np.uint8))]
    )
    assert [type(score) for score in scores] == [Failure, Value, Failure]
    assert len(server.images._held) == 1


def test_an_image_goes_over_the_wire_once(server, monkeypatch):
    sent = []
    real = remote.Client._once
    monkeypatch.setattr(remote.Client, "_once", lambda self, method, *rest: (sent.append(method), real(self, method, *rest))[1])
    far = connect(server.url)
    far.score([tiny.sample("a", 1), tiny.sample("b", 1)])
    far.score([tiny.sample("c", 1)])
    assert sent.count("PUT") == 1


def test_a_small_memory_forgets_the_oldest_image(plug):
    with serve.Server({"waiting": recipe("waiting", plug)}, serve.Settings(port=0, image_memory=2 * 40 * 56 * 3)) as running:
        far = connect(running.url, batch_size=2, concurrency=1)
        assert all(isinstance(score, Value) for score in far.score(tiny.seven()))
        assert len(running.images._held) == 2


def test_batches_of_several_clients_are_joined(server):
    server.module.GATE.clear()
    far = connect(server.url, batch_size=1, concurrency=5)
    threads = [threading.Thread(target=far.score, args=([tiny.sample("x", at)],)) for at in range(5)]
    for thread in threads:
        thread.start()
    desk = server.desks["waiting"]
    while desk._waiting.qsize() + sum(server.module.BATCHES) < 5:
        threads[0].join(0.01)
    server.module.GATE.set()
    for thread in threads:
        thread.join()
    assert sum(server.module.BATCHES) == 5 and max(server.module.BATCHES) > 1 and max(server.module.BATCHES) <= 4


def test_a_slow_scorer_is_a_timeout_and_never_a_zero(plug, server):
    server.module.GATE.clear()
    far = connect(server.url, timeout=0.3, retries=1)
    (score,) = far.score([tiny.sample("a", 1)])
    server.module.GATE.set()
    assert isinstance(score, Failure) and score.kind == "timeout" and "within 0.3 s (2 attempts)" in score.message


def test_the_server_gives_up_in_its_own_time(plug):
    with serve.Server({"waiting": recipe("waiting", plug)}, serve.Settings(port=0, timeout=0.2)) as running:
        module = sys.modules[recipe("waiting", plug).entry.module]
        module.GATE.clear()
        (score,) = connect(running.url, retries=0).score([tiny.sample("a", 1)])
        module.GATE.set()
    assert isinstance(score, Failure) and score.kind == "timeout" and "did not answer within 0.2 s" in score.message


def test_an_outage_in_the_middle_is_a_failure_per_sample_and_passes_with_a_new_server(plug):
    running = serve.Server({"waiting": recipe("waiting", plug)}, serve.Settings(port=0)).start()
    port = running.server_address[1]
    far = connect(running.url)
    assert isinstance(far.score([tiny.sample("a", 1)])[0], Value)
    running.stop()
    down = far.score([tiny.sample("a", 1), tiny.sample("b", 2)])
    assert [score.kind for score in down] == ["error", "error"] and "cannot be reached (3 attempts)" in down[0].message
    with serve.Server({"waiting": recipe("waiting", plug)}, serve.Settings(port=port)):
        assert isinstance(far.score([tiny.sample("a", 1)])[0], Value), "the images are sent anew, as the new server has none"


def test_a_scorer_that_changed_since_the_start_gives_no_numbers(plug):
    running = serve.Server({"waiting": recipe("waiting", plug)}, serve.Settings(port=0)).start()
    port, far = running.server_address[1], connect(running.url)
    running.stop()
    with serve.Server({"waiting": recipe("waiting", plug, version=2)}, serve.Settings(port=port)):
        (score,) = far.score([tiny.sample("a", 1)])
    assert isinstance(score, Failure) and "has changed since the start: waiting-1 then, waiting-2 now" in score.message


# -- faults on the wire: a stand-in server


class Faulty:
    """Answers /v1/health well and everything else as told."""

    def __init__(self, answer: Callable[[int], tuple[int, bytes] | None]) -> None:
        self.count = 0
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                scorers = {"waiting": {"fingerprint": "f", "range": [None, 1]}}
                self.give(200, json.dumps({"protocol": 1, "scorers": scorers}).encode())

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.give(201, b"{}")

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                faulty.count += 1
                told = answer(faulty.count)
                if told is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                else:
                    self.give(*told)

            def give(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> Faulty:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


OK = (200, b'{"fingerprint": "f", "scores": [{"x": 0.5}]}')


@pytest.mark.parametrize("fault", [(500, b"traceback"), (503, b'{"error": "busy"}'), (429, b"{}"), None, (200, b'{"scores": [')])
def test_a_passing_fault_is_retried(fault):
    with Faulty(lambda number: fault if number < 3 else OK) as faulty:
        assert connect(faulty.url).score([tiny.sample("a", 1)]) == [Value(0.5)]
        assert faulty.count == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ((500, b'{"error": "no memory"}'), "answered 500 .*no memory"),
        ((400, b'{"error": "bad form"}'), "answered 400 .*bad form"),
        (None, "cannot be reached"),
        ((200, b"[]"), "expected a JSON object"),
        ((200, b'{"fingerprint": "f", "scores": []}'), "did not give 1 scores"),
        ((200, b'{"fingerprint": "f", "scores": [{"x": "high"}]}'), "cannot be read"),
        ((200, b'{"fingerprint": "f", "scores": [{"x": NaN}]}'), "gave the score nan"),
        ((200, b'{"fingerprint": "f", "scores": [7]}'), "cannot be read"),
        ((409, b'{"missing": ["abc"]}'), "none of this batch"),
    ],
)
def test_a_lasting_fault_is_a_failure_and_never_a_number(fault, words):
    with Faulty(lambda number: fault) as faulty:
        (score,) = connect(faulty.url).score([tiny.sample("a", 1)])
    assert isinstance(score, Failure)
    assert re.search(words, score.message), score.message


def test_connecting_to_nothing_or_to_the_wrong_scorer_is_a_sentence(server):
    with pytest.raises(MmalignError, match="cannot be reached"):
        client.load(client.Config(url="http://127.0.0.1:9", retries=0))
    with pytest.raises(MmalignError, match="does not serve 'hpsv9'; it serves brightness, waiting"):
        client.load(client.Config(url=server.url, scorer="hpsv9"))
    with pytest.raises(UsageError, match="choose one with --set remote.scorer=NAME"):
        client.load(client.Config(url=server.url))


# -- who may


def test_beyond_loopback_a_token_is_required(monkeypatch):
    with pytest.raises(UsageError, match="no token is set. Export MMALIGN_TOKEN"):
        serve.Settings(host="0.0.0.0")
    monkeypatch.setenv("MMALIGN_TOKEN", "open-sesame")
    assert serve.Settings(host="0.0.0.0").host == "0.0.0.0"
    assert serve.Settings().host == "127.0.0.1"


def test_a_wrong_token_is_refused_and_the_right_one_admitted(plug, monkeypatch):
    monkeypatch.setenv("SERVER_TOKEN", "open-sesame")
    monkeypatch.setenv("GOOD", "open-sesame")
    monkeypatch.setenv("BAD", "open-barley")
    with serve.Server({"waiting": recipe("waiting", plug)}, serve.Settings(port=0, token=Secret("SERVER_TOKEN"))) as running:
        assert client.load(client.Config(url=running.url, token=Secret("GOOD"))).scorer == "waiting"
        for name in ("BAD", "ABSENT"):
            with pytest.raises(MmalignError, match="401 .*token is absent or wrong") as caught:
                client.load(client.Config(url=running.url, token=Secret(name), retries=0))
            assert "open-sesame" not in str(caught.value)
        good = remote.Client(running.url, Secret("GOOD"))
        bad = remote.Client(running.url, Secret("BAD"), retries=0)
        fingerprint = good.health()["scorers"]["waiting"]["fingerprint"]
        assert isinstance(good.score("waiting", fingerprint, [tiny.sample("a", 1)])[0], Value)
        assert isinstance(bad.score("waiting", fingerprint, [tiny.sample("a", 1)])[0], Failure)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/", b"", {}, 404),
        ("GET", "/v1/health", b"", {"Origin": "http://evil"}, 403),
        ("POST", "/v1/scores", b"{}", {}, 400),
        ("POST", "/v1/scores", b"not json", {}, 400),
        ("POST", "/v1/scores", b'{"scorer": "none", "items": []}', {}, 404),
        ("POST", "/v1/scores", b'{"scorer": "waiting", "items": [{}]}', {}, 400),
        ("PUT", "/v1/images/abc", b"xyz", {}, 400),
        ("PUT", "/v1/images/3608bca1e44ea6c4d268eb6db02260269892c0b42b86bbf1e77a6fa16c3c9282", b"xyz", {}, 422),
        ("PUT", "/v1/other", b"xyz", {}, 404),
        ("POST", "/v1/scores", b"", {"Content-Length": "99999999999"}, 413),
        ("POST", "/v1/scores", b"", {"Content-Length": "-5"}, 411),
    ],
)
def test_every_bad_request_gets_a_status_and_a_sentence_and_the_server_lives(server, method, path, body, headers, status):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    assert answer.status == status and json.loads(answer.read())["error"]
    connection.close()
    assert isinstance(connect(server.url).score([tiny.sample("a", 1)])[0], Value)


# -- adapters


ADAPTERS = Path(remote.__file__).parent / "adapters"


def test_deqa_is_served_by_its_adapter(monkeypatch):
    class Model:
        config = SimpleNamespace(_commit_hash="abc")

        def score(self, images: list[Any]) -> list[float]:
            return [1 + 4 * np.asarray(image).mean() / 255 for image in images]

    asked = {}
    fake = SimpleNamespace(
        AutoModelForCausalLM=SimpleNamespace(from_pretrained=lambda name, **options: asked.update(options, name=name) or Model())
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    served = {"deqa_server": recipe("deqa_server", ADAPTERS / "deqa_server.py")}
    with serve.Server(served, serve.Settings(port=0)) as running:
        scorer = deqa.load(deqa.Config(url=running.url))
        sample = tiny.sample("any", 3)
        good, none = scorer.score([sample, Sample(sample.request)])
    assert asked["name"] == "zhiyuanyou/DeQA-Score-Mix3" and asked["trust_remote_code"] and asked["revision"] == "main"
    rating = 1 + 4 * sample.image.mean() / 255
    assert good == Value(pytest.approx(rating / 5), {"rating": pytest.approx(rating)}) and none.kind == "missing"
    assert scorer.range == (0.2, 1.0)


def test_unipercept_is_served_by_its_adapter(monkeypatch):
    class Inferencer:
        def __init__(self, device: str) -> None: ...

        def reward(self, image_paths: list[str]) -> list[Any]:
            from PIL import Image

            means = [float(np.asarray(Image.open(path)).mean()) for path in image_paths]
            return [{"iaa": mean / 4, "iqa": mean / 5, "ista": mean / 6} if mean > 1 else None for mean in means]

    monkeypatch.setitem(sys.modules, "unipercept_reward", SimpleNamespace(UniPerceptRewardInferencer=Inferencer))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0.3")
    served = {"unipercept_server": recipe("unipercept_server", ADAPTERS / "unipercept_server.py")}
    samples = [tiny.sample("any", 3), tiny.sample("dark", 4, image=np.zeros((20, 20, 3), np.uint8))]
    with serve.Server(served, serve.Settings(port=0)) as running:
        scores = {
            rating: unipercept.load(unipercept.Config(url=running.url, rating=rating)).score(samples) for rating in ("mean", "quality")
        }
    mean = samples[0].image.mean()
    parts = {"aesthetics": mean / 4, "quality": mean / 5, "structure": mean / 6}
    assert scores["mean"][0].parts == pytest.approx(parts) and scores["mean"][0].x == pytest.approx(sum(parts.values()) / 3)
    assert scores["quality"][0].x == pytest.approx(mean / 5)
    assert scores["mean"][1].kind == "error"
