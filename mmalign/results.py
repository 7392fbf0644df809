"""What a run leaves behind: `<run>.json` (the Result) and `<run>.rows.parquet` (one line per image and scorer), and how to quote them.

Both lie in `<results>/<model>/<suite>/` beside `store/`. `<run>` is a digest of all that the numbers depend on (model, suite, scorers,
sampling, seeds, limit), so the same command writes the same files again and another protocol writes others. The rows are written
first: a JSON file that exists is complete.

JSON: the fields of types.Result in their order; every metric is {value, stderr, ci, n, prompts, method, bounds, higher_is_better}.
  model:      name, spec, family, fingerprint, determinism, capabilities, and what the caller knows (source, revision, trained_on_rewards)
  suite:      name, title, unsafe, split, card (hash), protocol (digest of the prompts), prompts, images_per_prompt, options
  sampling:   settings, size ([height, width] or null), seed (the base), seed_rule
  scorers:    {name: {fingerprint, options, range}}
  provenance: command, version, git, is_dirty, lock, python, torch, device, gpu, host, started, ended, cached, warnings (sentences)
Parquet columns: COLUMNS below. `meta` and `parts` are JSON; `value` is null exactly when `failure.kind` is not.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mmalign.store import write_atomic
from mmalign.types import Counts, Deviation, Failure, Metric, MmalignError, Prompt, Request, Result, Row, Sample, Score, Value, digest

COLUMNS = {
    "request_id": "string",  # <prompt id>/<index>
    "prompt_id": "string",
    "index": "int64",
    "prompt": "string",
    "tags": "list<string>",
    "seed": "int64",
    "size": "list<int64>",  # height, width; null: the model's own
    "image_sha": "string",  # store.image_path(run directory, image_sha); null for answers and failed generations
    "answer": "string",
    "scorer": "string",  # null in a suite without scorers
    "value": "double",
    "parts": "string",
    "failure.stage": "string",
    "failure.kind": "string",
    "failure.message": "string",
    "judge_raw": "string",  # the scorer's own words
    "seconds": "double",  # of generation
    "cost": "double",  # the part `cost` of a scorer that has one
    "meta": "string",  # of the prompt
}


def rows_digest(rows: Iterable[Row]) -> str:
    """Digest of what was measured: image or answer, values and parts, stage and kind of failures, by request.

    Order, batches, workers, restarts, times and messages do not enter.
    """
    return digest("rows", *sorted((_essence(row) for row in rows), key=lambda essence: str(essence[0])))


def _essence(row: Row) -> list[Any]:
    sample = row.sample
    made = ["failed", sample.stage, sample.kind] if isinstance(sample, Failure) else ["made", sample.image_sha, sample.answer]
    scores = {
        name: ["failed", score.stage, score.kind] if isinstance(score, Failure) else ["value", score.x, dict(score.parts)]
        for name, score in row.scores.items()
    }
    return [row.request.id, row.request.prompt.text, row.request.seed, row.request.size, made, scores]


def json_path(directory: Path, run: str) -> Path:
    return directory / f"{run}.json"


def rows_path(json_file: Path) -> Path:
    """The rows that belong to a result's JSON file."""
    return json_file.with_name(f"{json_file.stem}.rows.parquet")


