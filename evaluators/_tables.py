"""Files of prompts that a user brings, in whatever form they are distributed: rows with named columns out of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.types import MmalignError, UsageError

FORMS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def place(given: str, suite: str, what: str) -> Path:
    """The file or folder that the suite's option `data` names, or the suite's own place in the data folder; UsageError when absent.

    For prompt sets that cannot be pinned or must not be shipped: the user takes them from their authors.
    """
    from mmalign.data import data_home

    path = Path(given).expanduser() if given else data_home() / suite
    if not path.exists():
        advice = f"There is no {path}; put them there or name the place: {option(suite)}"
        raise UsageError(f"The suite '{suite}' needs its prompts: {what}. {advice}")
    return path.resolve()


def option(suite: str) -> str:
    return f"--set {suite}.data=PATH."


def parts(folder: Path, stem: str, suite: str) -> list[Path]:
    """The files of one part of a set: stem.<form>, or the shards stem-00000-of-00001.<form> of a data set's repository, below a folder."""
    found = sorted(path for path in folder.rglob(f"{stem}*") if path.suffix in FORMS and path.stem.split("-")[0] == stem)
    if not found:
        raise UsageError(
            f"The suite '{suite}' finds no file {stem} in {folder}; expected {stem}.jsonl, .json, .csv, .tsv or .parquet. {option(suite)}"
        )
    return found


def rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The file's rows, each with at least `columns` filled; MmalignError with file and row otherwise. A .txt has the column prompt.

    Names of columns are compared in lower case with underscores.
    """
    if path.suffix not in FORMS:
        raise UsageError(f"{path} is of no form that holds prompts; expected {', '.join(FORMS)}.")
    found = [{_plain(str(name)): value for name, value in row.items()} for row in _read(path)]
    for number, row in enumerate(found, start=1):
        empty = [name for name in columns if row.get(name) in (None, "")]
        if empty:
            raise MmalignError(f"{path}, row {number}: a prompt needs {', '.join(columns)}; there is no {empty[0]}, only {', '.join(row)}.")
    return found


def _read(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            return parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            return [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
        if path.suffix in (".csv", ".tsv"):
            return list(csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ","))
        content = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
    except (ValueError, OSError, csv.Error) as error:
        raise MmalignError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise MmalignError(f"{path}: expected a list of JSON objects, one for each prompt.")
    return content


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")
