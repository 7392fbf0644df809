"""Which option an answer to a multiple-choice question names: the rules in use, each without the guess that its script ends with.

    mmmu        MMMU-Benchmark/MMMU at bb0b95a, mmmu/utils/eval_utils.py: "(B)", else " B ", else, in over five words, an option's text
    lmms_mmmu   lmms-eval at 75571cf, tasks/_task_utils/mmmu_mcq_utils.py: needs no blank before the letter ("DNA is" names A) and
                reads "B." too
    lmms_mmt    lmms-eval's tasks/mmt/utils.py: "(B)", else " B ", else "B."; no texts
    can_infer   OpenGVLab/MMT-Bench at 84012c9, vlmeval/utils/matching_util.py: the one letter among the words, else the one option
                whose text the answer holds
    vlmevalkit  open-compass/VLMEvalKit at e8e78f0, the same file: the letter must be among the last four words, "answer is B" is read,
                and a text is not looked for in a long answer
    first       lmms-eval's tasks/seedbench/utils.py: the first character, in either case

Of several options that the first three find, the last named counts. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce
from typing import Literal

Rule = Literal["mmmu", "lmms_mmmu", "lmms_mmt", "can_infer", "vlmevalkit", "first"]

EDGES = ",.!?;:'"  # stripped from both ends, one after the other
ENOUGH_WORDS = 5  # an option's text is looked for in answers of more words
MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
DECLINED = (
    *("Sorry, I can't help with images of people yet.", "I can't process this file."),
    *("I'm sorry, but without the image provided", "Cannot determine the answer"),
)
NO_OPTION = "Z"  # what VLMEvalKit's own judge answers for none of them
TAIL = 4
STATED = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)

# What marks a letter, and the mark by which the last of several is found: the ports look for the latter whatever they found first.
_SPACED = " {} "
_MARKED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "mmmu": (("({})", "({})"), (_SPACED, _SPACED)),
    "lmms_mmmu": (("({})", "({})"), ("{} ", _SPACED), ("{}.", _SPACED)),
    "lmms_mmt": (("({})", _SPACED), (_SPACED, _SPACED), ("{}.", _SPACED)),
}


def read(answer: str, options: Mapping[str, str], rule: Rule) -> str | None:
    """The letter of the option (A, B, ...) that the answer names by the rule; None when it names none, or the rule cannot tell."""
    if rule == "first":
        letter = answer.strip()[:1].upper()
        return letter if letter in options else None
    if rule in _MARKED:
        return _last_named(answer, options, rule)
    named = _only_letter(answer, options, rule)
    return None if named == NO_OPTION else named or _only_text(answer, options, rule)


def _last_named(answer: str, options: Mapping[str, str], rule: str) -> str | None:
    text = f" {reduce(str.strip, EDGES, answer)} "
    for mark, place in _MARKED[rule]:
        found = [letter for letter in options if mark.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    lower = text.lower()
    if rule == "lmms_mmt" or len(text.split()) <= ENOUGH_WORDS:
        return None
    named = [letter for letter, option in options.items() if option.lower() in lower]
    return max(named, key=lambda letter: lower.rfind(options[letter].lower())) if named else None


def _only_letter(answer: str, options: Mapping[str, str], rule: str) -> str | None:
    """The letter, None, or NO_OPTION, after which texts are not looked for."""
    if any(words in answer for words in DECLINED):
        return NO_OPTION
    words = answer.translate(MARKS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and (rule == "can_infer" or words.index(letters[0]) >= len(words) - TAIL):
        return letters[0]
    if not letters and NO_OPTION in words:
        return NO_OPTION
    stated = STATED.search(answer) if rule == "vlmevalkit" else None
    return stated[1].upper() if stated and stated[1].upper() in options else None


def _only_text(answer: str, options: Mapping[str, str], rule: str) -> str | None:
    if rule == "vlmevalkit" and len(answer) > 2 * sum(map(len, options.values())):
        return None
    found = [letter for letter, option in options.items() if option.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None
