"""Any server that draws behind /v1/images/generations: vLLM-Omni, SGLang, OpenAI. For evaluation; nothing of it can be trained.

The model is a folder with a config.json that says where the server is (fields: `Endpoint`):

    {"model_type": "openai_images", "model": "Qwen/Qwen-Image", "base_url": "http://127.0.0.1:8000/v1"}

A local server needs no key. Each request travels with its own seed, so a server that honours seeds repeats its pictures; `seed: false` is
for servers that refuse the field, such as OpenAI's. What passes (busy, restarting, too slow) is tried again; what stays becomes a Failure:
timeout, refusal (a filter declined the prompt), parse (an answer without a picture), error. A wrong key or an unknown model ends the run.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmalign import config, hub
from mmalign.config import Secret
from mmalign.images import ImageError, decode_image
from mmalign.types import Failure, MmalignError, Request, Sample, UsageError, digest

NEEDS = ("endpoint",)
FATAL = (401, 403, 404)
BUSY = (408, 409, 425, 429)
FILTERED = ("content_filter", "content_policy_violation", "moderation_blocked", "safety")
KEPT = 500  # characters of a server's answer that a Failure keeps
FIELDS = {"steps": "num_inference_steps", "guidance": "guidance_scale", "negative": "negative_prompt"}  # as vLLM-Omni and SGLang name them


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; what is None is left to the server. OpenAI's own models know none of them."""

    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None


@dataclass(frozen=True)
class Endpoint:
    """Where the server is and how it is asked. `timeout`: seconds of one attempt; `patience`: of a request with all its attempts.

    `response_format` "" leaves the field out, for models that always answer with the picture itself. `extra`: further fields of the body.
    """

    model: str
    base_url: str = ""
    key: Secret = field(default_factory=lambda: Secret("OPENAI_API_KEY"))
    response_format: str = "b64_json"
    seed: bool = True
    concurrency: int = 8
    timeout: float = 600.0
    patience: float = 1800.0
    retries: int = 4
    pause: float = 1.0
    max_pause: float = 60.0
    extra: Mapping[str, Any] = field(default_factory=dict)


