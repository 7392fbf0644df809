"""leaderboards/rendered: every table of the papers as Markdown and LaTeX, and an index; made again by `make tables`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmalign.leaderboards import published
from mmalign.store import disk_errors, write_atomic
from mmalign.tables import build, formats
from mmalign.tables.ours import Ours

SUFFIXES = {"markdown": "md", "latex": "tex"}


def write(folder: Path, found: Sequence[Ours]) -> list[Path]:
    """Write `<paper>/<table>.md` and `.tex` and README.md below a folder; files of tables that are no more are removed."""
    made: dict[Path, str] = {}
    index = ["# The papers' tables", ""]
    for paper in published.papers():
        tables = published.load_all(paper)
        index += [
            f"## {paper}",
            "",
            f"[{tables[0].paper.title}]({tables[0].paper.address})",
            "",
            "| table | what | rows | status |",
            "|---|---|---|---|",
        ]
        for table in tables:
            shown = build.paper_table(table, found)
            for name, suffix in SUFFIXES.items():
                made[folder / paper / f"{table.name}.{suffix}"] = formats.FORMATS[name](shown)
            own = sum(line.origin == "ours" for line in shown.lines)
            rows = f"{len(table.rows)}{f' and {own} of ours' if own else ''}"
            disagree = f"; {len(table.disagreements())} disagree with their columns" if table.disagreements() else ""
            index.append(f"| [{table.id}]({paper}/{table.name}.md) | {table.title} | {rows} | {table.source['status']}{disagree} |")
        index.append("")
    made[folder / "README.md"] = "\n".join(index)
    with disk_errors(folder):
        for path, text in made.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text.encode())
        for path in [path for suffix in SUFFIXES.values() for path in folder.glob(f"*/*.{suffix}") if path not in made]:
            path.unlink()
    return sorted(made)
