"""A judge's official wording, read out of the official file: the file is parsed and never run, and no wording is kept here.

Where a repository gives no licence to copy its questions, its file is fetched like the prompts (a card's `data`, pinned by hash). A text
with fields becomes a Template; so does a text file of the user's own, with fields in braces.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmalign.types import MmalignError, UsageError

FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Template:
    """Pieces of text, and between them the names of what is filled in (pieces at odd places are names)."""

    pieces: tuple[str, ...]

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with every field filled; a field that `values` lacks is a KeyError."""
        return "".join(values[piece] if place % 2 else piece for place, piece in enumerate(self.pieces))

    @property
    def names(self) -> tuple[str, ...]:
        return self.pieces[1::2]


def texts(path: Path, function: str, names: Mapping[str, str]) -> list[Template]:
    """The messages that a function of the file builds: each value of a key "text", in the order of the source.

    `names` gives the name of each expression that stands in a text, such as {"row['Prompt']": "prompt"}.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function), None)
    nodes = [
        value
        for node in ast.walk(found or tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "text"
    ]
    if found is None or not nodes:
        raise MmalignError(f"{path} has no function {function} that builds messages; it is not the official file.")
    return [_template(node, names, path) for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset))]


def constant(path: Path, name: str) -> str:
    """The text that the file assigns to a name at its top level."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign) or name not in map(ast.unparse, node.targets):
            continue
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return node.value.value
    raise MmalignError(f"{path} assigns no text to {name}; it is not the official file.")


def own(path: Path, names: Sequence[str], option: str) -> Template:
    """A question of the user's own: a text file whose fields {name} are among `names`; UsageError when it asks for others or for none."""
    if not path.is_file():
        raise UsageError(f"{option}={path}: there is no such file. Give a text file with the fields {_listed(names)}, or 'official'.")
    made = Template(tuple(FIELD.split(path.read_text(encoding="utf-8"))))
    if not made.names or set(made.names) - set(names):
        raise UsageError(f"{option}={path}: a question needs fields out of {_listed(names)}; got {_listed(made.names) or 'none'}.")
    return made


def _template(node: ast.expr, names: Mapping[str, str], path: Path) -> Template:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return Template((node.value,))
    if not isinstance(node, ast.JoinedStr):
        raise MmalignError(f"{path}, line {node.lineno}: a text that is neither a string nor an f-string; it is not the official file.")
    pieces = [""]
    for part in node.values:
        if isinstance(part, ast.FormattedValue):
            expression = ast.unparse(part.value)
            if expression not in names:
                raise MmalignError(f"{path}, line {node.lineno}: the text asks for {expression}; it is not the official file.")
            pieces += [names[expression], ""]
        else:
            assert isinstance(part, ast.Constant), ast.dump(part)
            pieces[-1] += str(part.value)
    return Template(tuple(pieces))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)
