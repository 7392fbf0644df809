"""The verbs of the command line: a file is a verb. Its docstring is the help, `declare` adds its options and returns what to run."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from mmalign.screen import Screen

COMPLETE, ERROR, USAGE, INCOMPLETE = 0, 1, 2, 3

Run = Callable[[argparse.Namespace, Screen], int]


def load() -> dict[str, ModuleType]:
    """Every verb by its name, in the order of the alphabet."""
    names = sorted(path.stem for folder in __path__ for path in Path(folder).glob("[!_]*.py"))
    return {name: importlib.import_module(f"mmalign.verbs.{name}") for name in names}
