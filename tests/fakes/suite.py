"""A suite for tests and the job that runs it on the test model and scorer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from mmalign import registry
from mmalign.evaluate import Job
from mmalign.types import Card, Prompt, Row
from mmalign.worker import Recipe

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Evaluator:
    """`count` prompts in two tags; the share of bright images by tag, and their mean."""

    count: int = 6
    weight: float = 1.0
    ids: tuple[str, ...] = ()
    scorers: ClassVar[tuple[str, ...]] = ("brightness",)

    def prompts(self, split: str = "test") -> list[Prompt]:
        ids = self.ids or tuple(f"p{number:03d}" for number in range(self.count))
        return [Prompt(name, f"{split} picture {name}", ("odd" if n % 2 else "even",), {"n": n}) for n, name in enumerate(ids)]

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        tags = {tag: [row.value("brightness").parts["bright"] for row in rows if row.tag == tag] for tag in ("even", "odd")}
        shares = {tag: fmean(values) if values else None for tag, values in tags.items()}
        known = [share for share in shares.values() if share is not None]
        overall = fmean(known) if len(known) == len(shares) else None
        brightness = fmean(row.value("brightness").x for row in rows) if rows else None
        return {"overall": overall, "brightness": brightness, **shares}


def card(**changes: Any) -> Card:
    fields = {
        "name": "dots_suite",
        "title": "Dots",
        "paper": "none",
        "repository": "none",
        "commit": "none",
        "prompts": 6,
        "images_per_prompt": 2,
        "size": "8x8",
        "judge": "mean brightness",
        "formula": "mean over tags of the share of bright images",
        "headline": "overall",
        "licence": "none",
    }
    return Card(**{**fields, **changes})


def make_weights(folder: Path, content: str = "weights", faults: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.txt").write_text(content)
    set_faults(folder, faults or {})
    return folder


def set_faults(folder: Path, faults: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.json").write_text(json.dumps(dict(faults)))


def calls(folder: Path) -> list[str]:
    """The request ids that the model or scorer of this folder has worked on, in order."""
    log = folder / "calls.log"
    return log.read_text().splitlines() if log.is_file() else []


def model_recipe(weights: Path, **overrides: Any) -> Recipe:
    return Recipe(registry.find("models", "dots", [HERE / "dots.py"]), overrides, {"path": weights})


def scorer_recipe(faults: Path | None = None, **overrides: Any) -> Recipe:
    options = overrides if faults is None else {"faults": faults, **overrides}
    return Recipe(registry.find("scorers", "brightness", [HERE / "brightness.py"]), options)


def make_job(weights: Path, scorer: Recipe | None = None, count: int = 6, sampling: Mapping[str, Any] | None = None, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "suite": "dots_suite",
        "evaluator": Evaluator(count),
        "card": card(prompts=count),
        "model_name": "dots",
        "model": model_recipe(weights, **(sampling or {})),
        "scorers": {"brightness": scorer or scorer_recipe()},
    }
    return Job(**{**fields, **changes})
