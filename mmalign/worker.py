"""What a worker does: build one model or scorer from a recipe, then turn batches of items into outcomes.

A recipe is names, paths and text, so it crosses to a process (or machine) that has never seen the object; the driver imports neither
torch nor the files it runs. Items are Requests for a model and Pictures for a scorer. Whatever a plug-in does here becomes data: each
item gives an Outcome, or the whole batch gives a BatchFailure, which the executor splits until only the guilty item is left.
This is the worker boundary: the one place beside the plug-in loader and the command line's top that catches every exception.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mmalign import config as configs
from mmalign import registry
from mmalign.types import Failure, Kind, MmalignError, Model, Request, Sample, Scorer, Stage, UsageError, Value


@dataclass(frozen=True)
class Recipe:
    """How to build a model or scorer anywhere: its registered file, the options typed by the user, and `load`'s other arguments.

    `overrides` are options of the file's `Config` (scorer) or `Sampling` (model); `arguments` are keyword arguments of a model's `load`
    (`path`, `dtype`, `extra`). All of it must pickle.
    """

    entry: registry.Entry
    overrides: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        return "generate" if self.entry.kind == "models" else "score"

    def __str__(self) -> str:
        return f"{'model' if self.stage == 'generate' else 'scorer'} '{self.entry.name}'"


@dataclass(frozen=True)
class Description:
    """What a loaded object says of itself, as JSON-able data: all that keys, plans and results need of it.

    `facts` of a model: family, capabilities, determinism; of a scorer: range, metric_name, deviations, judge. `options` are the values
    in force and `defaults` those without overrides: sampling settings of a model, Config of a scorer. `environment`: torch and device
    where torch is loaded.
    """

    name: str
    fingerprint: str
    facts: Mapping[str, Any]
    options: Mapping[str, Any]
    defaults: Mapping[str, Any]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Picture:
    """What a scorer's worker gets: a sample without pixels and the file that holds them (None for an answer)."""

    sample: Sample
    path: Path | None


class Outcome(NamedTuple):
    """One item's result: a Sample whose `image` holds PNG bytes, a Value without heat map, or a Failure; seconds per item."""

    result: Sample | Value | Failure
    seconds: float


@dataclass(frozen=True)
class BatchFailure:
    """A batch that gave nothing, for a reason that one of its items may have caused."""

    kind: Kind
    message: str


@dataclass(frozen=True)
class LoadFailure:
    """An object that cannot be built: the run's error, not an item's."""

    message: str
    is_usage: bool
    trace: str

    def error(self) -> MmalignError:
        """The exception for the driver; the worker's traceback hangs on as its cause, which --debug shows."""
        error = (UsageError if self.is_usage else MmalignError)(self.message)
        error.__cause__ = RuntimeError(f"in the worker:\n{self.trace}")
        return error


class Served:
    """A loaded model or scorer, ready to serve batches on one thread."""

    def __init__(self, recipe: Recipe, device: str, keeps_maps: bool = False) -> None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is first imported; one thread each, so sums have one order
            os.environ[name] = "1"
        self.recipe, self._keeps_maps = recipe, keeps_maps
        module = registry.load(recipe.entry)
        load = _load_model if recipe.stage == "generate" else _load_scorer
        with _one_thread():
            self._object, self.description = load(module, recipe, device)

    def run(self, items: Sequence[Any]) -> list[Outcome] | BatchFailure:
        """Serve a batch. Items keep their order; what an item gives depends on that item alone."""
        started = time.perf_counter()
        try:
            with _one_thread():
                results = self._generate(items) if self.recipe.stage == "generate" else self._score(items)
        except Exception as error:  # noqa: BLE001 (worker boundary: a plug-in may raise anything)
            _free_memory()
            return BatchFailure(_kind(error), configs.redact(_describe_error(error)))
        seconds = (time.perf_counter() - started) / len(items)
        if isinstance(results, BatchFailure):
            return results
        return [Outcome(self._clean(result), seconds) for result in results]

    def _generate(self, requests: Sequence[Request]) -> list[Any] | BatchFailure:
        samples = self._object.generate(list(requests))
        wrong = _wrong_count(self.recipe, "generate", samples, len(requests))
        if wrong is not None:
            return wrong
        for request, sample in zip(requests, samples, strict=True):
            if isinstance(sample, Sample) and sample.request.id != request.id:
                return BatchFailure("error", f"generate() of {self.recipe} gave {sample.request.id} in the place of {request.id}.")
        return [_pack(sample) for sample in samples]

    def _score(self, pictures: Sequence[Picture]) -> list[Any] | BatchFailure:
        samples = [_unpack(picture) for picture in pictures]
        usable = [sample for sample in samples if isinstance(sample, Sample)]
        scores = self._object.score(usable) if usable else []
        wrong = _wrong_count(self.recipe, "score", scores, len(usable))
        if wrong is not None:
            return wrong
        remaining = iter(scores)
        return [next(remaining) if isinstance(sample, Sample) else sample for sample in samples]

    def _clean(self, result: Any) -> Sample | Value | Failure:
        """The result with every promise of its type checked."""
        stage = self.recipe.stage
        if isinstance(result, Failure):
            return replace(result, stage=stage, message=configs.redact(result.message))
        if stage == "generate" and isinstance(result, Sample):
            return result
        if stage == "score" and isinstance(result, Value):
            return _finite(result, self._keeps_maps)
        wanted = "Sample" if stage == "generate" else "Value"
        return Failure(stage, "error", f"The {self.recipe} gave a {type(result).__name__} where a {wanted} or Failure is expected.")


