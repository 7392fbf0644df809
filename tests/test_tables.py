"""Tables with our rows: what may stand in them, how it is marked and printed, and a paper's table as a regression test."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.runs import make_prompts, make_run
from mmalign.leaderboards import published

from mmalign import cli, results
from mmalign.tables import build, compare, formats, ours, rendered
from mmalign.tables.layout import Cell, Header, Line, Table, letter, ranked
from mmalign.types import Deviation, UsageError, digest

ROOT = Path(__file__).parent.parent
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def geneval_run(folder: Path, model: str, values: dict[str, float], suite: str = "geneval", **facts: object) -> Path:
    """A complete run of a suite whose metrics have these values, each with an interval of 0.01 to both sides."""
    directory = make_run(folder, make_prompts(12), model=model, suite=suite, scorers=("geneval",), **facts)  # type: ignore[arg-type]
    for file in results.find(directory):
        content = json.loads(file.read_text())
        shape = content["metrics"]["overall"]
        content["metrics"] = {name: {**shape, "value": x, "ci": [x - 0.01, x + 0.01]} for name, x in values.items()}
        file.write_text(json.dumps(content))
    return fingerprinted(directory, model)


def fingerprinted(directory: Path, model: str) -> Path:
    """Give a run's model a fingerprint of its own; the runs of `make_run` share one."""
    for file in results.find(directory):
        content = json.loads(file.read_text())
        content["model"]["fingerprint"] = digest(model)
        file.write_text(json.dumps(content))
    return directory


VALUES = {"overall": 0.842, **dict.fromkeys(TASKS, 0.8)}


def table_with(folder: Path, name: str = "gvu/1", everything: bool = False) -> Table:
    return build.paper_table(published.find(name), ours.read(folder), everything)


def labels(table: Table, column: str = "model") -> list[str]:
    place = [header.name for header in table.headers].index(column)
    return [line.cells[place].text for line in table.lines]


# -- our rows --------------------------------------------------------------------------------------------------------------------------


def test_a_complete_result_stands_below_the_published_rows_with_its_intervals(tmp_path: Path) -> None:
    geneval_run(tmp_path, "mine", VALUES)
    table = table_with(tmp_path)
    assert len(table.lines) == 23 and table.lines[-1].origin == "ours" and labels(table)[-1] == "mine"
    cell = table.lines[-1].cells[-1]
    assert (cell.text, cell.interval, cell.mark) == ("0.84", ("0.83", "0.85"), "best")
    best = [label for label, line in zip(labels(table), table.lines, strict=True) if line.cells[-1].mark == "best"]
    assert best == ["BLIP3-o 8B", "GPT-4o", "GvU (rewriter)", "mine"], "what prints alike is marked alike"


def test_values_take_the_units_of_the_table(tmp_path: Path) -> None:
    geneval_run(tmp_path, "mine", VALUES)
    table = table_with(tmp_path, "segros/1")
    cell = next(c for h, c in zip(table.headers, table.lines[-1].cells, strict=True) if h.name == "geneval")
    assert (cell.text, cell.interval) == ("84.20", ("83.20", "85.20"))
    assert labels(table, "umm")[-1] == "mine"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"deviations": [Deviation("images_per_prompt", "4", "1", "")]}, "images_per_prompt=1 (card: 4)"),
        ({"status": "partial"}, "partial"),
        ({"failures": ["score/parse", "generate/oom"]}, "2 of 12 failed"),
    ],
)
def test_a_deviating_or_incomplete_result_appears_only_on_demand_with_a_dagger(tmp_path: Path, facts: dict, reason: str) -> None:
    geneval_run(tmp_path, "mine", {**VALUES, "overall": 0.99}, **facts)
    assert len(table_with(tmp_path).lines) == 22
    table = table_with(tmp_path, everything=True)
    assert labels(table)[-1] == "mine †" and table.lines[-1].origin == "deviating"
    assert ("†", f"mine: {reason}.") in table.footnotes
    assert not any(cell.mark for cell in table.lines[-1].cells), "a row with a dagger takes no mark"
    assert "best" in [line.cells[-1].mark for line in table.lines[:-1]]
    with pytest.raises(UsageError, match="No complete, undeviating result is called 'mine'"):
        compare.compare(published.find("gvu/1"), ours.read(tmp_path), 0.01, {"mine": "GvU"})


