"""`mmalign eval --suite all`: every suite on tiny-janus with tiny scorers, and what of its protocol each result, page and row names."""

from __future__ import annotations

import html
import json
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.every_suite import LIMIT, MAKERS, REPLIES, EverySuite
from helpers.suites import needs

from mmalign import cli, config, registry, results
from mmalign.tables import ours

RUN = ["eval", "--model", "tiny-janus", "--limit", str(LIMIT), "--images-per-prompt", "1", "--device", "cpu", "--executor", "inline"]


def differs(name: str, value: str) -> bool:
    """Whether an option that was set is one whose default the protocol prescribes, and another value than that."""
    root, _, option = name.partition(".")
    for kind, cls in (("evaluators", "Evaluator"), ("scorers", "Config")):
        if root in registry.entries(kind):
            options = getattr(registry.load(registry.find(kind, root)), cls)
            if option in {item.name for item in fields(options)}:
                is_free = option in getattr(options, "free", ())
                return not is_free and getattr(config.build(options, {option: value}, root), option) != getattr(options(), option)
    raise AssertionError(f"nothing has the option {name}")


def test_every_suite_says_how_it_runs() -> None:
    absent = set(registry.entries("evaluators")) - set(MAKERS) - set(REPLIES)
    assert not absent, f"tests/helpers/every_suite.py says nothing of {sorted(absent)}"


@pytest.mark.slow
@needs("geneval")
def test_all_suites_run_and_name_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rapidocr", reason="needs the extra [ocr]")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    suites = list(registry.entries("evaluators"))
    with EverySuite(tmp_path, monkeypatch) as every:
        sets = {suite: every.sets(suite) for suite in suites}
        typed = {name: str(value) for own in sets.values() for name, value in own.items()}
        words = [word for name, value in typed.items() for word in ("--set", f"{name}={value}")]
        code = cli.main([*RUN, "--suite", "all", "--results", str(tmp_path / "r"), "--set", "sampling.max_tokens=3", *words, "--json"])
    answers = json.loads(capsys.readouterr().out)
    reasons = {one["suite"]: one["reason"] for one in answers if one["status"] == "left out"}
    assert not reasons and len(answers) == len(suites)
    failed = {one["suite"]["name"]: one["counts"]["failed"] for one in answers if one["counts"]["failed"]}
    assert set(failed) <= {"mmt_bench"}, failed  # tiny-janus reads one picture, and a question there has two
    assert code == (0 if all(one["is_complete"] for one in answers) else 3)
    rows = {one.suite: one for one in ours.read(tmp_path / "r")}
    for file in results.find(tmp_path / "r"):
        result = results.read(file)
        suite = str(result.suite["name"])
        told = {one.field: one for one in result.deviations}
        card = registry.card(registry.find("evaluators", suite))
        assert ("limit" in told) == (result.status == "partial") and ("images_per_prompt" in told) == (card.images_per_prompt != 1)
        lacking = {name for name, value in sets[suite].items() if differs(name, str(value)) and name not in told}
        assert not lacking, f"{suite} does not say that {sorted(lacking)} differ"
        line, page = results.paste_line(result), html.unescape((file.parent / "index.html").read_text())
        for one in result.deviations:
            differs_by = f"{one.field}={one.used} (card: {one.official})"
            assert differs_by in line and differs_by in page and differs_by in rows[suite].reasons, (suite, differs_by)
        assert not rows[suite].is_usable, "a tiny scorer's number stands in no table unmarked"