def _load_model(module: Any, recipe: Recipe, device: str) -> tuple[Any, Description]:
    model: Model = module.load(device=device, **recipe.arguments)
    defaults = configs.plain(model.settings)
    typed = configs.plain(configs.build(module.Sampling, recipe.overrides, "sampling"))
    options = {**defaults, **{name.replace("-", "_"): typed[name.replace("-", "_")] for name in recipe.overrides}}
    facts = {"family": model.family, "capabilities": sorted(model.capabilities), "determinism": model.determinism}
    return model, Description(model.name, model.fingerprint, facts, options, defaults, _environment(device))


def _load_scorer(module: Any, recipe: Recipe, device: str) -> tuple[Any, Description]:
    config = configs.build(module.Config, recipe.overrides, recipe.entry.name)
    scorer: Scorer = module.load(config, device)
    low, high = scorer.range
    options, defaults = configs.plain(config), configs.plain(module.Config())
    facts = {
        "range": (float(low), float(high)),
        "metric_name": getattr(scorer, "metric_name", scorer.name),
        "deviations": [asdict(deviation) for deviation in getattr(scorer, "deviations", ())],
        "judge": _judge(scorer),
    }
    return scorer, Description(scorer.name, scorer.fingerprint, facts, options, defaults, _environment(device))


def _judge(scorer: Scorer) -> dict[str, str]:
    """Whom the scorer asks, for judge.absence; empty for one that judges by itself."""
    endpoint = getattr(getattr(scorer, "judge", None), "endpoint", None)
    return {} if endpoint is None else {"model": endpoint.model, "base_url": endpoint.base_url, "key": endpoint.key.name}


def _environment(device: str) -> dict[str, str]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {"device": device}
    found = {"device": device, "torch": torch.__version__}
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _pack(sample: Any) -> Any:
    """A sample as it travels and is stored: PNG bytes for the array, their sha256, extra as JSON."""
    if not isinstance(sample, Sample):
        return sample
    if sample.image is None and sample.answer is None:
        return Failure("generate", "missing", f"The model gave neither an image nor an answer for {sample.request.id}.")
    extra = json.loads(json.dumps(dict(sample.extra), default=str))
    if sample.image is None:
        return replace(sample, extra=extra)
    from mmalign import images

    png = images.encode_png(sample.image)
    return replace(sample, image=png, image_sha=hashlib.sha256(png).hexdigest(), extra=extra)


def _unpack(picture: Picture) -> Sample | Failure:
    """The sample with its pixels, read from its file and checked against its sha256."""
    if picture.path is None:
        return picture.sample
    from mmalign import images

    try:
        content = picture.path.read_bytes()
    except OSError as error:
        return Failure("score", "missing", f"The image {picture.path} cannot be read: {error}. Run the same command again to make it anew.")
    if hashlib.sha256(content).hexdigest() != picture.sample.image_sha:
        return Failure("score", "missing", f"The image {picture.path} was altered on disk. Run the same command again to make it anew.")
    return replace(picture.sample, image=images.decode_image(content))


def _finite(value: Value, keeps_map: bool = False) -> Value | Failure:
    """The value as plain floats, without heat map unless asked (too large to keep; attribution recomputes it), or Failure(nonfinite)."""
    try:
        x, parts = float(value.x), {str(name): float(part) for name, part in value.parts.items()}
    except (TypeError, ValueError) as error:
        return Failure("score", "error", f"The scorer gave something that is no number: {error}.")
    for name, number in {"x": x, **parts}.items():
        if not math.isfinite(number):
            return Failure("score", "nonfinite", f"The scorer gave {name} = {number}, expected a finite number.")
    return Value(x, parts, value.heatmap if keeps_map else None, configs.redact(str(value.detail)))


def _wrong_count(recipe: Recipe, verb: str, results: Any, expected: int) -> BatchFailure | None:
    got = len(results) if isinstance(results, Sequence) else f"a {type(results).__name__}"
    return None if got == expected else BatchFailure("error", f"{verb}() of {recipe} must give {expected} results in order, got {got}.")


def _kind(error: Exception) -> Kind:
    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error).lower()
    if names & {"MemoryError", "OutOfMemoryError"} or "out of memory" in text or "can't allocate memory" in text:
        return "oom"
    return "timeout" if isinstance(error, TimeoutError) else "error"


def _describe_error(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def load_failure(recipe: Recipe, error: BaseException) -> LoadFailure:
    """The load error as it travels to the driver: an mmalign sentence unchanged, anything else wrapped into one."""
    message = str(error)
    if not isinstance(error, MmalignError):
        message = f"The {recipe} ({recipe.entry.path}) could not be loaded: {_describe_error(error)}. --debug shows the traceback."
    trace = "".join(traceback.format_exception(error))
    return LoadFailure(configs.redact(message), isinstance(error, UsageError), configs.redact(trace))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread, so that a sum has the same order in every worker; the caller's setting returns afterwards."""
    before = _set_threads(1)
    try:
        yield
    finally:
        if before is not None:  # None: torch came in during the block, and on one thread
            _set_threads(before)


def _set_threads(count: int) -> int | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    return int(before)


def _free_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