class OpenAIImages:
    """A connection to the server. Its state is the client."""

    family = "openai_images"
    capabilities = frozenset({"image"})
    determinism = "none"

    def __init__(self, path: Path, endpoint: Endpoint) -> None:
        import openai

        self.endpoint, self.name = endpoint, path.resolve().name
        self.settings: Mapping[str, Any] = asdict(Sampling())
        self.fingerprint = digest(self.family, endpoint.model, endpoint.base_url, endpoint.seed, dict(endpoint.extra))
        key = endpoint.key.reveal() if not endpoint.base_url or endpoint.key.is_set() else "none"
        self._client = openai.OpenAI(api_key=key, base_url=endpoint.base_url or None, timeout=endpoint.timeout, max_retries=0)

    def generate(self, requests: Sequence[Request]) -> list[Sample | Failure]:
        """One picture or failure per request, in order; `concurrency` of them are under way together."""
        with ThreadPoolExecutor(max(1, min(self.endpoint.concurrency, len(requests)))) as pool:
            return list(pool.map(self._one, requests))

    def _one(self, request: Request) -> Sample | Failure:
        import openai

        endpoint, started = self.endpoint, time.monotonic()
        for attempt in range(1, endpoint.retries + 2):
            pause = min(endpoint.pause * 2 ** (attempt - 1), endpoint.max_pause)
            tried = f"({attempt} attempt{'s' if attempt > 1 else ''})"
            try:
                return self._read(request, self._send(request), time.monotonic() - started)
            except openai.APITimeoutError:
                fault = Failure("generate", "timeout", f"{self._where} drew nothing within {endpoint.timeout:g} s {tried}.")
            except openai.APIConnectionError as error:
                fault = Failure("generate", "error", f"{self._where} cannot be reached {tried}: {error}.")
            except openai.APIStatusError as error:
                if error.status_code in FATAL:
                    raise MmalignError(
                        f"{self._where} refuses: {error.status_code} {error.message[:KEPT]}. Check model, base_url and the key."
                    ) from error
                if any(word in str(error.body) for word in FILTERED):
                    return Failure("generate", "refusal", f"{self._where} declined the prompt: {str(error.body)[:KEPT]}")
                fault = Failure("generate", "error", f"{self._where} answered {error.status_code} {tried}: {error.message[:KEPT]}")
                if error.status_code < 500 and error.status_code not in BUSY:
                    return fault
                pause = _asked_pause(error.response.headers.get("retry-after"), pause)
            except (openai.OpenAIError, ValueError) as error:  # an answer that is not of the API's form
                fault = Failure("generate", "parse", f"{self._where} answered without a picture {tried}: {str(error)[:KEPT]}")
            if attempt > endpoint.retries or time.monotonic() - started + pause > endpoint.patience:
                break
            time.sleep(pause)
        return fault

    @property
    def _where(self) -> str:
        return f"The image server {self.endpoint.model} at {self.endpoint.base_url or 'OpenAI'}"

    def _send(self, request: Request) -> Any:
        chosen = asdict(config.build(Sampling, {**self.settings, **request.settings}, f"settings of {request.id}"))
        body = {FIELDS[name]: value for name, value in chosen.items() if value is not None}
        if self.endpoint.seed:
            body["seed"] = request.seed % 2**31  # servers keep it in a signed 32-bit number
        typed: dict[str, Any] = {"response_format": self.endpoint.response_format} if self.endpoint.response_format else {}
        if request.size:
            typed["size"] = f"{request.size[1]}x{request.size[0]}"  # the API says width first
        extra = {**self.endpoint.extra, **body}
        return self._client.images.generate(model=self.endpoint.model, prompt=request.prompt.text, n=1, extra_body=extra or None, **typed)

    def _read(self, request: Request, answer: Any, seconds: float) -> Sample | Failure:
        """The picture of an answer; ValueError when there is none to read."""
        data = getattr(answer, "data", None)
        if not data:
            raise ValueError(f"no data in {str(answer)[:KEPT]}")
        if not data[0].b64_json:
            raise ValueError("the picture is behind a link; set response_format to b64_json in config.json")
        try:
            image = decode_image(base64.b64decode(data[0].b64_json, validate=True))
        except (binascii.Error, ImageError) as error:
            raise ValueError(f"the picture cannot be read: {error}") from error
        if request.size and image.shape[:2] != tuple(request.size):
            asked, got = ("{} x {}".format(*size) for size in (request.size, image.shape[:2]))
            return Failure(
                "generate", "error", f"{self._where} drew {got} pixels (height x width) for {request.id}, which asks for {asked}."
            )
        revised = getattr(data[0], "revised_prompt", None)
        extra = {"revised_prompt": revised} if revised and revised != request.prompt.text else {}
        return Sample(request, image=image, seconds=seconds, extra=extra)


def recognises(path: Path) -> bool:
    """Whether the folder's config.json describes such a server."""
    try:
        content = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("model_type") == "openai_images"


def load(path: Path, *, device: str = "cpu", dtype: str = "float32", extra: Mapping[str, Path] | None = None) -> OpenAIImages:
    """A connection to the server that the folder's config.json describes. Device and dtype are the server's own business."""
    if extra:
        raise UsageError(f"An image server has no extra parts; got {', '.join(sorted(extra))}.")
    fields = {name: value for name, value in hub.read_config(Path(path)).items() if name != "model_type"}
    return OpenAIImages(Path(path), config.build(Endpoint, fields, f"{path}/config.json"))


def _asked_pause(header: str | None, pause: float) -> float:
    """The pause that the server asks for, in seconds, if it does."""
    try:
        return max(pause, float(header)) if header else pause
    except ValueError:
        return pause