def write(directory: Path, result: Result, rows: Sequence[Row]) -> Path:
    """Write both files atomically and return the JSON's path."""
    path = json_path(directory, result.run)
    write_atomic(rows_path(path), _parquet(rows))
    write_atomic(path, (json.dumps(asdict(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return path


def _parquet(rows: Sequence[Row]) -> bytes:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    kinds = {
        "string": arrow.string(),
        "int64": arrow.int64(),
        "double": arrow.float64(),
        "list<string>": arrow.list_(arrow.string()),
        "list<int64>": arrow.list_(arrow.int64()),
    }
    schema = arrow.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])
    lines = [line for row in rows for line in _lines(row)]
    buffer = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(lines, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def _lines(row: Row) -> Iterable[dict[str, Any]]:
    request, sample = row.request, row.sample
    made = sample if isinstance(sample, Sample) else Sample(request)
    shared = {
        "request_id": request.id,
        "prompt_id": request.prompt.id,
        "index": request.index,
        "prompt": request.prompt.text,
        "tags": list(request.prompt.tags),
        "seed": request.seed,
        "size": None if request.size is None else list(request.size),
        "image_sha": made.image_sha,
        "answer": made.answer,
        "seconds": made.seconds,
        "meta": json.dumps(dict(request.prompt.meta), ensure_ascii=False, default=str),
    }
    outcomes: Mapping[str | None, Score | None] = row.scores or {None: sample if isinstance(sample, Failure) else None}  # type: ignore[assignment]
    for scorer, score in outcomes.items():
        line = {**shared, "scorer": scorer}
        if isinstance(score, Failure):
            line |= {"failure.stage": score.stage, "failure.kind": score.kind, "failure.message": score.message}
        elif score is not None:
            parts = json.dumps(dict(score.parts), ensure_ascii=False)
            line |= {"value": score.x, "parts": parts, "judge_raw": score.detail, "cost": score.parts.get("cost")}
        yield line


def read(path: Path) -> Result:
    """The Result of a JSON file; MmalignError with the file and the reason when it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MmalignError(f"There is no result at {path}. Make one with `mmalign eval`.") from error
    except ValueError as error:
        raise MmalignError(f"{path} is not a result: it holds no valid JSON ({error}). Run the command that made it again.") from error
    known = {item.name for item in fields(Result)}
    if not isinstance(content, dict) or content.get("schema") != 1 or set(content) != known:
        raise MmalignError(f"{path} is not a result of format 1. Make it again with this version of mmalign.")
    content["counts"] = Counts(**content["counts"])
    content["metrics"] = {name: Metric(**_pairs(metric)) for name, metric in content["metrics"].items()}
    content["deviations"] = tuple(Deviation(**deviation) for deviation in content["deviations"])
    return Result(**content)


def _pairs(metric: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in metric.items()}


def read_rows(path: Path) -> list[Row]:
    """The rows of a `.rows.parquet` file as types.Row, in the order of the suite; settings and images are not in it."""
    import pyarrow.parquet as parquet

    if not path.is_file():
        raise MmalignError(f"The rows {path} are missing. Run the command that made the result again; everything it needs is in the store.")
    grouped: dict[str, list[dict[str, Any]]] = {}
    for line in parquet.read_table(path).to_pylist():
        grouped.setdefault(line["request_id"], []).append(line)
    return [_row(lines) for lines in grouped.values()]


def _row(lines: Sequence[dict[str, Any]]) -> Row:
    first = lines[0]
    prompt = Prompt(first["prompt_id"], first["prompt"], tuple(first["tags"]), json.loads(first["meta"]))
    request = Request(prompt, first["index"], first["seed"], None if first["size"] is None else tuple(first["size"]))
    sample: Sample | Failure = Sample(request, answer=first["answer"], image_sha=first["image_sha"], seconds=first["seconds"])
    if first["failure.stage"] == "generate":
        sample = _failure(first)
    return Row(request, sample, {line["scorer"]: _score(line) for line in lines if line["scorer"] is not None})


def _score(line: Mapping[str, Any]) -> Score:
    if line["failure.kind"] is not None:
        return _failure(line)
    return Value(line["value"], json.loads(line["parts"]), detail=line["judge_raw"])


def _failure(line: Mapping[str, Any]) -> Failure:
    return Failure(line["failure.stage"], line["failure.kind"], line["failure.message"])


def find(results: Path) -> list[Path]:
    """Every result file below a folder, by name."""
    return sorted(path for path in results.glob("**/*.json") if rows_path(path).is_file())


def paste_line(result: Result) -> str:
    """The line for a paper: `GenEval 0.842 +/- 0.009 (553x4, 0 failed, protocol: official)`.

    The number after +/- is one standard error, clustered by prompt. What differs from the protocol, is missing, or was also trained on
    is said in the same line.
    """
    metric = result.metrics.get(result.headline)
    value, stderr = (metric.value, metric.stderr) if metric else (None, None)
    number = "undefined" if value is None else _number(value) + ("" if stderr is None else f" +/- {_number(stderr)}")
    failed = sum(result.counts.failed.values())
    notes = [f"{result.suite['prompts']}x{result.suite['images_per_prompt']}", f"{failed} failed"]
    if failed and metric and metric.bounds:
        notes.append(f"bounds {_number(metric.bounds[0])} to {_number(metric.bounds[1])}")
    differences = ", ".join(f"{one.field}={one.used} (card: {one.official})" for one in result.deviations)
    notes.append(f"protocol: official except {differences}" if differences else "protocol: official")
    if reward_overlap(result):
        notes.append(f"trained on the reward {', '.join(reward_overlap(result))}")
    mark = "" if result.status == "complete" else f" {result.status.upper()}"
    other = [scorer["metric_name"] for name, scorer in result.scorers.items() if scorer.get("metric_name", name) != name]
    title = result.suite["title"] + (f" [{', '.join(other)}]" if other else "")
    return f"{title} {number} ({', '.join(notes)}){mark}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def continue_line(result: Result) -> str | None:
    """The command that fills the holes of a result; None when it has none."""
    if not sum(result.counts.failed.values()):
        return None
    command = str(result.provenance["command"])
    return command if "--retry-failed" in command.split() else f"{command} --retry-failed"


def reward_overlap(result: Result) -> tuple[str, ...]:
    """The scorers of this result that were also rewards in the model's training."""
    return tuple(name for name in result.scorers if name in result.model.get("trained_on_rewards", ()))


def is_complete(result: Result) -> bool:
    """Whether every number that was asked for is there: nothing failed and the headline is defined (exit code 0, else 3)."""
    metric = result.metrics.get(result.headline)
    return not sum(result.counts.failed.values()) and metric is not None and metric.value is not None and math.isfinite(metric.value)