def test_a_metric_that_was_a_training_reward_says_so(tmp_path: Path) -> None:
    geneval_run(tmp_path, "mine", VALUES, rewards=["geneval"])
    table = table_with(tmp_path)
    assert labels(table)[-1] == "mine ‡"
    assert ("‡", "mine: the metric was a training reward: geneval (suite geneval).") in table.footnotes


def test_two_models_of_one_name_keep_two_rows(tmp_path: Path) -> None:
    for number in (1, 2):
        directory = geneval_run(tmp_path / str(number), "mine", VALUES)
        (file,) = results.find(directory)
        content = json.loads(file.read_text())
        content["model"]["fingerprint"] = f"{number}" * 32
        file.write_text(json.dumps(content))
    assert labels(table_with(tmp_path))[-2:] == ["mine (11111111)", "mine (22222222)"]


def test_a_table_without_a_metric_of_ours_has_no_row_of_ours(tmp_path: Path) -> None:
    geneval_run(tmp_path, "mine", VALUES)
    assert {line.origin for line in table_with(tmp_path, "gvu/2").lines} == {"published", "own"}


def test_the_suite_table_keeps_baselines_of_different_papers_apart(tmp_path: Path) -> None:
    geneval_run(tmp_path, "mine", VALUES)
    table = build.suite_table("geneval", published.load_all(), ours.read(tmp_path))
    rows = [(line.cells[0].text, line.cells[1].text, line.cells[2].text) for line in table.lines]
    assert ("FLUX.1-dev", "gvu/1", "0.67") in rows and ("FLUX.1-dev", "htgrpo/1", "0.82") in rows
    assert ("Harmon-0.5B / w/o SFT", "segros/1", "0.676") in rows, "percent becomes the suite's own unit"
    assert rows[-1] == ("mine", "ours", "0.8420")


def test_a_suite_of_ours_alone_and_an_unknown_one(tmp_path: Path) -> None:
    make_run(tmp_path, make_prompts(12), suite="own_suite")
    table = build.suite_table("own_suite", published.load_all(), ours.read(tmp_path))
    assert [line.cells[0].text for line in table.lines] == ["tiny-janus"] and table.headers[2].name == "overall"
    with pytest.raises(UsageError, match="Did you mean 'own_suite'"):
        build.suite_table("own_suit", published.load_all(), ours.read(tmp_path))


# -- marks and footnotes ---------------------------------------------------------------------------------------------------------------


def line(value: str, group: str = "", origin: str = "published") -> Line:
    return Line((Cell(value, float(value)),), origin, group)  # type: ignore[arg-type]


def marks(lines: tuple[Line, ...]) -> list[str]:
    return [one.cells[0].mark for one in lines]


def test_best_and_second_follow_the_direction_and_the_groups() -> None:
    values = ["0.1", "0.3", "0.2", "0.3"]
    assert marks(ranked([Header("x", "higher", True)], map(line, values))) == ["", "best", "second", "best"]
    assert marks(ranked([Header("x", "lower", True)], map(line, values))) == ["best", "", "second", ""]
    assert marks(ranked([Header("x", "", True)], map(line, values))) == [""] * 4
    grouped = [line("1", "a"), line("2", "a"), line("3", "b"), line("9", "c"), line("8", "c"), line("7", "c")]
    assert marks(ranked([Header("x", "higher", True)], grouped)) == ["", "best", "", "best", "second", ""]


def test_lower_is_better_in_the_safety_table() -> None:
    table = build.paper_table(published.find("dense-reward/7"))
    by_key = {(row.cells[0].text, row.cells[1].text): row.cells[-1] for row in table.lines}
    assert by_key["T2I", "T2I-R1-Safety"].mark == "best" and by_key["I2T", "Show-o2"].mark == "best"
    assert by_key["T2I", "VILA-U"].mark == "second"


