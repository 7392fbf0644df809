"""Shapes: compositional prompts of the testbed world, judged by an exact oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from mmalign.types import Prompt, Row, UsageError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Evaluator:
    """`per_kind` prompts of each of the 17 kinds (six of GenEval, seven of GenEval++, dense prompts of three to six facts)."""

    per_kind: int = 16
    scorers: ClassVar[tuple[str, ...]] = ("shapes",)

    def prompts(self, split: str = "test") -> list[Prompt]:
        """The seeded prompts of a split; about half of the coloured test prompts ask for pairs that training never showed."""
        from mmalign.testbed import world

        if split not in SPLITS:
            raise UsageError(f"suite 'shapes' has no split {split!r}; choose one of {', '.join(SPLITS)}")
        return world.prompts(split, self.per_kind)

    def aggregate(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """Strict rate: the mean over kinds of the share of images that are right in everything; the mean share of facts beside it."""
        kinds = sorted({row.tag for row in rows})
        by_kind = {kind: [row.value("shapes").parts["strict"] for row in rows if row.tag == kind] for kind in kinds}
        halves = {
            half: [row.value("shapes").parts["strict"] for row in rows if half in row.request.prompt.tags] for half in ("seen", "novel")
        }
        return {
            "strict": fmean(map(fmean, by_kind.values())) if rows else None,
            "share": fmean(row.value("shapes").parts["share"] for row in rows) if rows else None,
            **{half: fmean(values) if values else None for half, values in halves.items()},
            **{kind: fmean(values) for kind, values in by_kind.items()},
        }
