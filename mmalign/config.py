"""Dataclass <-> command line and YAML: options by annotation, fingerprints, secrets by reference.

Options live in the frozen dataclass of the file that uses them; `--set ROOT.OPTION=VALUE` reaches any of them, so a new option never
touches the command line. Standard library at import time; YAML is imported where it is read or written.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from mmalign.types import MmalignError, UsageError, digest

T = TypeVar("T")

_TRUE, _FALSE, _NONE = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("none", "null", "")
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")


class Secret:
    """The name of a secret, never its value: `reveal` reads the environment, then `.env` in the working directory.

    Because the value is not held, a secret can be an option's default, cross a process border or meet a logger without leaking.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def is_set(self) -> bool:
        return bool(os.environ.get(self.name) or read_env().get(self.name))

    def reveal(self) -> str:
        """The secret's text; MmalignError that names the variable (and no value) when it is set nowhere."""
        value = os.environ.get(self.name) or read_env().get(self.name)
        if not value:
            raise MmalignError(f"The secret {self.name} is not set. Export {self.name}, or put the line {self.name}=... into .env here.")
        return value

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.name == self.name

    def __hash__(self) -> int:
        return hash((Secret, self.name))


def read_env(path: Path = Path(".env")) -> dict[str, str]:
    """The NAME=VALUE lines of a .env file ({} when there is none); `export`, comments and quotes are understood."""
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not name.startswith("#"):
            value = value.strip()
            quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'"
            found[name.strip()] = value[1:-1] if quoted else value
    return found


def redact(text: str) -> str:
    """The text with the value of every known secret (.env, and environment names ending in KEY, TOKEN, SECRET, PASSWORD) as ***."""
    values = [value for name, value in {**os.environ, **read_env()}.items() if _SECRET_NAME.search(name.upper())]
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= 8:  # shorter values are words, and blanking words would garble the text
            text = text.replace(value, "***")
    return text


def build(cls: type[T], overrides: Mapping[str, Any], where: str) -> T:
    """A config of class `cls` with overrides (text from the command line, or typed values); `where` names its owner in errors."""
    hints = typing.get_type_hints(cls)
    known = [item.name for item in fields(cls) if item.init]  # type: ignore[arg-type]
    values = {}
    for option, value in overrides.items():
        name = option.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Options: {', '.join(known) or 'none'}."
            raise UsageError(f"Unknown option '{option}' of {where}. {hint}")
        values[name] = convert(value, hints[name], f"{where}.{name}")
    try:
        return cls(**values)
    except ValueError as error:  # a config may check its own ranges in __post_init__
        raise UsageError(f"The options of {where} do not fit: {error}") from error


def convert(value: Any, hint: Any, where: str) -> Any:
    """A value as the annotation wants it; UsageError with what was expected and what was given."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        match = next((choice for choice in arguments if choice == value or str(choice) == value), None)
        return match if match is not None else _refuse(value, f"one of {', '.join(map(str, arguments))}", where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build(hint, _mapping(value, where), where)
    if origin in (tuple, list) or hint in (tuple, list):
        return _convert_sequence(value, origin or hint, arguments, where)
    if origin is not None and issubclass(origin, Mapping) or hint is dict:
        value_hint = arguments[1] if len(arguments) == 2 else Any
        return {str(key): convert(item, value_hint, f"{where}.{key}") for key, item in _mapping(value, where).items()}
    return _convert_scalar(value, hint, where)


def parse_sets(items: Sequence[str]) -> dict[str, dict[str, str]]:
    """["geneval.detector=X", "sampling.guidance=3"] -> {"geneval": {"detector": "X"}, "sampling": {"guidance": "3"}}."""
    found: dict[str, dict[str, str]] = {}
    for item in items:
        target, equals, value = item.partition("=")
        root, dot, option = target.strip().partition(".")
        if not (equals and dot and root and option):
            raise UsageError(f"--set {item}: expected ROOT.OPTION=VALUE, such as sampling.guidance=5 or geneval.threshold=0.3.")
        root, option = root.lower().replace("-", "_"), option.replace("-", "_")
        if found.setdefault(root, {}).setdefault(option, value) != value:
            raise UsageError(f"--set {root}.{option} is given twice, as '{found[root][option]}' and as '{value}'.")
    return found


def check_roots(sets: Mapping[str, Mapping[str, str]], known: Iterable[str]) -> None:
    """UsageError when a --set names an owner that this command does not use, because it would change nothing."""
    names = sorted(set(known))
    for root in sets:
        if root not in names:
            near = difflib.get_close_matches(root, names, n=3, cutoff=0.6)
            hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"This command uses: {', '.join(names)}."
            raise UsageError(f"--set {root}.{next(iter(sets[root]))}: nothing here is called '{root}'. {hint}")


def plain(config: Any) -> Any:
    """A config as JSON-able data: dataclasses as dicts in field order, tuples as lists, paths as text, secrets as ***."""
    if is_dataclass(config) and not isinstance(config, type):
        return {item.name: plain(getattr(config, item.name)) for item in fields(config)}
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [plain(value) for value in config]
    if isinstance(config, (set, frozenset)):
        return sorted(plain(value) for value in config)
    return str(config) if isinstance(config, (Path, Secret)) else config


def show(config: Any) -> str:
    """A config as YAML, every option and its value, in the order of its fields."""
    return dump_yaml(plain(config))


def fingerprint(config: Any) -> str:
    """Digest of every option's value (secrets count as one constant), equal in every process."""
    return digest("config", plain(config))


