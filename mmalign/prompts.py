"""Prompts to train on: a suite's train split, a file, or a mixture of several with the share that each has of what is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from mmalign import config, registry
from mmalign.types import Prompt, UsageError

Sets = Mapping[str, Mapping[str, str]]


def read_prompts(source: str, plugs: Sequence[Path], sets: Sets) -> list[Prompt]:
    """Prompts of a suite's train split, of a .txt file (one a line) or of a .jsonl file (text or prompt, and what scorers need as meta);
    `A=0.3,B=0.7` is a mixture of such sources."""
    parts = shares(source)
    if len(parts) == 1:
        return _read(next(iter(parts)), plugs, sets)
    return mixed({name: (share, _read(name, plugs, sets)) for name, share in parts.items()})


def is_unsafe(source: str, plugs: Sequence[Path]) -> bool:
    """Whether a source has prompts of a suite whose words are not for every eye."""
    suites = registry.entries("evaluators", plugs)
    return any(name in suites and registry.card(suites[name]).unsafe for name in shares(source))


def shares(source: str) -> dict[str, float]:
    """The sources of a mixture with their shares; UsageError for a share that is no positive number and for a source named twice."""
    if "=" not in source or Path(source).is_file():
        return {source: 1.0}
    parts: dict[str, float] = {}
    for part in source.split(","):
        name, _, number = part.strip().rpartition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not name or name in parts or not 0 < share < math.inf:
            raise UsageError(f"--prompts {source}: expected SOURCE=SHARE,... with each source once and shares above 0, got '{part}'.")
        parts[name] = share
    return parts


def mixed(parts: Mapping[str, tuple[float, Sequence[Prompt]]]) -> list[Prompt]:
    """One list in which every source has its share: the longest for its share stands in it once, the others again and again."""
    total = max(len(prompts) / share for share, prompts in parts.values())
    found = []
    for name, (share, prompts) in parts.items():
        for place in range(max(1, round(total * share))):
            again, index = divmod(place, len(prompts))
            # Seeds come from ids, so a prompt that stands here twice has two.
            label = f"{name}/{prompts[index].id}" + (f"#{again + 1}" if again else "")
            found.append(replace(prompts[index], id=label))
    return found


def _read(source: str, plugs: Sequence[Path], sets: Sets) -> list[Prompt]:
    path = Path(source)
    if path.suffix in (".txt", ".jsonl", ".json") or path.is_file():
        return prompts_of_file(path)
    entry = registry.find("evaluators", source, plugs)
    evaluator = registry.load(entry).Evaluator
    known = {item.name for item in fields(evaluator)}
    chosen = {name: value for name, value in {"per_kind": "64", **sets.get(entry.name, {})}.items() if name in known}
    return config.build(evaluator, chosen, entry.name).prompts("train")


def prompts_of_file(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise UsageError(f"There is no prompt file {path}. Give a suite's name, a .txt file with a prompt a line, or a .jsonl file.")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            prompts.append(Prompt(f"{number:06d}", line.strip()))
            continue
        try:
            row = json.loads(line)
            text = row.pop("text", None) or row.pop("prompt")
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise UsageError(
                f"{path}, line {number}: expected a JSON object with 'text' or 'prompt', got {line[:80]!r} ({error})."
            ) from error
        prompts.append(Prompt(str(row.pop("id", f"{number:06d}")), text, tuple(row.pop("tags", ())), row.pop("meta", row)))
    if not prompts:
        raise UsageError(f"{path} holds no prompt.")
    return prompts
