"""A prompt's questions with what they depend on, and the score of their answers (DPG-Bench, DSG). Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.types import Failure, Sample


@dataclass(frozen=True)
class Asked:
    """One question of a prompt: its number, its words, the numbers of the questions that it presupposes."""

    number: int
    text: str
    parents: tuple[int, ...] = ()


def questions_of(sample: Sample) -> list[Asked] | Failure:
    """The questions in the prompt's metadata: meta["questions"] = [{"number", "text", "parents"}, ...]."""
    prompt = sample.request.prompt
    try:
        found = [Asked(int(one["number"]), str(one["text"]), tuple(map(int, one["parents"]))) for one in prompt.meta["questions"]]
    except (KeyError, TypeError, ValueError) as error:
        return Failure(
            "score", "missing", f"The prompt {prompt.id} has no question graph in its metadata ({type(error).__name__}: {error})."
        )
    numbers = {one.number for one in found}
    lost = [(one.number, parent) for one in found for parent in one.parents if parent not in numbers]
    if not found or lost or len(numbers) < len(found):
        what = f"question {lost[0][0]} depends on {lost[0][1]}, which is not asked" if lost else "it asks nothing, or one number twice"
        return Failure("score", "missing", f"The question graph of the prompt {prompt.id} is broken: {what}.")
    return found


def score(questions: Sequence[Asked], answers: Mapping[int, float], is_cascading: bool = True) -> float:
    """Share of questions answered yes, where a question whose parent is answered no counts as no.

    Cascading (DPG-Bench): in the order of the questions, a question so set to no counts as no for its own children. Otherwise (DSG) only
    what was answered does.
    """
    kept = {one.number: answers[one.number] for one in questions}
    for one in questions:
        seen: Mapping[int, Any] = kept if is_cascading else answers
        if any(seen[parent] == 0 for parent in one.parents):
            kept[one.number] = 0.0
    return sum(kept.values()) / len(kept)


def parts(answers: Mapping[int, float]) -> dict[str, float]:
    """The answers as parts of a value: "q3" -> 1.0 for yes."""
    return {f"q{number}": answer for number, answer in sorted(answers.items())}
