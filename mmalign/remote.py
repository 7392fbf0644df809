"""Scorers over HTTP: the wire format, and a client that retries and never turns an outage into a number.

    GET  /v1/health            {"protocol", "scorers": {name: {"fingerprint", "range"}}}
    PUT  /v1/images/<sha256>   the image's file, whose sha256 must be the name; the server keeps the latest ones
    POST /v1/scores            {"scorer", "items": [...]} -> {"fingerprint", "scores": [...]}, or 409 {"missing": [sha256, ...]}

Everything but images is JSON, numbers travel exactly (as Python prints them), nothing is pickled. A token travels as `Authorization:
Bearer`. An image goes over the wire only when the server lacks it. Standard library at import time; the server is serve.py.
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.config import Secret
from mmalign.types import KINDS, Failure, Kind, MmalignError, Prompt, Request, Sample, Score, Value

PROTOCOL = 1
RETRIED = (408, 425, 429, 500, 502, 503, 504)
UPLOAD_ROUNDS = 3  # how often a server may ask for images of one batch: it may drop some while others arrive


class Outage(MmalignError):
    """The server gave no usable answer, however often it was asked."""

    def __init__(self, message: str, kind: Kind = "error") -> None:
        super().__init__(message)
        self.kind = kind


def pack(sample: Sample, sha: str | None) -> dict[str, Any]:
    """A sample as JSON-able data, its image by name."""
    request = sample.request
    prompt = {"id": request.prompt.id, "text": request.prompt.text, "tags": request.prompt.tags, "meta": dict(request.prompt.meta)}
    extra = {name: value for name, value in sample.extra.items() if isinstance(value, (str, int, float, bool))}
    return {"prompt": prompt, "index": request.index, "seed": request.seed, "image": sha, "answer": sample.answer, "extra": extra}


def unpack(item: Mapping[str, Any], image: Any) -> Sample:
    """The sample of `pack`, with its pixels; KeyError or TypeError when the data are of another form."""
    prompt = item["prompt"]
    asked = Prompt(str(prompt["id"]), str(prompt["text"]), tuple(prompt.get("tags", ())), dict(prompt.get("meta", {})))
    request = Request(asked, int(item["index"]), int(item["seed"]))
    return Sample(request, image, item.get("answer"), image_sha=item.get("image"), extra=dict(item.get("extra", {})))


def pack_score(score: Score) -> dict[str, Any]:
    if isinstance(score, Failure):
        return {"failure": {"kind": score.kind, "message": score.message}}
    packed = {"x": score.x, "parts": dict(score.parts), "detail": score.detail}
    if score.heatmap is not None:
        import numpy as np

        heat = np.ascontiguousarray(score.heatmap, np.float32)
        packed["heatmap"] = {"shape": heat.shape, "float32": base64.b64encode(heat.tobytes()).decode()}
    return packed


def unpack_score(packed: Any) -> Score:
    """The score of `pack_score`; anything else is a Failure of kind parse."""
    try:
        if "failure" in packed:
            kind = packed["failure"]["kind"]
            return Failure("score", kind if kind in KINDS else "error", str(packed["failure"]["message"]))
        x, parts = float(packed["x"]), {str(name): float(part) for name, part in packed.get("parts", {}).items()}
        heat = None
        if packed.get("heatmap"):
            import numpy as np

            heat = np.frombuffer(base64.b64decode(packed["heatmap"]["float32"]), np.float32).reshape(packed["heatmap"]["shape"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Failure("score", "parse", f"The server's score cannot be read ({type(error).__name__}: {error}): {str(packed)[:500]}")
    if not math.isfinite(x):
        return Failure("score", "nonfinite", f"The server gave the score {x}.")
    return Value(x, parts, heat, str(packed.get("detail", "")))


@dataclass(frozen=True)
class Client:
    """A scoring server. `timeout`: seconds for one answer; `retries`: further attempts, each after twice the pause of the one before."""

    url: str
    token: Secret = field(default_factory=lambda: Secret("MMALIGN_TOKEN"))
    timeout: float = 120.0
    retries: int = 5
    pause: float = 0.5
    max_pause: float = 30.0

    def health(self) -> dict[str, Any]:
        """What the server serves; Outage when it cannot be reached, speaks another protocol or refuses the token."""
        found = self._json("GET", "/v1/health")
        if found.get("protocol") != PROTOCOL or not isinstance(found.get("scorers"), dict):
            raise Outage(
                f"The server at {self.url} speaks protocol {found.get('protocol')}, expected {PROTOCOL}. "
                "Is it `mmalign serve` of another version?"
            )
        return found

    def score(self, scorer: str, fingerprint: str, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample, in order. An outage, or a server that has changed since `fingerprint`, fails every sample of the call."""
        named = [image_file(sample) for sample in samples]
        items = [pack(sample, file[0] if file else None) for sample, file in zip(samples, named, strict=True)]
        try:
            answer = self._ask({"scorer": scorer, "items": items}, dict(file for file in named if file))
        except Outage as outage:
            return [Failure("score", outage.kind, str(outage))] * len(samples)
        if answer.get("fingerprint") != fingerprint:
            now = answer.get("fingerprint")
            text = f"The scorer '{scorer}' at {self.url} has changed since the start: {fingerprint} then, {now} now. Run again."
            return [Failure("score", "error", text)] * len(samples)
        scores = answer.get("scores")
        if not isinstance(scores, list) or len(scores) != len(samples):
            return [Failure("score", "parse", f"The server at {self.url} did not give {len(samples)} scores: {str(answer)[:500]}")] * len(
                samples
            )
        return [unpack_score(packed) for packed in scores]

    def _ask(self, body: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
        for _ in range(UPLOAD_ROUNDS):
            answer = self._json("POST", "/v1/scores", json.dumps(body, default=str).encode(), "application/json")
            if "missing" not in answer:
                return answer
            for sha in answer["missing"]:
                if sha not in files:
                    raise Outage(f"The server at {self.url} asks for the image {sha}, which is none of this batch.")
                self._json("PUT", f"/v1/images/{sha}", files[sha], "image/png")
        raise Outage(f"The server at {self.url} keeps asking for images it was sent; raise its image memory (serve --image-memory).")

    def _json(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> dict[str, Any]:
        """One exchange, retried while the fault may pass; the last fault becomes the Outage."""
        fault = Outage("")
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.pause * 2 ** (attempt - 1), self.max_pause))
            try:
                return self._once(method, path, body, kind)
            except urllib.error.HTTPError as error:
                text = error.read(2000).decode(errors="replace")
                if error.code == 409:
                    return _object(text)
                fault = Outage(
                    f"The server at {self.url} answered {error.code} to {method} {path}: {_sentence(text)}",
                    "timeout" if error.code == 504 else "error",
                )
                if error.code not in RETRIED:
                    raise fault from error
            except TimeoutError as error:
                fault = Outage(
                    f"No answer from {self.url} to {method} {path} within {self.timeout:g} s ({attempt + 1} attempts).", "timeout"
                )
                fault.__cause__ = error
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(getattr(error, "reason", None), TimeoutError):
                    fault = Outage(
                        f"No answer from {self.url} to {method} {path} within {self.timeout:g} s ({attempt + 1} attempts).", "timeout"
                    )
                else:
                    fault = Outage(f"The server at {self.url} cannot be reached ({attempt + 1} attempts): {error}. Is it running?")
        raise fault

    def _once(self, method: str, path: str, body: bytes | None, kind: str) -> dict[str, Any]:
        headers = {"Content-Type": kind} if kind else {}
        if self.token.is_set():
            headers["Authorization"] = f"Bearer {self.token.reveal()}"
        request = urllib.request.Request(self.url.rstrip("/") + path, body, headers, method=method)
        with _opener(self.url).open(request, timeout=self.timeout) as answer:
            return _object(answer.read().decode())


def image_file(sample: Sample) -> tuple[str, bytes] | None:
    """The sha256 and the bytes of the sample's image as it goes over the wire: a PNG of its pixels, or its own encoded bytes."""
    from mmalign import images

    if sample.image is None:
        return None
    if isinstance(sample.image, Path):
        data = sample.image.read_bytes()
    else:
        data = sample.image if isinstance(sample.image, bytes) else images.encode_png(sample.image)
    return images.content_sha(data), data


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _opener(url: str) -> urllib.request.OpenerDirector:
    """A proxy that the environment names is not asked for this machine's own address."""
    own = is_loopback(urllib.parse.urlsplit(url).hostname or "")
    return urllib.request.build_opener(urllib.request.ProxyHandler({})) if own else urllib.request.build_opener()


def _object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {text[:200]}")
    return content


def _sentence(text: str) -> str:
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text[:500]
