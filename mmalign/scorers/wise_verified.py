"""WISE-Verified: a judge says whether an image realises the knowledge behind its prompt, yes or no (0 or 1).

PKU-YuanGroup/WISE vllm_eval.py at eb51174, the repository's protocol since April 2026, judged by Qwen3.5-35B-A3B behind vLLM without
thinking. Its prompts, groups and numbers are not those of the paper (scorer `wise`). The question is read from the official file (`mmalign
data add wise-verified-judge`). Changed under compat "fixed": asterisks and a full-width colon between the word and the score are read;
"upstream" reads as the official code does. A reply that cannot be read three times is a failure, where the script leaves the prompt out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmalign.judge import Question
from mmalign.scorers._judged import Judged, JudgeOptions
from mmalign.scorers._samples import Item
from mmalign.scorers.wise import Compat, questions, wording
from mmalign.types import Failure, Value

NEEDS = ("endpoint",)
VERSION = 1
THOUGHT = re.compile(r"(?:<think>.*?)?</think>\s*", re.DOTALL)
LABELLED = {
    "upstream": re.compile(r"\*{0,2}Score\*{0,2}\s*[:]?\s*([01])\b", re.IGNORECASE),
    "fixed": re.compile(r"Score[\s*]*[:：]?[\s*]*([01])\b(?!\.\d)", re.IGNORECASE),
}
BARE = re.compile(r"(?m)^\s*([01])\s*$")


@dataclass(frozen=True)
class Config(JudgeOptions):
    """`base_url`: of the vLLM server; `question`: "official", or a text file with {prompt} and {explanation}."""

    model: str = "Qwen/Qwen3.5-35B-A3B"
    base_url: str = "http://127.0.0.1:8000/v1"
    max_tokens: int = 500
    extra: dict[str, Any] = field(default_factory=lambda: {"chat_template_kwargs": {"enable_thinking": False}})
    compat: Compat = "fixed"


def load(config: Config = Config(), device: str = "cpu") -> Judged:
    """The device is the judge's."""
    system, question = wording(config.question, "wise-verified-judge", "wise_verified.question")

    def ask(item: Item) -> Mapping[str, Question] | Failure:
        return questions(item, system, question)

    def value(item: Item, said: Mapping[str, float]) -> Value:
        return Value(said["rating"])

    return Judged("wise_verified", VERSION, config, (system, question), ask, lambda text: score_of(text, config.compat), value)


def score_of(text: str, compat: Compat = "fixed") -> float:
    """The score that a reply gives, after its thoughts; ValueError when it gives none, or several bare ones."""
    text = THOUGHT.sub("", text).strip()
    labelled, bare = LABELLED[compat].search(text), BARE.findall(text)
    if labelled:
        return float(labelled[1])
    if len(bare) == 1:
        return float(bare[0])
    raise ValueError("it gives no score of 0 or 1")
