"""What T2I-CompBench and its judged variant share: prompts by category, what they ask as metadata, and the means."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from mmalign.types import MmalignError, Prompt, Row

Version = Literal["++", "1"]
CATEGORIES = {
    "++": ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"),
    "1": ("color", "shape", "texture", "spatial", "non_spatial", "complex"),
}
RELATIONS = ("on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of", "on top of")
RELATIONS_3D = ("in front of", "behind", "hidden")
PERSONS = ("girl", "boy", "man", "woman")
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
ALIASES = {"ship": "boat", "telivision": "tv", "goldfish": "fish", "painting": "picture", **dict.fromkeys(PERSONS, "person")}
_ARTICLE = re.compile(r"^(?:a|an|the)\s+", re.IGNORECASE)
_ENDS = re.compile(r"[.,;]|\b(?:and|while|with|by|is|are|was|were)\b", re.IGNORECASE)


def read(version: Version, path_of: Callable[[str], Path]) -> list[Prompt]:
    """All prompts, category by category, in the files' order; the id is the category and the line's index from 0.

    meta: `category`; of spatial prompts `relation` and `pair` (empty where a text has none: its spatial score is 0, as there); of numeracy
    `counts` = [[name, number], ...]; of complex ones `aspects`.
    """
    from mmalign.data import load_lines

    lines = {category: load_lines(path_of(f"t2i_compbench-{category}")) for category in CATEGORIES[version]}
    names = _names(load_lines(path_of("t2i_compbench-objects"))) if "numeracy" in lines else {}
    kinds = {kind: _members(load_lines(path_of(f"t2i_compbench-complex-{kind}"))) for kind in ("spatial", "action")}
    made = []
    for category, texts in lines.items():
        for index, text in enumerate(map(str.strip, texts)):
            meta = {"category": category, **_asked(category, text, names, kinds)}
            made.append(Prompt(f"{category}-{index:03d}", text, (category,), meta))
    return made


def means(rows: Sequence[Row], scorer: str, version: Version, scale: float = 1.0) -> dict[str, float | None]:
    """Each category's mean over its prompts' images; overall: their plain mean, None while a category is empty."""
    by_category: dict[str, dict[str, list[float]]] = {category: {} for category in CATEGORIES[version]}
    for row in rows:
        by_category[row.tag].setdefault(row.request.prompt.id, []).append(row.value(scorer).x)
    found = {category: scale * fmean(map(fmean, by_prompt.values())) if by_prompt else None for category, by_prompt in by_category.items()}
    known = [mean for mean in found.values() if mean is not None]
    return {"overall": fmean(known) if len(known) == len(found) else None, **found}


def relation_of(text: str, relations: Sequence[str] = RELATIONS) -> tuple[str, tuple[str, str]] | None:
    """The first of these relations in a text and the two things around it, without articles; None when there is none.

    The official code takes the first and last noun that spaCy finds; here a thing is what stands next to the relation, so that "traffic
    light" is one thing. People are "person", as in the official detector's labels.
    """
    relation = next((words for words in relations if words in text), None)
    if relation is None:
        return None
    before, after = text.split(relation, 1)
    after = after.strip().removeprefix("by ")  # hidden by
    first, second = _ENDS.split(before.strip()), _ENDS.split(after)
    things = [next((part for part in parts if part.strip()), "") for parts in (first[::-1], second)]
    left, right = (_thing(part) for part in things)
    return (relation, (left, right)) if left and right else None


def counts_of(text: str, names: Mapping[str, str]) -> list[list[Any]]:
    """What a text counts, as [name, number]: a number word and then a name of one or two words (`names`: either number -> singular)."""
    words = re.findall(r"[\w-]+", text.lower())
    found: list[list[Any]] = []
    for at, word in enumerate(words):
        following = (" ".join(words[at + 1 : at + 1 + size]) for size in (2, 1))
        name = next((names[some] for some in following if some in names), None) if word in NUMBERS else None
        if name is not None:
            found.append([ALIASES.get(name, name), NUMBERS[word]])
    return found


def _asked(category: str, text: str, names: Mapping[str, str], kinds: Mapping[str, frozenset[str]]) -> dict[str, Any]:
    if category in ("spatial", "3d_spatial"):
        return _place(text, RELATIONS if category == "spatial" else RELATIONS_3D)
    if category == "numeracy":
        counts = counts_of(text, names)
        if not counts:
            raise MmalignError(f"The numeracy prompt {text!r} counts nothing that the list of objects names.")
        return {"counts": counts}
    if category != "complex":
        return {}
    member = _member(text)
    aspects = ["spatial"] if member in kinds["spatial"] else ["action"] if member in kinds["action"] else ["spatial", "action"]
    return {"aspects": aspects, **(_place(text, RELATIONS) if "spatial" in aspects else {})}


def _place(text: str, relations: Sequence[str]) -> dict[str, Any]:
    found = relation_of(text, relations)
    return {"relation": found[0], "pair": list(found[1])} if found else {"relation": "", "pair": []}


def _thing(text: str) -> str:
    name = _ARTICLE.sub("", text.strip()).strip().lower()
    return "person" if name in PERSONS else name


def _names(lines: Sequence[str]) -> dict[str, str]:
    """Singular and plural -> singular, from lines "cup - cups"; the first line that names a word decides."""
    names: dict[str, str] = {}
    for line in lines:
        singular, dash, plural = (part.strip() for part in line.partition(" - "))
        if not dash or not plural:
            raise MmalignError(f"The list of objects holds the line {line!r}; expected 'singular - plural'.")
        names.setdefault(singular, singular)
        names.setdefault(plural, singular)
    return names


def _member(text: str) -> str:
    return text.strip("\n").split(".")[0].lower()


def _members(lines: Sequence[str]) -> frozenset[str]:
    return frozenset(_member(line.strip()) for line in lines)
