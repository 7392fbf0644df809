"""Benchmark files: list them, add one you have (checked by sha256), or fetch one from its pinned address."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from mmalign.screen import Screen, columns
from mmalign.types import UsageError
from mmalign.verbs import COMPLETE, Run


def declare(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("action", nargs="?", choices=("list", "add", "fetch"), default="list")
    parser.add_argument("name", nargs="?", help="the name of the data, as `mmalign data` lists it")
    parser.add_argument("--from", dest="source", type=Path, metavar="PATH", help="the file, or a folder that holds it (add)")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import data

        if options.action == "list":
            found = data.listing()
            for line in columns([(item.source.name, item.state, item.source.licence, str(item.path)) for item in found]):
                screen.say(line)
            screen.give([{**asdict(item.source), "path": item.path, "state": item.state} for item in found])
            return COMPLETE
        if options.name is None:
            raise UsageError(f"`mmalign data {options.action}` needs a name; `mmalign data` lists them.")
        if options.action == "add" and options.source is None:
            raise UsageError(f"Where is the file? mmalign data add {options.name} --from PATH")
        path = data.fetch(options.name) if options.action == "fetch" else data.add(options.name, options.source)
        screen.say(f"{options.name} is ready: {path}")
        screen.give({"name": options.name, "path": path})
        return COMPLETE

    return run
