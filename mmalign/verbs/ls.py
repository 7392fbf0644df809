"""Names of suites, models, scorers and trainers, one line each, with what is missing to run them."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from mmalign import registry
from mmalign.screen import Screen, columns
from mmalign.types import UsageError
from mmalign.verbs import COMPLETE, Run

GROUPS = {"suites": "evaluators", "models": "models", "scorers": "scorers", "trainers": "trainers"}


def declare(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("filter", nargs="*", metavar="suites|models|scorers|trainers|TEXT", help="a kind, a text to look for, or both")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import doctor, hub

        kinds = [word for word in options.filter if word in GROUPS] or list(GROUPS)
        texts = [word.lower() for word in options.filter if word not in GROUPS]
        found = [(kind.removesuffix("s"), item) for kind in kinds for item in doctor.readiness(GROUPS[kind], options.plug)]
        lines = [(noun, item.entry.name, item.short_mark, item.entry.description) for noun, item in found]
        content = [{**asdict(item.entry), "ready": not item.unmet, "unmet": [asdict(need) for need in item.unmet]} for _, item in found]
        if "models" in kinds:
            for name in hub.bundled_names():
                lines.append(("checkpoint", name, "ready", f"bundled: --model {name}"))
                content.append({"kind": "checkpoints", "name": name, "description": "bundled", "ready": True, "unmet": []})
        kept = [number for number, line in enumerate(lines) if all(text in " ".join(line).lower() for text in texts)]
        if not kept:
            raise UsageError(f"Nothing is called '{' '.join(texts)}'{registry.suggest(' '.join(texts), [line[1] for line in lines])}")
        for line in columns([lines[number] for number in kept]):
            screen.say(line)
        screen.give([content[number] for number in kept])
        return COMPLETE

    return run
