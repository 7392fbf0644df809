"""VLM judges behind an OpenAI-compatible endpoint: many questions at once, retried, counted, and every failure typed.

A question gives a Reply or a Failure: `timeout` (no answer in time), `refusal` (the model or its filter declines), `parse` (an answer that
says nothing, or that the caller cannot read: `read`, which keeps the raw reply in the message), `error` (the endpoint is down or faulty
after all retries). What no retry can mend (a wrong key, an unknown model) ends the run with an MmalignError. The model that a reply names
is recorded, because an alias such as gpt-4o moves. The client is the `openai` package; it is imported with the first question.
"""

from __future__ import annotations

import base64
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mmalign import reach
from mmalign.config import Secret
from mmalign.types import Failure, MmalignError

T = TypeVar("T")
ImageKind = Literal["png", "jpeg", "jpeg75"]  # without loss; JPEG of quality 95; of 75, which is PIL's own default

KEPT = 2000  # characters of a raw reply that a Failure's message keeps
FATAL = (401, 403, 404)
OPENAI = "https://api.openai.com"
DATED = re.compile(r"-(?:\d{4}-\d{2}-\d{2}|\d{4})$")
_DECLINES = (
    r"i(?:'|’)?m sorry|i am sorry|i apologi[sz]e|i can(?:'|’)?t|i cannot|i won(?:'|’)t"
    r"|i(?:'|’)m (?:not able|unable)|i am (?:not able|unable)"
)
_TO = "assist|help|comply|provide|evaluate|analy[sz]e|discuss|view|process|rate|fulfil|do that|continue|describe"
REFUSAL = re.compile(rf"\b(?:{_DECLINES})\b[^.]{{0,120}}\b(?:{_TO})", re.IGNORECASE)
FILTERED = ("content_filter", "content_policy_violation", "responsible_ai_policy_violation", "moderation_blocked")


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is and how it is asked. `base_url` "" is OpenAI's own; a local server needs no key.

    `timeout`: seconds for one attempt; `patience`: for a question with all its attempts. `extra`: further fields of the request's body.
    `top_logprobs`: how many likeliest first tokens a reply names with their log-probabilities.
    """

    model: str
    base_url: str = ""
    key: Secret = field(default_factory=lambda: Secret("OPENAI_API_KEY"))
    temperature: float = 0.0
    max_tokens: int = 1024
    image: ImageKind = "png"
    concurrency: int = 16
    timeout: float = 120.0
    patience: float = 900.0
    retries: int = 6
    pause: float = 1.0
    max_pause: float = 60.0
    top_logprobs: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """What the judge is shown: images (uint8 [H, W, 3]), then the text; or the text first, where a protocol has it so."""

    text: str
    images: tuple[Any, ...] = ()
    system: str = ""
    is_text_first: bool = False


@dataclass(frozen=True)
class Reply:
    """What it said. `model`: the id that the endpoint returned; `is_cut`: it ran into max_tokens."""

    text: str
    model: str
    prompt_tokens: int = 0
    answer_tokens: int = 0
    is_cut: bool = False
    attempts: int = 1
    first_token: Mapping[str, float] = field(default_factory=dict)  # text -> log-probability, when top_logprobs asks for it


@dataclass
class Usage:
    """What all questions so far took."""

    questions: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    models: Counter[str] = field(default_factory=Counter)


def absence(model: str, base_url: str, key: str) -> str:
    """Why a judge cannot be asked at all, and the remedy, in whole sentences; "" when it can. Takes seconds and puts no question to it.

    `key` is the name of the secret that opens OpenAI's own endpoint.
    """
    if not base_url and not Secret(key).is_set():
        return f"The judge {model} at OpenAI needs a key. Export {key}, put it into .env, or name a server of your own with base_url."
    silence = reach.silence(base_url or OPENAI)
    if not silence:
        return ""
    remedy = f"Start it there (`vllm serve {model}`), or name another with base_url." if base_url else "Bring this machine online."
    return f"The judge {model} cannot be asked: {silence}. {remedy}"


def is_alias(model: str, base_url: str) -> bool:
    """Whether a name of OpenAI's bears no date, so that another model may answer to it tomorrow."""
    return not base_url and DATED.search(model) is None


