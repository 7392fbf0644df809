"""The papers' tables as data: what is printed stays as printed, derived columns are recomputed, names find their table."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmalign.leaderboards import published

from mmalign import registry
from mmalign.types import MmalignError, UsageError

TABLES = published.load_all()
BY_ID = {table.id: table for table in TABLES}
# (rows checked, exact after rounding, within the rounding of the inputs, disagreeing) of every derived total
CHECKED = {
    ("dense-reward/2", "overall"): (14, 13, 1, 0),
    ("dense-reward/3", "overall"): (3, 1, 2, 0),
    ("dense-reward/4", "overall"): (4, 2, 1, 1),
    ("dense-reward/7", "average"): (14, 12, 0, 2),
    ("gvu/1", "overall"): (21, 19, 2, 0),
    ("gvu/3", "overall"): (10, 9, 0, 1),
    ("htgrpo/1", "overall"): (13, 10, 2, 1),
    ("segros/1", "geneval"): (23, 13, 8, 2),
    ("segros/1b", "geneval"): (8, 6, 1, 1),
    ("segros/10t", "overall"): (6, 4, 0, 2),
}
DISAGREE = {  # the ten, and what their columns give
    ("dense-reward/4", "1 / 0 / 0 / 0"): ("0.47", 0.4823),
    ("dense-reward/7", "I2T / Show-o2"): ("0.201", 0.11033),
    ("dense-reward/7", "I2T / Janus-4o"): ("0.274", 0.287),
    ("gvu/3", "GvU"): ("0.404", 0.43214),
    ("htgrpo/1", "MMaDA"): ("0.56", 0.535),
    ("segros/1", "OpenUni-3.6B / Reca"): ("74.1", 74.21667),
    ("segros/1", "Harmon-0.5B / w/o SFT"): ("67.6", 67.43333),
    ("segros/1b", "OpenUni-3.6B / RecA"): ("74.1", 74.21667),
    ("segros/10t", "Harmon-1.5B / base"): ("81.36", 81.18625),
    ("segros/10t", "OpenUni-3.6B / base"): ("78.84", 77.47625),
}


def test_all_tables_of_five_papers_are_there() -> None:
    assert Counter(table.paper.name for table in TABLES) == {"dense-reward": 11, "densegrpo": 4, "gvu": 9, "htgrpo": 9, "segros": 12}
    assert len(BY_ID) == len(TABLES) == 45


def test_derived_totals_are_recomputed_with_the_known_verdicts() -> None:
    found: dict[tuple[str, str], Counter[str]] = {}
    for table in TABLES:
        for check in table.checks:
            found.setdefault((table.id, check.column), Counter())[check.verdict] += 1
    counted = {key: (sum(c.values()), c["exact"], c["rounding"], c["disagrees"]) for key, c in found.items() if key in CHECKED}
    assert counted == CHECKED


def test_exactly_ten_published_values_disagree_with_their_columns() -> None:
    turned = "segros/10"  # the same two values again, in the table as it is printed
    found = {(t.id, check.row): check for t in TABLES for check in t.disagreements() if t.id != turned}
    assert found.keys() == DISAGREE.keys()
    for key, (printed, recomputed) in DISAGREE.items():
        assert found[key].published == printed and found[key].recomputed == pytest.approx(recomputed, abs=1e-5)
    assert {(c.column, c.published) for c in BY_ID[turned].disagreements()} == {("harmon15_base", "81.36"), ("openuni36_base", "78.84")}


def test_a_disagreeing_value_is_kept_as_published() -> None:
    assert BY_ID["gvu/3"].cell("GvU", "overall") == 0.404
    assert next(row for row in BY_ID["dense-reward/2"].rows if row["model"] == "FLUX.1-dev")["overall"] == "0.50"


def test_baselines_of_one_name_stay_apart() -> None:
    assert BY_ID["gvu/1"].cell("FLUX.1-dev", "overall") == 0.67
    assert BY_ID["htgrpo/1"].cell("FLUX.1-dev", "overall") == 0.82


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.id)
def test_cells_are_within_their_range_and_own_rows_exist(table: published.Published) -> None:
    for column in table.columns.values():
        values = [table.number(row, column.name) for row in table.rows] if column.role == "number" else []
        low, high = column.range or (float("-inf"), float("inf"))
        assert all(low <= value <= high for value in values if value is not None)
    if table.own:
        assert any(table.is_own(row) for row in table.rows)
    assert set(table.own_columns) <= set(table.columns)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.id)
def test_metrics_are_those_of_the_suites_that_exist(table: published.Published) -> None:
    suites = registry.entries("evaluators")
    for column in table.columns.values():
        suite, _, metric = column.metric.partition("/")
        if suite in suites:
            options = {"scorers": ("all",)} if suite == "quality" else {}
            known = registry.load(suites[suite]).Evaluator(**options).aggregate([])
            assert not known or metric in known, f"{table.id}: {suite} has no metric '{metric}'; it has {', '.join(known)}"


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("dense-reward/2", "table2_wise"),
        ("dense-reward/table2_wise", "table2_wise"),
        ("dense-reward/table5b", "table5b_genai_advanced_overall"),
        ("segros/1", "table1_main"),
        ("segros/10", "table10_compbench"),
        ("segros/10t", "table10t_compbench"),
        ("gvu/fig4", "fig4_training_curve"),
    ],
)
def test_a_table_is_found_by_number_name_or_beginning(spec: str, name: str) -> None:
    assert published.find(spec).name == name


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("dense-rewrad/2", "Did you mean 'dense-reward'"),
        ("segros/99", r"No table is 'segros/99'\. Expected one of: segros/1, "),
        ("gvu/fig", "More than one table is 'gvu/fig'. Expected one of: gvu/fig4_training_curve, gvu/fig7_reward_curve"),
        ("segros", "Expected one of: segros/1, segros/1b"),
        ("zzz", "`mmalign table --list` names them all"),
    ],
)
def test_an_unknown_table_is_answered_with_the_known(spec: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        published.find(spec)


def test_a_frame_has_numbers_and_names() -> None:
    frame = published.frame(BY_ID["gvu/1"])
    assert frame.loc["GvU", "overall"] == 0.81 and frame.loc["BLIP3-o 8B", "single"] != frame.loc["BLIP3-o 8B", "single"]
    assert frame["overall"].idxmax() in ("BLIP3-o 8B", "GPT-4o", "GvU (rewriter)")


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=8), st.integers(-40, 40))
def test_a_verdict_is_what_rounding_allows(thousandths: list[int], shift: int) -> None:
    """Inputs rounded to two decimals; the total of the unrounded inputs, rounded, is never called a disagreement."""
    exact = sum(thousandths) / len(thousandths) / 1000
    cells = {str(place): f"{value / 1000:.2f}" for place, value in enumerate(thousandths)}
    rule = published.Rule("mean", tuple(cells), (1.0,) * len(cells), "", 1.0, "", None)
    check = published._check("row", "total", f"{exact:.2f}", cells, rule, "")
    assert check is not None and check.verdict != "disagrees"
    wrong = published._check("row", "total", f"{exact + shift / 1000:.3f}", cells, rule, "")
    assert wrong is not None and (abs(shift) < 12 or wrong.verdict == "disagrees")


def table_files(folder: Path, yaml: str, cells: str) -> Path:
    (folder / "t.csv").write_text(cells)
    (folder / "t.yaml").write_text(yaml)
    return folder / "t.yaml"


HEAD = "title: T\nkind: results\nsource: {place: Table 1, status: printed}\nrows: [model]\n"


@pytest.mark.parametrize(
    ("yaml", "cells", "said"),
    [
        (HEAD + "columns: {model: label, a: {better: higher}}", "model,b\nx,1\n", r"describes the columns \['model', 'a'\]"),
        (HEAD + "columns: {model: label}\nown_row: [x]", "model\nx\n", "unknown field 'own_row'. Did you mean 'own'"),
        (HEAD + "columns: {model: label, a: {beter: higher}}", "model,a\nx,1\n", "unknown field 'beter'. Did you mean 'better'"),
        (HEAD + "columns: {model: label, a: {better: higher}}", "model,a\nx,1\nx,2\n", "more than one row 'x'"),
    ],
)
def test_a_table_that_does_not_fit_its_description_is_refused(tmp_path: Path, yaml: str, cells: str, said: str) -> None:
    paper = published.Paper("p", "P", "https://example.org", "m")
    with pytest.raises(MmalignError, match=said):
        published.read(table_files(tmp_path, yaml, cells), paper)


def test_cells_equal_the_shared_transcription() -> None:
    if "MMALIGN_SHARED" not in os.environ:
        pytest.skip("needs $MMALIGN_SHARED, the folder with the transcribed tables")
    shared = Path(os.environ["MMALIGN_SHARED"]) / "tables"
    for table in TABLES:
        with (shared / table.paper.name / f"{table.name}.csv").open(newline="") as file:
            assert [dict(row) for row in csv.DictReader(file)] == [dict(row) for row in table.rows], table.id


def test_descriptions_name_a_public_place() -> None:
    for table in TABLES:
        assert re.match("https://", table.source["address"]) and table.source["place"] and table.source["status"]
