"""docs/tables.md: every command in it runs, and its counts are those of the claims."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers.runs import make_prompts, make_run
from mmalign.leaderboards import published, verdict_report, verdicts
from test_tables import VALUES, fingerprinted, geneval_run

from mmalign import cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(mmalign [^#\n]*?)\s*(?:#.*)?$", "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)), re.MULTILINE)
COMMANDS += re.findall(r"`(mmalign (?:report --leaderboard|claims run|claims report))`", TEXT)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with results of the bundled checkpoint and of a model that reproduces a row."""
    fingerprinted(make_run(tmp_path / "results", make_prompts(8), model="tiny-janus"), "tiny-janus")
    geneval_run(tmp_path / "results", "my-harmon", {**VALUES, "overall": 0.815})
    shutil.copytree(ROOT / "results" / "claims", tmp_path / "results" / "claims")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_runs(work: Path, command: str) -> None:
    expected = 3 if command.startswith("mmalign table dense-reward/2 --against") else 0  # nothing here reproduces a row of that table
    assert cli.main(shlex.split(command)[1:]) == expected


def test_the_page_shows_commands_of_every_verb() -> None:
    assert {command.split()[1] for command in COMMANDS} == {"table", "report", "claims"}


def test_the_counts_are_those_of_the_claims() -> None:
    kept = [verdict_report.content(verdicts.judge(claim)) for claim in verdicts.load().values() if claim.tests]
    counts = re.findall(r"\d+", verdict_report.summary(kept))
    assert re.findall(r"\d+", TEXT[TEXT.index("Of 51 claims") :])[: len(counts)] == counts
    assert f"{len(published.load_all())} tables" in TEXT