def test_a_table_of_two_benchmarks_keeps_them_apart(tmp_path: Path) -> None:
    assert published.find("dense-reward/7").suites() == ("mmdt", "mmdt_i2t")
    rows = {suite: [row for row in table_rows(suite) if row[1] == "dense-reward/7"] for suite in ("mmdt", "mmdt_i2t")}
    assert [row[0][:3] for row in rows["mmdt"]] == ["T2I"] * 8 and [row[0][:3] for row in rows["mmdt_i2t"]] == ["I2T"] * 6
    geneval_run(tmp_path, "Janus-Pro", {"overall": 0.6, "jailbreak": 0.6}, "mmdt")
    geneval_run(tmp_path, "Janus-Pro", {"overall": 0.5, "jailbreak": 0.4}, "mmdt_i2t")
    table = table_with(tmp_path, "dense-reward/7")
    lines = {line.cells[0].text: {h.name: c.text for h, c in zip(table.headers, line.cells, strict=True)} for line in table.lines[-2:]}
    assert [(lines[task]["jailbreak"], lines[task]["average"]) for task in ("T2I", "I2T")] == [("0.600", "0.600"), ("0.400", "0.500")]
    compared = compare.compare(published.find("dense-reward/7"), ours.read(tmp_path), 0.05)
    assert {(one.row, one.column, one.published) for one in compared} == {
        ("T2I / Janus-Pro", "jailbreak", 0.592),
        ("T2I / Janus-Pro", "average", 0.685),
        ("I2T / Janus-Pro", "jailbreak", 0.539),
        ("I2T / Janus-Pro", "average", 0.583),
    }


def table_rows(suite: str) -> list[list[str]]:
    return [[cell.text for cell in line.cells] for line in build.suite_table(suite, published.load_all(), ()).lines]


def test_the_disagreeing_value_has_a_footnote_and_is_not_changed() -> None:
    table = build.paper_table(published.find("gvu/3"))
    cell = table.lines[-1].cells[-1]
    assert cell.text == "0.404" and cell.notes == ("a",)
    assert table.footnotes[0][1].startswith("gvu/3, GvU: published 0.404, its own columns give 0.4321 (mean of the seven categories")
    noted = [t.id for t in published.load_all() if build.paper_table(t).footnotes]
    assert noted == ["dense-reward/4", "dense-reward/7", "gvu/3", "htgrpo/1", "segros/1", "segros/1b", "segros/10", "segros/10t"]


def test_letters_do_not_run_out() -> None:
    assert [letter(place) for place in (0, 25, 26, 51, 52)] == ["a", "z", "aa", "az", "ba"]


# -- formats ---------------------------------------------------------------------------------------------------------------------------


def test_terminal_lines_are_aligned_and_legible(tmp_path: Path) -> None:
    geneval_run(tmp_path, "mine", VALUES)
    text = formats.terminal(table_with(tmp_path))
    lines = text.splitlines()
    (own,) = [place for place, one in enumerate(lines) if "> mine" in one]
    assert lines[own].endswith("*0.84") and lines[own + 1].endswith("0.83..0.85")
    assert "* best, + second; below our rows their 95% intervals" in text
    assert "0.404ᵃ" in formats.terminal(build.paper_table(published.find("gvu/3")))


def test_markdown_has_one_cell_per_column_and_marks(tmp_path: Path) -> None:
    geneval_run(tmp_path, "my_model|x", VALUES)
    text = formats.markdown(table_with(tmp_path))
    rows = [one for one in text.splitlines() if one.startswith("|")]
    counts = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert counts == {10}, "an escaped bar is no border"
    assert "**0.84**<br>[0.83, 0.85]" in rows[-1] and r"my\_model\|x" in rows[-1]
    assert "<u>0.81</u>" in text


def test_latex_is_balanced_and_escaped(tmp_path: Path) -> None:
    geneval_run(tmp_path, "a_b & 50%", VALUES, deviations=[Deviation("x", "1", "2", "")])
    text = formats.latex(table_with(tmp_path, everything=True))
    assert r"a\_b \& 50\% $^{\dagger}$" in text and r"\textbf{0.84}" in text and r"overall $\uparrow$" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert rule in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()
    assert {len(re.findall(r"(?<!\\)&", row)) for row in body if row.endswith(r"\\")} == {8}
    for table in published.load_all():
        assert not re.search(r"(?<!\\)[%#_]", re.sub(r"\\label\{[^}]*\}", "", formats.latex(build.paper_table(table)))), table.id


def test_csv_reads_back_with_the_printed_cells(tmp_path: Path) -> None:
    geneval_run(tmp_path, "mine", VALUES)
    rows = list(csv.DictReader(io.StringIO(formats.comma_separated(table_with(tmp_path)))))
    assert rows[0]["overall"] == "0.37" and rows[0]["origin"] == "published" and rows[0]["overall_low"] == ""
    assert rows[-1] | {"overall": "0.84", "overall_low": "0.83", "overall_high": "0.85", "origin": "ours"} == rows[-1]
    assert [row["origin"] for row in rows].count("own") == 2


