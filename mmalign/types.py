"""The nouns: prompts, requests, samples, measurements, results. Standard library only; everything is frozen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal, Protocol, runtime_checkable

Stage = Literal["generate", "score", "load"]
Kind = Literal["timeout", "refusal", "parse", "oom", "missing", "nonfinite", "error"]
Status = Literal["complete", "incomplete", "partial"]

KINDS: tuple[Kind, ...] = ("timeout", "refusal", "parse", "oom", "missing", "nonfinite", "error")


class MmalignError(Exception):
    """An expected failure whose text is a whole sentence: what, where, expected, got, and the next command."""


class UsageError(MmalignError):
    """The command cannot mean anything useful as typed (exit code 2)."""


def digest(*parts: object) -> str:
    """A 32-hex-digit content digest of JSON-able parts; equal content gives an equal digest in every process."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"cannot digest a {type(value).__name__}: {value!r}")


@dataclass(frozen=True)
class Prompt:
    """One benchmark item. `meta` holds what a scorer needs beside the text (facts, detections to expect, answers)."""

    id: str
    text: str
    tags: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        return self.tags[0] if self.tags else ""


@dataclass(frozen=True)
class Request:
    """One image (or answer) to make. `seed` belongs to this request alone; batching never changes what it gives."""

    prompt: Prompt
    index: int
    seed: int
    size: tuple[int, int] | None = None  # height, width in pixels; None: the model's own
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.prompt.id}/{self.index}"

    def key(self, model: str) -> str:
        """Digest of all that changes the sample: text, input images, options where it is to choose, seed, size, settings, the model."""
        parts = (model, self.prompt.text, self.prompt.meta.get("images"), self.index, self.seed, self.size, dict(self.settings))
        return digest(*parts, *([self.prompt.meta.get("options")] if self.settings.get("task") == "choose" else ()))


def request_seed(base: int, prompt_id: str, index: int) -> int:
    """The seed rule: 63 bits of a digest, so that it depends on neither order, batch nor process."""
    return int(digest("seed", base, prompt_id, index)[:16], 16) >> 1


@dataclass(frozen=True)
class Sample:
    """What a model made: an image (uint8 RGB array [H, W, 3]) or an answer."""

    request: Request
    image: Any | None = None
    answer: str | None = None
    image_sha: str | None = None  # sha256 of the stored PNG, once stored
    seconds: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """A measurement. `x` is the headline number; `parts` are named components; `heatmap` is [H, W] when there is one."""

    x: float
    parts: Mapping[str, float] = field(default_factory=dict)
    heatmap: Any | None = None
    detail: str = ""


@dataclass(frozen=True)
class Failure:
    """A hole where a measurement should be. Never a number, never dropped: it is counted by stage and kind."""

    stage: Stage
    kind: Kind
    message: str


Score = Value | Failure


@dataclass(frozen=True)
class Row:
    """One request with what was made of it and what each scorer said."""

    request: Request
    sample: Sample | Failure
    scores: Mapping[str, Score] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        return self.request.prompt.tag

    def value(self, scorer: str) -> Value:
        """The scorer's value; call it only on rows that have one (the core hands aggregators no others)."""
        score = self.scores[scorer]
        assert isinstance(score, Value), f"row {self.request.id} has no value of {scorer}: {score}"
        return score

    @property
    def failure(self) -> Failure | None:
        """The first hole of the row, or None when every scorer has a value."""
        if isinstance(self.sample, Failure):
            return self.sample
        return next((score for score in self.scores.values() if isinstance(score, Failure)), None)


@dataclass(frozen=True)
class Source:
    """One benchmark file: its name here, the file's name, the pinned public address (with a commit), its sha256 and licence.

    `sha256` may be a git blob id (40 hex digits) or an md5 (32) instead, or "" where the publisher names none. `file` may then be a pattern
    of many files. `optional`: only an option of the suite asks for it.
    """

    name: str
    file: str
    url: str
    sha256: str
    licence: str
    note: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Card:
    """A benchmark's protocol as data; `mmalign explain` prints it and every result carries its hash."""

    name: str
    title: str
    paper: str
    repository: str
    commit: str
    prompts: int
    images_per_prompt: int
    size: str
    judge: str
    formula: str
    headline: str  # the metric quoted first
    licence: str
    traps: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()  # paper tables that report it, as <paper>/<table>
    higher_is_better: bool = True
    seed: int = 42
    unsafe: bool = False
    data: tuple[Source, ...] = ()  # the files it is made of (data.py)

    @property
    def hash(self) -> str:
        return digest(asdict(self))[:12]


@dataclass(frozen=True)
class Deviation:
    """One point in which a run differs from its card. Recorded, not forbidden."""

    field: str
    official: str
    used: str
    why: str = ""


@dataclass(frozen=True)
class Metric:
    """A number with what it is worth: interval, rows and prompts behind it, and the bounds that failures allow."""

    value: float | None
    stderr: float | None
    ci: tuple[float, float] | None
    n: int
    prompts: int
    method: Literal["clustered", "bootstrap"] = "clustered"
    bounds: tuple[float, float] | None = None
    higher_is_better: bool = True


@dataclass(frozen=True)
class Counts:
    expected: int
    generated: int
    scored: int
    failed: Mapping[str, int] = field(default_factory=dict)  # "stage/kind" -> rows
    retried: int = 0


@dataclass(frozen=True)
class Result:
    """One suite of one model, as written to results/<model>/<suite>/<run>.json."""

    run: str
    model: Mapping[str, Any]
    suite: Mapping[str, Any]
    sampling: Mapping[str, Any]
    scorers: Mapping[str, Mapping[str, Any]]
    counts: Counts
    metrics: Mapping[str, Metric]
    headline: str
    status: Status
    deviations: tuple[Deviation, ...] = ()
    rows_digest: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema: int = 1


@runtime_checkable
class Model(Protocol):
    """A loaded checkpoint. `settings` are its sampling defaults; a trainable one offers more (docs/models.md)."""

    name: str
    family: str
    fingerprint: str
    capabilities: frozenset[str]  # of: image, answer, choose, train
    settings: Mapping[str, Any]
    determinism: str  # bitwise, kernel or none

    def generate(self, requests: Sequence[Request]) -> list[Sample | Failure]: ...


@runtime_checkable
class Scorer(Protocol):
    """A loaded scorer: the metric of a benchmark and the reward of a trainer. Batched and order-preserving."""

    name: str
    fingerprint: str
    range: tuple[float, float]  # the least and the greatest value, for bounds; may be infinite

    def score(self, samples: Sequence[Sample]) -> list[Score]: ...


@runtime_checkable
class Evaluator(Protocol):
    """A benchmark file: prompts in, metrics out. Both functions are pure."""

    scorers: tuple[str, ...]

    def prompts(self, split: str) -> list[Prompt]: ...

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]: ...