class Judge:
    """A connection to an endpoint. Its state is the client and the usage so far."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.usage = endpoint, Usage()
        self._lock = threading.Lock()
        self._client: Any = None

    def ask(self, questions: Sequence[Question]) -> list[Reply | Failure]:
        """One reply or failure per question, in order. MmalignError when the endpoint refuses the key or does not know the model."""
        self._connect()
        with ThreadPoolExecutor(max(1, min(self.endpoint.concurrency, len(questions)))) as pool:
            return list(pool.map(self._one, questions))

    def _connect(self) -> None:
        if self._client is not None:
            return
        import openai

        endpoint = self.endpoint
        key = endpoint.key.reveal() if not endpoint.base_url or endpoint.key.is_set() else "none"
        self._client = openai.OpenAI(api_key=key, base_url=endpoint.base_url or None, timeout=endpoint.timeout, max_retries=0)

    def _one(self, question: Question) -> Reply | Failure:
        import openai

        started, fault = time.monotonic(), Failure("score", "error", "not asked")
        for attempt in range(1, self.endpoint.retries + 2):
            with self._lock:
                self.usage.attempts += 1
            pause = min(self.endpoint.pause * 2 ** (attempt - 1), self.endpoint.max_pause)
            try:
                return self._count(_reply(self._send(question), attempt))
            except openai.APITimeoutError:
                fault = Failure(
                    "score", "timeout", f"{self._where} gave no answer within {self.endpoint.timeout:g} s ({attempt} attempts)."
                )
            except openai.APIConnectionError as error:
                fault = Failure("score", "error", f"{self._where} cannot be reached ({attempt} attempts): {error}.")
            except openai.APIStatusError as error:
                if error.status_code in FATAL:
                    raise MmalignError(
                        f"{self._where} refuses: {error.status_code} {error.message}. Check the model's name, the URL and the key."
                    ) from error
                if any(word in str(error.body) for word in FILTERED):
                    return Failure("score", "refusal", f"{self._where} filtered the question: {str(error.body)[:KEPT]}")
                fault = Failure(
                    "score", "error", f"{self._where} answered {error.status_code} ({attempt} attempts): {error.message[:KEPT]}"
                )
                if error.status_code < 500 and error.status_code not in (408, 409, 425, 429):
                    return fault
                pause = _asked_pause(error.response.headers.get("retry-after"), pause)
            except (openai.OpenAIError, ValueError) as error:  # an answer that is not of the API's form
                fault = Failure("score", "parse", f"{self._where} gave an answer that is no chat completion: {str(error)[:KEPT]}")
            if attempt > self.endpoint.retries or time.monotonic() - started + pause > self.endpoint.patience:
                break
            time.sleep(pause)
        return fault

    @property
    def _where(self) -> str:
        return f"The judge {self.endpoint.model} at {self.endpoint.base_url or 'OpenAI'}"

    def _send(self, question: Question) -> Any:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image, self.endpoint.image)}} for image in question.images
        ]
        content.insert(0 if question.is_text_first else len(content), {"type": "text", "text": question.text})
        messages: list[dict[str, Any]] = [{"role": "system", "content": question.system}] if question.system else []
        messages.append({"role": "user", "content": content})
        endpoint = self.endpoint
        return self._client.chat.completions.create(
            model=endpoint.model,
            messages=messages,
            temperature=endpoint.temperature,
            max_tokens=endpoint.max_tokens,
            extra_body=dict(endpoint.extra) or None,
            **({"logprobs": True, "top_logprobs": endpoint.top_logprobs} if endpoint.top_logprobs else {}),
        )

    def _count(self, reply: Reply | Failure) -> Reply | Failure:
        with self._lock:
            self.usage.questions += 1
            if isinstance(reply, Reply):
                self.usage.prompt_tokens += reply.prompt_tokens
                self.usage.answer_tokens += reply.answer_tokens
                self.usage.models[reply.model] += 1
        return reply


def read(reply: Reply | Failure, parse: Callable[[str], T]) -> T | Failure:
    """What `parse` makes of the reply; its ValueError becomes a Failure (refusal or parse) that keeps the raw reply."""
    if isinstance(reply, Failure):
        return reply
    try:
        return parse(reply.text)
    except ValueError as error:
        raw = reply.text[:KEPT]
        if REFUSAL.search(reply.text):
            return Failure("score", "refusal", f"The judge {reply.model} declined: {raw}")
        cut = " (cut at max_tokens)" if reply.is_cut else ""
        return Failure("score", "parse", f"The reply of {reply.model} cannot be read{cut}: {error}. Raw reply: {raw}")


def json_in(text: str) -> dict[str, Any]:
    """The one JSON object in a reply, bare, fenced or between words; ValueError when there is none or it is cut short.

    What a reasoning model writes between <think> and </think> is no part of its reply, and a draft in it is no verdict.
    """
    import json

    _, closes, after = text.partition("</think>")
    if not closes and "<think>" in text:
        raise ValueError("it ends within its reasoning")
    text = after if closes else text
    fenced = re.search(r"```(?:json)?\s*(\{.*?\})\s*```", text, re.DOTALL)
    start = text.find("{")
    if start < 0:
        raise ValueError("it holds no JSON object")
    content, _ = json.JSONDecoder().raw_decode(fenced.group(1) if fenced else text[start:])
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def data_url(image_HWC: Any, kind: ImageKind) -> str:
    """The image as a data URL: PNG without loss, or JPEG where a judge's official client sends that."""
    from mmalign.images import check_image, encode_png

    if kind == "png":
        return f"data:image/png;base64,{base64.b64encode(encode_png(image_HWC)).decode()}"
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(check_image(image_HWC)).save(buffer, format="JPEG", quality=75 if kind == "jpeg75" else 95)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _reply(answer: Any, attempts: int) -> Reply | Failure:
    choices = getattr(answer, "choices", None)
    if not choices:
        raise ValueError(f"no choices in {str(answer)[:KEPT]}")
    choice = choices[0]
    model, usage = str(getattr(answer, "model", "") or "unnamed"), getattr(answer, "usage", None)
    if getattr(choice.message, "refusal", None):
        return Failure("score", "refusal", f"The judge {model} declined: {choice.message.refusal[:KEPT]}")
    if choice.finish_reason == "content_filter":
        return Failure("score", "refusal", f"The filter of {model} cut the reply: {(choice.message.content or '')[:KEPT]}")
    if not (choice.message.content or "").strip():
        return Failure("score", "parse", f"The judge {model} gave an empty reply (finish reason: {choice.finish_reason}).")
    counts = (getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0)
    return Reply(choice.message.content, model, *counts, choice.finish_reason == "length", attempts, _first_token(choice))


def _first_token(choice: Any) -> dict[str, float]:
    """The likeliest first tokens; the more likely of two that differ in a leading blank counts."""
    listed = getattr(getattr(choice, "logprobs", None), "content", None) or []
    found: dict[str, float] = {}
    for token in getattr(listed[0], "top_logprobs", None) or [] if listed else []:
        text = token.token.strip()
        found[text] = max(found.get(text, float("-inf")), float(token.logprob))
    return found


def _asked_pause(header: str | None, pause: float) -> float:
    """The pause that the server asks for, in seconds, if it does."""
    try:
        return max(pause, float(header)) if header else pause
    except ValueError:
        return pause
