"""docs/protocols: the protocol cards as Markdown, a page per suite and an index; made again by `make cards`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmalign import doctor, explain, registry
from mmalign.store import disk_errors, write_atomic
from mmalign.types import Card

FIELDS = tuple(name for name in explain.CARD_FIELDS if name not in ("card", "headline", "formula"))  # the page says those three itself


def write(folder: Path) -> list[Path]:
    """Write `<suite>.md` for every suite of the package and README.md below a folder; pages of suites that are no more are removed."""
    made: dict[Path, str] = {}
    index = ["# Protocols", "", "Made from `evaluators/cards` by `make cards`.", ""]
    index += ["| suite | what | prompts | images | judge |", "|---|---|---|---|---|"]
    for name, entry in registry.entries("evaluators").items():
        card = registry.card(entry)
        made[folder / f"{name}.md"] = _page(entry, card)
        prompts = f"{card.prompts:,}" if card.prompts else "those of the data"
        index.append(f"| [{name}]({name}.md) | {_cell(entry.description)} | {prompts} | {card.images_per_prompt} | {_cell(card.judge)} |")
    made[folder / "README.md"] = "\n".join([*index, ""])
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in made.items():
            write_atomic(path, text.encode())
        for path in [path for path in folder.glob("*.md") if path not in made]:
            path.unlink()
    return sorted(made)


def _page(entry: registry.Entry, card: Card) -> str:
    facts = {name: value for name, value in asdict(card).items() if name in FIELDS and value not in ("", None)}
    if not card.prompts:
        facts["prompts"] = explain.NOT_FIXED
    scorers = ", ".join(f"`{scorer}`" for scorer in doctor.scorers_of(entry)) or "none; the answers themselves"
    shown = [f"# {card.title}", "", f"{_sentence(entry.description)} `mmalign eval --model PATH --suite {entry.name}`", ""]
    shown += _table(("", ""), [*((name.replace("_", " "), value) for name, value in facts.items()), ("scorers", scorers)])
    shown += ["## Formula", "", f"{_sentence(card.formula)} The headline is `{card.headline}`.", ""]
    if options := explain.options(entry):
        rows = [(f"`--set {entry.name}.{name}`", f"`{value}`" if value not in ("", None) else "none") for name, value in options.items()]
        shown += ["## Options", "", *_table(("option", "default"), rows)]
    if card.traps:
        shown += ["## Known traps", "", *(f"* {trap}" for trap in card.traps), ""]
    if card.tables:
        shown += ["## Published numbers", "", *(f"* `mmalign table {table}`" for table in card.tables), ""]
    if card.data:
        files = [(source.name, f"<{source.url}>", f"`{source.sha256[:12]}`", source.licence, source.note) for source in card.data]
        shown += ["## Data", "", *_table(("name", "from", "sha256", "licence", "note"), files)]
    return "\n".join(shown)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return [*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows), ""]


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
