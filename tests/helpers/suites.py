"""Whole suites on the bundled checkpoint, their official data, and official functions from a checkout of their repositories."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign import cli, data, results
from mmalign.types import Prompt, Request, Result, Row, Sample, Value

SHARED = Path(os.environ.get("MMALIGN_SHARED", "/nowhere")) / "data"


def needs(folder: str) -> pytest.MarkDecorator:
    """Skip where the official files of a benchmark are not at hand."""
    return pytest.mark.skipif(not (SHARED / folder).is_dir(), reason=f"MMALIGN_SHARED names no folder with data/{folder}")


def add_data(files: Mapping[str, str]) -> None:
    """Put files of the shared data into the data folder: source name -> path below SHARED."""
    for name, path in files.items():
        data.add(name, SHARED / path)


def run_suite(folder: Path, suite: str, sets: Mapping[str, Any], limit: int, *more: str) -> Result:
    """`mmalign eval` of tiny-janus on the first prompts of every tag, one image each; the result that it wrote."""
    words = [
        "eval",
        "--model",
        "tiny-janus",
        "--suite",
        suite,
        "--results",
        str(folder),
        "--limit",
        str(limit),
        "--device",
        "cpu",
        "-j",
        "1",
    ]
    words += [*more, *(word for name, value in sets.items() for word in ("--set", f"{name}={value}"))]
    code = cli.main(words)
    assert code in (0, 3), code
    (file,) = results.find(folder)
    return results.read(file)


def oracle(name: str, *paths: str) -> Path:
    """A checkout of an official repository, $MMALIGN_ORACLES/<name>; the test is skipped where it or one of the paths is absent."""
    home = os.environ.get("MMALIGN_ORACLES")
    folder = Path(home or "/nowhere") / name
    for path in (".", *paths):
        if not (folder / path).exists():
            pytest.skip(f"MMALIGN_ORACLES holds no {name}/{path}: a checkout of the official repository at the card's commit")
    return folder


def official(path: Path, *names: str, **given: Any) -> Any:
    """Official functions and constants by name, taken out of their file; `given` are the modules and stubs that they use."""
    kept = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = {ast.unparse(target) for target in node.targets} if isinstance(node, ast.Assign) else {getattr(node, "name", "")}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign)) and targets & set(names):
            kept.append(node)
    space = dict(given)
    exec(compile(ast.Module(kept, []), str(path), "exec"), space)
    return [space[name] for name in names] if len(names) > 1 else space[names[0]]


def row(scorer: str, x: float, tags: Sequence[str] = (), prompt: str = "p", index: int = 0, meta: Any = None, **parts: float) -> Row:
    """A scored row by hand."""
    request = Request(Prompt(prompt, f"text of {prompt}", tuple(tags), meta or {}), index, index)
    return Row(request, Sample(request), {scorer: Value(x, parts)})


def sample(prompt: Prompt, seed: int = 0, side: int = 32, answer: str | None = None) -> Sample:
    """A sample with a random picture (none when it is an answer)."""
    image = None if answer is not None else np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Sample(Request(prompt, 0, seed), image, answer)