def load_yaml(path: Path) -> Any:
    """The content of a YAML file; MmalignError with file and line when it is absent or malformed."""
    import yaml  # type: ignore[import-untyped,unused-ignore]

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MmalignError(f"The file {path} does not exist.") from error
    except yaml.YAMLError as error:
        raise MmalignError(f"The file {path} is not valid YAML: {error}") from error


def dump_yaml(content: Any) -> str:
    import yaml  # type: ignore[import-untyped,unused-ignore]

    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=140)


def _convert_union(value: Any, arguments: tuple[Any, ...], where: str) -> Any:
    if type(None) in arguments and (value is None or isinstance(value, str) and value.lower() in _NONE):
        return None
    choices = [choice for choice in arguments if choice is not type(None)]
    for choice in choices:
        if isinstance(choice, type) and type(value) is choice and choice is not str:
            return value
    if len(choices) == 1:
        return convert(value, choices[0], where)
    for choice in sorted(choices, key=lambda choice: choice is str):  # text fits everything, so it is tried last
        try:
            return convert(value, choice, where)
        except UsageError:
            continue
    return _refuse(value, " or ".join(map(_name, choices)), where)


def _convert_sequence(value: Any, kind: type, arguments: tuple[Any, ...], where: str) -> Any:
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("[]()").split(",") if part.strip()]
    if not isinstance(value, (tuple, list)):
        return _refuse(value, "a comma-separated list", where)
    if kind is list or len(arguments) == 2 and arguments[1] is Ellipsis or not arguments:
        hints = [arguments[0] if arguments else Any] * len(value)
    else:
        hints = list(arguments)
    if len(hints) != len(value):
        return _refuse(value, f"{len(hints)} comma-separated values", where)
    return kind(convert(item, hint, where) for item, hint in zip(value, hints, strict=True))


def _convert_scalar(value: Any, hint: Any, where: str) -> Any:
    if hint is Secret:
        return value if isinstance(value, Secret) else Secret(_text(value, where))
    if hint is bool:
        if isinstance(value, bool):
            return value
        text = str(value).lower()
        return text in _TRUE if text in _TRUE + _FALSE else _refuse(value, "true or false", where)
    if hint in (int, float):
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and not (hint is int and isinstance(value, float)):
            try:
                return hint(value)
            except ValueError:
                pass
        return _refuse(value, "a whole number" if hint is int else "a number", where)
    if hint is Path:
        return value if isinstance(value, Path) else Path(_text(value, where))
    if hint is str:
        return _text(value, where)
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    return _refuse(value, _name(hint), where)


def _text(value: Any, where: str) -> str:
    # YAML reads an unquoted 3 as a number; as the value of a text option it is text.
    return str(value) if isinstance(value, (str, int, float, Path)) and not isinstance(value, bool) else _refuse(value, "text", where)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        pairs = [part.partition(":") for part in value.strip("{}").split(",") if part.strip()]
        if all(colon for _, colon, _ in pairs):
            return {key.strip(): item.strip() for key, _, item in pairs}
    return value if isinstance(value, Mapping) else _refuse(value, "a mapping such as name:value,name:value", where)


def _refuse(value: Any, expected: str, where: str) -> Any:
    raise UsageError(f"{where} must be {expected}, got '{value}'.")


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))
