"""What `mmalign explain` says of a registered file: a suite's protocol card, or the docstring and options of anything else."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from mmalign import config, data, doctor, registry
from mmalign.types import UsageError

OPTIONS = {"evaluators": "Evaluator", "scorers": "Config", "models": "Sampling", "trainers": "Config"}
ORDER = ("evaluators", "scorers", "models", "trainers")  # a suite and its scorer may share a name; the suite is meant
WIDTH = 120
NOT_FIXED = "as many as the data hold; the protocol names no number"
CARD_FIELDS = (
    *("paper", "repository", "commit", "prompts", "images_per_prompt", "size", "seed"),
    *("judge", "formula", "headline", "licence", "card"),
)


def explain(name: str, plugs: Sequence[Path] = ()) -> dict[str, Any]:
    """All that is known of a name without running it, as JSON-able data. UsageError for a name of nothing."""
    kind = next((kind for kind in ORDER if registry.normalise(name) in registry.entries(kind, plugs)), None)
    if kind is None:
        known = {known for kind in ORDER for known in registry.entries(kind, plugs)}
        raise UsageError(f"Unknown suite '{name}'{registry.suggest(registry.normalise(name), known)}")
    entry = registry.find(kind, name, plugs)
    readiness = next(item for item in doctor.readiness(kind, plugs) if item.entry.name == entry.name)
    content: dict[str, Any] = {"name": entry.name, "kind": registry.NOUNS[kind], "description": entry.description, "file": str(entry.path)}
    if kind == "evaluators":
        card = registry.card(entry)
        states = {item.source.name: item.state for item in data.listing()}
        content |= {**asdict(card), "card": card.hash, "scorers": list(doctor.scorers_of(entry))}
        content["data"] = [{**asdict(source), "state": states.get(source.name, "absent")} for source in card.data]
    else:
        content["about"] = ast.get_docstring(ast.parse(entry.path.read_text(encoding="utf-8"))) or ""
    content["options"] = options(entry)
    content["ready"] = not readiness.unmet
    content["unmet"] = [asdict(need) for need in readiness.unmet]
    return content


def lines(content: Mapping[str, Any]) -> list[str]:
    """The explanation as text, one field per paragraph."""
    shown = [f"{content.get('title', content['name'])} ({content['kind']} '{content['name']}'): {content['description']}", ""]
    if "about" in content:
        shown += [*content["about"].splitlines(), ""]
    for field in CARD_FIELDS:
        if field in content:
            shown += _paragraph(field.replace("_", " "), NOT_FIXED if (field, content[field]) == ("prompts", 0) else str(content[field]))
    for field in ("tables", "scorers"):
        if content.get(field):
            shown += _paragraph(field, ", ".join(content[field]))
    for source in content.get("data", ()):
        shown += _paragraph("data", f"{source['name']} ({source['state']}): {source['url']} {source['note']}".rstrip())
    for option, value in content["options"].items():
        shown += _paragraph("option", f"--set {content['name'] if content['kind'] != 'model family' else 'sampling'}.{option}={value}")
    for trap in content.get("traps", ()):
        shown += _paragraph("trap", trap)
    for need in content["unmet"]:
        shown += _paragraph("missing", f"{need['text']}: {need['fix']}")
    return shown


def options(entry: registry.Entry) -> dict[str, Any]:
    """The options of a registered file with their defaults."""
    cls = getattr(registry.load(entry), OPTIONS[entry.kind], None)
    return config.plain(cls()) if isinstance(cls, type) and is_dataclass(cls) else {}


def _paragraph(label: str, text: str) -> list[str]:
    first, rest = f"{label:<18}", " " * 18
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)
