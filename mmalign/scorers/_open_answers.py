"""Is an answer in free words right? MMMU's open questions, and the short answers of GQA. Standard library only.

mmmu        MMMU-Benchmark/MMMU at bb0b95a, mmmu/utils/eval_utils.py: what stands after words such as "is" or "therefore", and every
            number in it, holds a right answer or equals a right number to two decimals
exact       GQA's eval.py: the very same characters
llava       haotian-liu/LLaVA at a689fd8, scripts/convert_gqa_for_eval.py before that eval.py: without outer blanks and last full stops,
            in lower case
lmms        lmms-eval at 75571cf, api/metrics.py: without case and punctuation on both sides
vlmevalkit  VLMEvalKit at e8e78f0, dataset/utils/vqa_eval.py, method accuracy: without case and outer blanks on both sides
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Literal

Rule = Literal["mmmu", "exact", "llava", "lmms", "vlmevalkit"]

LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")  # what follows one may be the answer
TRIVIAL = frozenset(":,.!?;'")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234,567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
UNPUNCTUATED = str.maketrans("", "", string.punctuation)


def plain(text: str, rule: Rule) -> str:
    """The answer as the rule compares it ("mmmu": as it is read from)."""
    if rule == "llava":
        return text.strip().rstrip(".").lower()
    if rule == "lmms":
        return text.lower().translate(UNPUNCTUATED)
    if rule == "vlmevalkit":
        return text.strip().lower()
    return text.strip().strip(".").lower() if rule == "mmmu" else text


def is_right(answer: str, right: Sequence[str], rule: Rule) -> bool:
    """Whether the answer is one of the right ones by the rule."""
    if rule == "mmmu":
        return _agrees(said(answer), [form for one in right for form in _forms(one)])
    changes_gold = rule in ("lmms", "vlmevalkit")
    return plain(answer, rule) in [plain(one, rule) if changes_gold else one for one in right]


def said(answer: str) -> list[str | float]:
    """What an answer claims by MMMU's rule: the tails of its lines and the numbers in them, in the form in which they are compared."""
    tails = _tails(plain(answer, "mmmu"))
    return [form for one in [*tails, *(number for tail in tails for number in _numbers(tail))] for form in _forms(one)]


def _tails(text: str) -> list[str]:
    """Of each line the shortest part after one of LEADS (in the last line "=" too); the whole text where there is none.

    The official split at full stops asks for a capital in text that is in lower case by then, so it never splits.
    """
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        shortest = ""
        for lead in (*LEADS, "=") if number == len(lines) else LEADS:
            if lead in line:
                tail = line.rpartition(lead)[2].strip()
                shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in TRIVIAL:
            found.append(shortest)
    return found or [text]


def _numbers(text: str) -> list[str]:
    return [number for pattern in NUMBERS for number in pattern.findall(text)]


def _forms(text: str) -> list[str | float]:
    """A number rounded to two decimals; else the text in lower case, where a single character needs a blank on one side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def _agrees(claims: Sequence[str | float], right: Sequence[str | float]) -> bool:
    for claim in claims:
        if isinstance(claim, float) and claim in right:
            return True
        if isinstance(claim, str) and any(isinstance(one, str) and one in claim for one in right):
            return True
    return False
