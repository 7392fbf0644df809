"""GenAI-Bench: how probable does VQAScore find it that the image shows a designer's prompt? 1,600 prompts, twelve skills.

Paper: Li et al., arXiv 2406.13743; linzhiqiu/t2v_metrics genai_bench/ at 6ecb74f, prompts by way of UniWorld's copies at 8403e86. One image
per prompt, mean VQAScore of CLIP-FlanT5-XXL by skill. `all` is the mean over prompts that have a skill (1,593 of 1,600), as in the official
script. Expected from the paper's repository: SD 2.1 0.67, SDXL 0.72, DALL-E 3 0.78.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

from mmalign.types import MmalignError, Prompt, Row, UsageError

SKILLS = (
    *("basic", "advanced", "attribute", "scene", "spatial relation", "action relation"),
    *("part relation", "counting", "comparison", "differentiation", "negation", "universal"),
)


@dataclass(frozen=True)
class Evaluator:
    """`size`: all 1600 prompts, or the 527 of the VQAScore paper (arXiv 2404.01291)."""

    size: Literal["1600", "527"] = "1600"
    scorers: ClassVar[tuple[str, ...]] = ("vqascore",)
    scorer_options: ClassVar[Mapping[str, Any]] = {"vqascore": {"model": "zhiqiulin/clip-flant5-xxl", "tokenizer": "google/flan-t5-xxl"}}

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The prompts by id, tagged by basic, advanced or (seven of them) untagged, then by skills; meta holds the human ratings."""
        from mmalign.data import data_path

        if split != "test":
            raise UsageError(f"Suite 'genai_bench' has one split, test; got '{split}'.")
        infix = "" if self.size == "1600" else "-527"
        items, skills = (_object(data_path(f"genai_bench{infix}{part}")) for part in ("", "-skills"))
        if unknown := set(skills) - set(SKILLS):
            raise MmalignError(f"The skills file of GenAI-Bench names unknown skills: {', '.join(sorted(unknown))}.")
        of = {number: [skill for skill in SKILLS if number in skills.get(skill, ())] for number in map(int, items)}
        return [
            Prompt(name, item["prompt"], tuple(of[int(name)] or ["untagged"]), {"ratings": item.get("models", {})})
            for name, item in sorted(items.items())
        ]

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """all: mean over images whose prompt has a skill; every: over all images; skills by name. None where there is no image."""
        by_skill: dict[str, list[float]] = {skill: [] for skill in SKILLS}
        tagged, every = [], []
        for row in rows:
            value = row.value("vqascore").x
            every.append(value)
            own = [skill for skill in row.request.prompt.tags if skill in by_skill]
            tagged += [value] if own else []
            for skill in own:
                by_skill[skill].append(value)
        found = {"all": tagged, **{skill.replace(" ", "_"): values for skill, values in by_skill.items()}, "every": every}
        return {name: fmean(values) if values else None for name, values in found.items()}


def _object(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise MmalignError(f"{path} is not JSON ({error}).") from error
    if not isinstance(content, dict) or not content:
        raise MmalignError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content
