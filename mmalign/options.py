"""The parser's parts: the options of every verb that runs something, their types, and complaints that are sentences."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from mmalign.types import UsageError


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of what to run and where. A new setting belongs to the dataclass of its file (--set), not here."""
    what = parser.add_argument_group("what")
    what.add_argument("--model", required=True, metavar="MODEL", help="a bundled name, PATH, FAMILY:PATH or hub id")
    what.add_argument("--suite", required=True, metavar="NAME[,NAME]", help="suites, separated by commas, or all: those that can run here")
    add_evaluation_options(parser, what)


def add_worker_options(how: Any) -> None:
    """The options of how work is run."""
    how.add_argument("-j", "--jobs", type=_positive, metavar="N", help="worker processes (default: one per core, or one per GPU)")
    how.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="items a worker gets at once (default: %(default)s)")
    how.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="per item, then it fails (default: %(default)s)")
    how.add_argument("--device", default="auto", metavar="DEVICE[,DEVICE]", help="cpu, cuda:0,cuda:1 or auto (default: %(default)s)")
    how.add_argument("--executor", choices=("processes", "inline"), default="processes", help="inline: in this process, for debugging")


def add_evaluation_options(parser: argparse.ArgumentParser, what: Any) -> None:
    """How suites are run, whichever verb runs them."""
    what.add_argument("--split", default="test", help="split of the suite (default: %(default)s)")
    what.add_argument("--limit", type=_positive, metavar="N", help="only N prompts, from all groups; the result is marked partial")
    what.add_argument("--images-per-prompt", type=_positive, metavar="N", help="default: as the card says")
    what.add_argument("--size", type=_size, metavar="HxW", help="image size in pixels (default: the model's own)")
    what.add_argument("--seed", type=int, metavar="N", help="base seed (default: as the card says)")
    what.add_argument("--set", action="append", default=[], metavar="ROOT.OPTION=VALUE", help="an option of a suite, a scorer, or sampling")
    what.add_argument("--model-extra", action=Extras, default={}, metavar="NAME=PATH", help="a further checkpoint that the family needs")
    how = parser.add_argument_group("how (none of it changes a number, except --dtype and --device where the result says so)")
    how.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where results are kept (default: %(default)s)")
    add_worker_options(how)
    how.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on a GPU")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UsageErrors with a suggestion."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}. See: {self.prog} --help")


class Extras(argparse.Action):
    """NAME=PATH, repeated, as a dictionary."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        name, equals, path = values.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--model-extra {values}: expected NAME=PATH, such as decoder=./sana.")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), name: Path(path)})


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.lower().partition("x")
    if not cross:
        height, width = text, text
    return _positive(height), _positive(width)