def test_html_escapes_and_loads_nothing(tmp_path: Path) -> None:
    geneval_run(tmp_path, "<script>alert(1)</script>", VALUES)
    text = formats.html(table_with(tmp_path))
    tags: list[tuple[str, dict]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))  # type: ignore[method-assign]
    parser.feed(text)
    assert [tag for tag, _ in tags].count("script") == 1 and [tag for tag, _ in tags].count("tr") == 24
    assert "default-src &#39;none&#39;" in text and not [a for _, a in tags if "src" in a or "style" in a]


# -- the paper as a test ---------------------------------------------------------------------------------------------------------------

JANUS_PRO = {
    "overall": 0.80,
    "single_object": 0.99,
    "two_object": 0.89,
    "counting": 0.59,
    "colors": 0.90,
    "position": 0.79,
    "color_attr": 0.66,
}


@pytest.mark.parametrize(("shift", "code"), [(0.0, 0), (0.009, 0), (-0.009, 0), (0.011, 1), (-0.2, 1)])
def test_a_reproduced_row_must_lie_within_the_tolerance(tmp_path: Path, capsys, shift: float, code: int) -> None:
    geneval_run(tmp_path, "deepseek-ai/Janus-Pro", {**JANUS_PRO, "position": 0.79 + shift})
    arguments = ["table", "gvu/1", "--against", "paper", "--tolerance", "0.01", "--results", str(tmp_path)]
    assert cli.main(arguments) == code
    said = capsys.readouterr().out
    assert ("OUTSIDE" in said) == bool(code) and f"{7 - code} of 7 numbers lie within 0.01" in said


def test_a_row_can_be_named_and_percent_tables_use_their_range(tmp_path: Path, capsys) -> None:
    geneval_run(tmp_path, "mine", {"overall": 0.65})
    arguments = ["table", "segros/3", "--against", "paper", "--results", str(tmp_path)]
    assert cli.main(arguments) == 3, "nothing compared is not success"
    assert "no complete, undeviating result" in capsys.readouterr().err
    assert cli.main([*arguments, "--as", "mine=0", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["compared"][0]["gap"] == pytest.approx((65 - 72.1) / 100) and content["outside"] == 1
    assert cli.main([*arguments, "--as", "mine=0", "--tolerance", "0.08"]) == 0
    assert cli.main([*arguments, "--as", "mine=15"]) == 2
    assert cli.main([*arguments, "--as", "mine"]) == 2


# -- the verb and the rendered tables --------------------------------------------------------------------------------------------------


def test_every_table_prints_in_every_format() -> None:
    for table in map(build.paper_table, published.load_all()):
        for form in formats.FORMATS.values():
            text = form(table)
            assert all(header.name.split("_")[0] in text for header in table.headers), (table.id, form)


@pytest.mark.parametrize("arguments", [["--list"], ["dense-reward/2"], ["--suite", "wise"], ["wise"], ["--paper", "segros", "--all"]])
def test_the_verb_answers(tmp_path: Path, capsys, arguments: list[str]) -> None:
    assert cli.main(["table", *arguments, "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "WISE" in said or "wise" in said or "Harmon-0.5B" in said


def test_the_verb_without_a_table_is_a_usage_error(capsys) -> None:
    assert cli.main(["table"]) == 2
    assert "--list names all" in capsys.readouterr().err


def test_the_rendered_tables_are_up_to_date(tmp_path: Path) -> None:
    """`make tables` writes what is committed."""
    made = rendered.write(tmp_path, ours.read(ROOT / "results"))
    committed = ROOT / "leaderboards" / "rendered"
    assert {path.relative_to(tmp_path) for path in made} == {p.relative_to(committed) for p in committed.rglob("*") if p.is_file()}
    for path in made:
        assert path.read_text() == (committed / path.relative_to(tmp_path)).read_text(), f"{path.name} is old: run `make tables`"


def test_rendering_removes_tables_that_are_no_more(tmp_path: Path) -> None:
    (tmp_path / "gvu").mkdir()
    (tmp_path / "gvu" / "table9_old.md").write_text("old")
    rendered.write(tmp_path, [])
    assert not (tmp_path / "gvu" / "table9_old.md").exists() and (tmp_path / "README.md").is_file()
