"""A name -> a file: finds built-ins, entry points and plug files without importing them.

A file is a registration. `evaluators/wise.py` is the suite `wise`; the first line of its docstring is its description; files whose
name starts with an underscore are private. Other packages add files through the entry-point groups `mmalign.models`, `mmalign.scorers`,
`mmalign.evaluators` and `mmalign.trainers` (the value is a module), and a single file joins with `--plug file.py`.
Nothing is imported before `load`: names come from paths, descriptions and needs from the source text.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from mmalign.config import build, load_yaml
from mmalign.types import Card, MmalignError, UsageError

KINDS = ("models", "scorers", "evaluators", "trainers")
NOUNS = {"models": "model family", "scorers": "scorer", "evaluators": "suite", "trainers": "trainer"}
# What a plug file must define at its top level to be of a kind; the first kind that fits wins.
MARKS = {
    "evaluators": {"Evaluator"},
    "models": {"Sampling", "recognises", "load"},
    "trainers": {"Config", "train"},
    "scorers": {"Config", "load"},
}

CLEARLY = 0.1  # a known name that is so much more like what was typed than the others is the only one suggested

_DOCSTRING = re.compile(r'(?:\s|#[^\n]*\n)*[rR]?("""|\'\'\'|"|\')')
_NEEDS = re.compile(r"^NEEDS\b", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One registered file. `module` is the name under which `load` imports it; `origin` is built-in, entry point or plug."""

    kind: str
    name: str
    description: str
    path: Path
    module: str
    origin: str
    needs: tuple[str, ...] = ()  # e.g. "weights: openai/clip-vit-large-patch14", "extra: ocr", "endpoint"


def normalise(name: str) -> str:
    """The one spelling of a name: lower case, underscores for hyphens, no white space around it."""
    return name.strip().lower().replace("-", "_")


def entries(kind: str, plugs: Sequence[Path] = ()) -> dict[str, Entry]:
    """Every entry of a kind by name, sorted. Two files with one name are an error; nothing is imported."""
    if kind not in KINDS:
        raise UsageError(f"Unknown kind '{kind}'{suggest(kind, KINDS)}")
    found: dict[str, Entry] = {}
    for entry in (*_built_ins(kind), *_entry_points(kind), *_plugs(kind, plugs)):
        other = found.get(entry.name)
        if other is None:
            found[entry.name] = entry
        elif other.path.resolve() != entry.path.resolve():
            raise UsageError(
                f"Two files are the {NOUNS[kind]} '{entry.name}': {other.path} ({other.origin}) and {entry.path} ({entry.origin}). "
                "Rename one of them: the file's name is its registered name."
            )
    return dict(sorted(found.items()))


def find(kind: str, name: str, plugs: Sequence[Path] = ()) -> Entry:
    """The entry of a name in any spelling; UsageError with the nearest names when there is none."""
    known = entries(kind, plugs)
    entry = known.get(normalise(name))
    if entry is None:
        raise UsageError(f"Unknown {NOUNS[kind]} '{name}'{suggest(normalise(name), known)}")
    return entry


def load(entry: Entry) -> ModuleType:
    """Import the file of an entry. A file that cannot be imported is an MmalignError that names the file and the cause."""
    loaded = sys.modules.get(entry.module)
    if loaded is not None and (entry.origin != "plug" or loaded.__file__ == str(entry.path)):
        return loaded
    try:
        return _import_file(entry.module, entry.path) if entry.origin == "plug" else importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        raise MmalignError(
            f"The {NOUNS[entry.kind]} '{entry.name}' ({entry.path}) needs the module '{error.name}', which is not installed. "
            "`mmalign doctor` names the command that installs it."
        ) from error
    except MmalignError:
        raise
    except Exception as error:  # a plug-in may fail in any way; the sentence must still name the file
        raise MmalignError(
            f"The {NOUNS[entry.kind]} '{entry.name}' could not be imported from {entry.path}: {type(error).__name__}: {error}. "
            "Correct that file, or leave it out; --debug shows the traceback."
        ) from error


def card(entry: Entry) -> Card:
    """The protocol card of a suite: cards/<name>.yaml (or <name>.yaml) beside the suite's file, whose fields are those of types.Card."""
    stem = entry.path.stem
    places = (entry.path.parent / "cards" / f"{stem}.yaml", entry.path.with_suffix(".yaml"))
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise MmalignError(f"The suite '{entry.name}' has no protocol card: expected {places[0]} or {places[1]}.")
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise MmalignError(f"The card {path} must be a mapping of field to value, got {type(content).__name__}.")
    content.setdefault("name", entry.name)
    absent = [item.name for item in fields(Card) if item.default is MISSING and item.name not in content]
    if absent:
        raise MmalignError(f"The card {path} lacks {', '.join(absent)}. Every field of a card without a default is required.")
    return build(Card, content, f"the card {path}")


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an "Unknown ..." sentence: the nearest known names, or all of them when none is near."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        likeness = [difflib.SequenceMatcher(None, known, name).ratio() for known in near]
        near = [known for known, like in zip(near, likeness, strict=True) if like > likeness[0] - CLEARLY]
        return f". Did you mean {' or '.join(repr(item) for item in near)}?"
    return f". Known: {', '.join(names)}." if names else ". None is known."


def _built_ins(kind: str) -> Iterator[Entry]:
    import mmalign

    seen: set[Path] = set()
    for root in map(Path, mmalign.__path__):
        folder = (root / kind).resolve()
        if folder in seen or not folder.is_dir():
            continue
        seen.add(folder)
        for path in sorted(folder.glob("*.py")):
            if not path.name.startswith("_"):
                yield _entry(kind, path.stem, path, f"mmalign.{kind}.{path.stem}", "built-in")


def _entry_points(kind: str) -> Iterator[Entry]:
    for point in entry_points(group=f"mmalign.{kind}"):
        path = _locate(point.value)
        if path is None:
            package = point.dist.name if point.dist else "an installed package"
            text = f"broken: {package} declares the module '{point.value}', which does not exist"
            yield Entry(kind, normalise(point.name), text, Path(point.value), point.value, "entry point")
        else:
            yield _entry(kind, point.name, path, _module(point), "entry point")


def _module(point: EntryPoint) -> str:
    return point.value.partition(":")[0].strip()


def _locate(value: str) -> Path | None:
    """The file of a dotted module, found without importing its parent packages (find_spec of a submodule would)."""
    top, *rest = value.partition(":")[0].strip().split(".")
    spec = importlib.util.find_spec(top)
    name = top
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _plugs(kind: str, plugs: Sequence[Path]) -> Iterator[Entry]:
    for path in map(Path, plugs):
        if not path.is_file() or path.suffix != ".py":
            raise UsageError(f"--plug {path}: expected an existing Python file (.py).")
        if kind_of(path) == kind:
            yield _entry(kind, path.stem, path.resolve(), f"mmalign_plug_{kind}_{normalise(path.stem)}", "plug")


def kind_of(path: Path) -> str:
    """The kind of a plug file, by what it defines at its top level (MARKS)."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UsageError(f"--plug {path} is not valid Python: {error}") from error
    defined = {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    for kind, marks in MARKS.items():
        if marks <= defined:
            return kind
    wanted = "; ".join(f"{' and '.join(sorted(marks))} for a {NOUNS[kind]}" for kind, marks in MARKS.items())
    raise UsageError(f"--plug {path} defines nothing that mmalign can register. It must define {wanted} (docs/extend.md).")


def _entry(kind: str, name: str, path: Path, module: str, origin: str) -> Entry:
    source = path.read_text(encoding="utf-8")
    return Entry(kind, normalise(name), _description(source), path, module, origin, _needs(source, path))


def _description(source: str) -> str:
    """First line of the module docstring. Only the docstring is parsed: a listing of a hundred files must stay instant."""
    opening = _DOCSTRING.match(source)
    if opening is None:
        return ""
    closing = source.find(opening.group(1), opening.end())
    if closing < 0:
        return ""
    docstring = ast.get_docstring(ast.parse(source[: closing + len(opening.group(1))]))
    return docstring.strip().splitlines()[0].strip() if docstring and docstring.strip() else ""


def _needs(source: str, path: Path) -> tuple[str, ...]:
    """The literal tuple `NEEDS`, parsed from its first line to the line that completes it."""
    start = _NEEDS.search(source)
    if start is None:
        return ()
    lines = source[start.start() :].splitlines()
    for end in range(1, len(lines) + 1):
        try:
            node = ast.parse("\n".join(lines[:end])).body[0]
        except SyntaxError:
            continue
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, (ast.Tuple, ast.List)):
            return tuple(str(item) for item in ast.literal_eval(node.value))
        break
    raise MmalignError(f"NEEDS in {path} must be a literal tuple of strings, such as NEEDS = ('extra: ocr',).")


def _import_file(module: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None, path
    made = importlib.util.module_from_spec(spec)
    sys.modules[module] = made  # before execution: dataclasses look their module up by name
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[module]
        raise
    return made
