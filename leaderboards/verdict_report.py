"""Verdicts on disk and on paper: a JSON file per claim and evidence in `results/claims/`, and the report over all of them.

JSON: schema, number, name, paper, claim, evidence, verdict, effect {what, low, high} (the comparison that decided), comparisons {all,
agree, opposite}, seeds, minutes, note, command. `evidence` is "published figures" (<name>.json, no seeds) or "testbed"
(<name>.testbed.json). The files hold no date, so the same figures give the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.leaderboards.verdicts import Verdict

from mmalign.store import disk_errors, write_atomic
from mmalign.types import MmalignError

ANSWERS = ("opposite", "not resolved", "agrees")  # what a reader should see first
FIELDS = (
    *("schema", "number", "name", "paper", "claim", "evidence", "verdict", "effect", "comparisons"),
    *("seeds", "minutes", "note", "command"),
)


def content(verdict: Verdict) -> dict[str, Any]:
    """A verdict as its JSON file holds it."""
    claim, decided = verdict.claim, verdict.decided_by
    answers = Counter(one.answer for one in verdict.comparisons)
    return {
        "schema": 1,
        "number": claim.number,
        "name": claim.name,
        "paper": claim.paper,
        "claim": claim.claim,
        "evidence": verdict.evidence,
        "verdict": verdict.answer,
        "effect": {"what": decided.what, "low": round(decided.low, 6) + 0.0, "high": round(decided.high, 6) + 0.0},
        "comparisons": {"all": len(verdict.comparisons), "agree": answers["agrees"], "opposite": answers["opposite"]},
        "seeds": verdict.seeds,
        "minutes": round(verdict.minutes, 1) or 0,
        "note": claim.note,
        "command": f"mmalign claims run {claim.name}" + (" --budget 10" if verdict.seeds else ""),
    }


def write(folder: Path, verdicts: Iterable[Verdict]) -> list[Path]:
    """Write the verdicts and the report over everything that the folder then holds; the paths of the verdicts."""
    written = []
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for verdict in verdicts:
            written.append(folder / f"{verdict.claim.name}{'.testbed' if verdict.seeds else ''}.json")
            write_atomic(written[-1], (json.dumps(content(verdict), indent=2, ensure_ascii=False) + "\n").encode())
        write_atomic(folder / "README.md", markdown(read(folder)).encode())
    return written


def read(folder: Path) -> list[dict[str, Any]]:
    """Every verdict of a folder by number. MmalignError for a file that is none, and for a folder without any."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            verdict = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise MmalignError(f"{path} is not a verdict: it holds no valid JSON ({error}). Run `mmalign claims run` again.") from error
        if not isinstance(verdict, dict) or set(verdict) != set(FIELDS) or verdict["verdict"] not in ANSWERS:
            raise MmalignError(f"{path} is not a verdict of format 1. Run `mmalign claims run` again.")
        found.append(verdict)
    if not found:
        raise MmalignError(f"There is no verdict in {folder}. Make them with `mmalign claims run`.")
    return sorted(found, key=lambda verdict: (verdict["number"], verdict["evidence"], verdict["name"]))


def summary(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """How many claims have which verdict, in a sentence."""
    count = Counter(verdict["verdict"] for verdict in verdicts)
    return f"{len(verdicts)} claims: {count['agrees']} agree, {count['not resolved']} are not resolved, {count['opposite']} are opposite."


def effect(verdict: Mapping[str, Any]) -> str:
    """The interval that decided: above zero the claim holds."""
    return f"[{verdict['effect']['low']:+.4g}, {verdict['effect']['high']:+.4g}]"


def markdown(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """The report: unfavourable verdicts first, each with what decided it."""
    lines = [
        "# Claims",
        "",
        summary(verdicts),
        "",
        "The evidence *published figures* asks what the printed digits carry: a number stands for all that rounds to it, and where it",
        "disagrees with its own columns, for both. Above zero the claim holds at the place that decides; the effect is in the units of",
        "that table, as a share for a relative claim. No such verdict says what another training run would give. The evidence *testbed*",
        "is a small measurement or training on the shapes world, compared seed by seed; `values/` holds every number.",
    ]
    for answer in ANSWERS:
        members = [verdict for verdict in verdicts if verdict["verdict"] == answer]
        if members:
            lines += [
                "",
                f"## {answer.capitalize()}",
                "",
                "| | claim | evidence | decided by | effect | remark |",
                "|---|---|---|---|---|---|",
            ]
        for one in members:
            cells = (
                one["number"],
                f"**{one['name']}** ({one['paper']}). {one['claim']}",
                one["evidence"],
                one["effect"]["what"],
                effect(one),
            )
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in (*cells, one["note"])) + " |")
    return "\n".join(lines) + "\n"
