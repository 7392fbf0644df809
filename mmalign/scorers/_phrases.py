"""The noun phrases that a prompt names: from its metadata, else by a small rule, or by spaCy where that is asked for.

T2I-R1's data give a prompt's `nouns`, `attr_nouns` (nouns with their attributes), `spatial_info`, `numeracy_info` and `task_type`; a prompt
with `noun_phrases` in its metadata is believed first. The rule needs no model and no download: words between separators (prepositions,
conjunctions, verbs of being and having, punctuation) form a phrase, determiners included, as spaCy's chunks do; determiners alone are no
phrase. It reads "a red car on the left of two dogs" as "a red car", "the left", "two dogs". It knows no verbs beyond its list: give
metadata, or parser=spacy, for free prose.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from mmalign.types import MmalignError, Prompt

Parser = Literal["rule", "spacy"]

# Directions are not things: T2I-CompBench drops them from spaCy's chunks (BLIP_vqa.py at 1b70949).
NOT_THINGS = ("top", "the side", "the left", "the right")
DETERMINERS = frozenset(
    ["a", "an", "the", "this", "that", "these", "those", "some", "any", "each", "every", "its", "his", "her", "their", "my"]
)
_PREPOSITIONS = (
    "about,above,across,after,against,along,among,around,as,at,before,behind,below,beneath,beside,between,beyond,by,down,during,for,from,in,"
    "inside,into,near,next,of,off,on,onto,out,outside,over,past,since,than,through,to,toward,towards,under,until,up,upon,via,with,within,without"
)
_VERBS = (
    "is,are,was,were,be,been,being,am,has,have,had,having,do,does,did,sit,sits,sitting,stand,stands,standing,lie,lies,lying,hang,hangs,hanging,"
    "hold,holds,holding,wear,wears,wearing,made,filled,covered"
)
_OTHERS = "and,or,but,while,where,which,who,whose,whom,when,what,it,they,he,she,there,here,not,no"
SEPARATORS = frozenset(",".join((_PREPOSITIONS, _VERBS, _OTHERS)).split(","))


def phrases(prompt: Prompt, parser: Parser, keys: Sequence[str]) -> list[str]:
    """The prompt's phrases under the first of these metadata keys that lists any, else those that the parser finds in its text."""
    for key in keys:
        listed = prompt.meta.get(key)
        if listed:
            return [str(phrase) for phrase in listed]
    return by_spacy(prompt.text) if parser == "spacy" else by_rule(prompt.text)


def by_rule(text: str) -> list[str]:
    """Runs of words between separators, without directions and without runs of determiners alone."""
    found = []
    for clause in re.split(r"[^\w\s'’-]+", text):
        run: list[str] = []
        for word in [*clause.split(), "and"]:
            if word.lower() not in SEPARATORS:
                run.append(word)
                continue
            if any(part.lower() not in DETERMINERS for part in run):
                found.append(" ".join(run))
            run = []
    return [phrase for phrase in found if phrase not in NOT_THINGS]


def without_determiner(phrase: str) -> str:
    """The phrase from its first word that is no determiner: what a detector is asked for."""
    words = phrase.split()
    while len(words) > 1 and words[0].lower() in DETERMINERS:
        words = words[1:]
    return " ".join(words)


def by_spacy(text: str) -> list[str]:
    """The noun chunks of spaCy's en_core_web_sm without directions, as T2I-CompBench takes them."""
    return [chunk.text for chunk in _spacy()(text).noun_chunks if chunk.text not in NOT_THINGS]


def spacy_version() -> str:
    """Which spaCy and model the chunks come from: a part of the scorer's fingerprint."""
    pipeline = _spacy()
    return f"{pipeline.meta['name']} {pipeline.meta['version']}"


@cache
def _spacy() -> Any:
    try:
        import spacy  # type: ignore[import-not-found,unused-ignore]

        return spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise MmalignError(
            f"parser=spacy needs spaCy and its model en_core_web_sm ({error}). Run `pip install spacy && python -m spacy download "
            "en_core_web_sm`, put `noun_phrases` into the prompts' metadata, or use parser=rule."
        ) from error
