"""The leaderboard: its boards and entries, and the page in a real browser from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.browser import Page, Visitor
from helpers.runs import make_prompts, make_run
from test_tables import VALUES, fingerprinted, geneval_run

from mmalign import cli
from mmalign.tables import leaderboard, ours
from mmalign.types import Deviation

HOSTILE = "a cat</script><script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'single' & ../../x"


def board(folder: Path, suite: str = "geneval") -> leaderboard.Board:
    return next(one for one in leaderboard.boards(ours.read(folder)) if one.suite == suite)


def entry(found: leaderboard.Board, model: str, source: str) -> leaderboard.Entry:
    return next(one for one in found.entries if (one.model, one.source) == (model, source))


# -- what it holds --------------------------------------------------------------------------------------------------------------------


def test_a_board_has_published_rows_in_the_suites_units_and_ours_with_intervals(tmp_path: Path) -> None:
    geneval_run(tmp_path, "mine-7B", VALUES)
    found = board(tmp_path)
    assert found.headline == "overall" and set(found.metrics) == set(VALUES)
    assert entry(found, "FLUX.1-dev", "gvu/1").numbers["overall"].value == 0.67
    assert entry(found, "FLUX.1-dev", "htgrpo/1").numbers["overall"].value == 0.82
    assert entry(found, "Harmon-0.5B / SFT", "segros/1").numbers["overall"].text == "0.721"
    mine = entry(found, "mine-7B", "ours")
    assert (mine.size, mine.method, mine.origin) == ("7B", "none", "ours")
    assert mine.numbers["overall"].interval == pytest.approx((0.832, 0.852))
    values = [one.numbers["overall"].value for one in found.entries if "overall" in one.numbers]
    assert values == sorted(values, reverse=True)
    assert "its own columns give 0.535" in entry(found, "MMaDA", "htgrpo/1").numbers["overall"].note


def test_lower_is_better_where_the_suite_says_so(tmp_path: Path) -> None:
    found = board(tmp_path, "mmdt")
    values = [one.numbers[found.headline].value for one in found.entries]
    assert values == sorted(values) and found.better[found.headline] == "lower"


@pytest.mark.parametrize(
    ("labels", "title", "kind"),
    [
        ("Janus-Pro-7B", "", ("janus", "7B", "none")),
        ("T2I-R1-Dense-HPS-SHAP", "", ("janus", "", "T2I-R1-Dense")),
        ("MMaDA+HT-GRPO", "", ("mmada", "", "HT-GRPO")),
        ("Harmon-0.5B / w/o SFT", "", ("harmon", "0.5B", "none")),
        ("OpenUni-3.6B / Reca", "", ("openuni", "3.6B", "RecA")),
        ("compositional / Flow-GRPO+CoCA", "", ("diffusion", "", "Flow-GRPO+CoCA")),
        ("SeGroS / 0.5", "Noise in the grounding map (Harmon-1.5B)", ("harmon", "1.5B", "SeGroS")),
        ("SD v1.5", "", ("diffusion", "", "none")),
        ("Liquid", "", ("other", "", "none")),
    ],
)
def test_family_size_and_method_are_what_the_names_state(labels: str, title: str, kind: tuple[str, str, str]) -> None:
    assert leaderboard.kind_of(labels, title) == kind


def test_flags_say_deviation_and_training_reward(tmp_path: Path) -> None:
    geneval_run(tmp_path, "a", VALUES, rewards=["geneval"])
    geneval_run(tmp_path, "b", VALUES, deviations=[Deviation("limit", "553 prompts", "12", "")])
    found = board(tmp_path)
    assert entry(found, "a", "ours").flags == ("geneval was a training reward",)
    assert entry(found, "b", "ours").flags == ("limit=12 (card: 553 prompts)",) and entry(found, "b", "ours").origin == "deviating"


# -- the pages ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A leaderboard with a trained model on two suites, one that deviates, and one with a hostile name."""
    folder = tmp_path_factory.mktemp("leaderboard") / "results with space"
    geneval_run(folder, "trained", VALUES, rewards=["geneval"])
    geneval_run(folder, "limited", {**VALUES, "overall": 0.99}, deviations=[Deviation("limit", "553 prompts", "12", "")])
    for model in ("trained", HOSTILE):
        fingerprinted(make_run(folder, make_prompts(8), model=model, suite="shapes"), model)
    assert cli.main(["report", "--leaderboard", "--results", str(folder)]) == 0
    return folder / "leaderboard" / "index.html"


def test_every_model_has_a_page_with_samples_provenance_and_flags(shown: Path) -> None:
    page = Page(shown)
    links = sorted({link["href"] for link in page.named("a") if link.get("href")})
    assert len(links) == 3
    for link in links:
        assert (shown.parent / str(link)).is_file()
    text = (shown.parent / "models" / "trained" / "index.html").read_text()
    assert "geneval was a training reward" in text and "Geneval" in text and "Shapes" in text
    assert "Provenance" in text and 'class="strip' in text


def test_the_page_holds_no_foreign_script_and_loads_nothing(shown: Path) -> None:
    page = Page(shown)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not [1 for _, attributes in page.elements if "style" in attributes or any(name.startswith("on") for name in attributes)]
    assert not [
        1 for _, attributes in page.elements if str(attributes.get("src") or attributes.get("href") or "").startswith(("http", "//"))
    ]


def test_the_same_results_give_the_same_bytes(shown: Path, tmp_path: Path) -> None:
    again = leaderboard.write(ours.read(shown.parent.parent), tmp_path / "again")
    assert again.read_bytes() == shown.read_bytes()


def rows(page: Visitor, suite: str) -> list[str]:
    code = """return [...document.querySelectorAll(`[data-suite="${arguments[0]}"]:not([hidden]) tbody tr`)]
      .filter((row) => !row.hidden).map((row) => row.cells[0].firstChild.textContent)"""
    return page.run(code, suite)


def test_filters_hide_rows_and_boards(browser, shown: Path) -> None:
    page = Visitor(browser, shown)
    everything = rows(page, "geneval")
    assert "trained" in " ".join(everything) and "limited" not in everything
    page.choose("family", "mmada")
    page.choose("text", "mmada htgrpo/")
    names = ["MMaDA", "MMaDA+HT-GRPO", "MMaDA+MaskGRPO", "MMaDA+TraceGRPO", "MMaDA+UniGRPO"]
    assert sorted(rows(page, "geneval")) == names and rows(page, "wise") == []
    page.choose("method", "HT-GRPO")
    assert rows(page, "geneval") == ["MMaDA+HT-GRPO"] and rows(page, "dpg") == ["MMaDA+HT-GRPO"]
    page.choose("suite", "dpg")
    assert rows(page, "geneval") == [] and page.count == "1 rows"
    assert page.run("return location.hash") == "#suite=dpg&family=mmada&method=HT-GRPO&text=mmada+htgrpo%2F"
    for name in ("suite", "family", "method", "text"):
        page.choose(name, "")
    assert rows(page, "geneval") == everything
    page.choose("size", "0.5B")
    assert rows(page, "geneval") and all(name.startswith("Harmon-0.5B") for name in rows(page, "geneval") if "Harmon" in name)
    page.choose("size", "")
    page.choose("origin", "ours")
    assert len(rows(page, "geneval")) == 1
    page.click("#deviating")
    assert "limited" in rows(page, "geneval")
    page.choose("text", "no such model")
    assert page.run("return document.getElementById('nothing').hidden") is False
    page.assert_quiet()


def test_a_click_on_a_head_sorts_and_a_link_keeps_the_choice(browser, shown: Path) -> None:
    page = Visitor(browser, shown, "#suite=geneval&family=lumina_dimoo")
    assert len(rows(page, "geneval")) == 4 and page.count == "4 rows"
    click = """[...document.querySelectorAll('[data-suite=geneval] th')].find((head) => head.textContent.startsWith(arguments[0]))
      .querySelector('button').click()"""
    values = """return [...document.querySelectorAll('[data-suite=geneval] tbody tr')].filter((row) => !row.hidden)
      .map((row) => Number(row.cells[arguments[0]].dataset.value))"""
    page.run(click, "counting")
    found = page.run(values, 9)
    assert found == sorted(found, reverse=True) == [0.94, 0.88, 0.85, 0.7]
    page.run(click, "counting")
    assert page.run(values, 9) == sorted(found)
    page.run(click, "model")
    assert rows(page, "geneval")[0] == "Lumina-DiMOO"
    page.assert_quiet()


def test_a_link_leads_to_the_models_page_with_images(browser, shown: Path) -> None:
    page = Visitor(browser, shown, "#suite=shapes&text=trained")
    page.run("document.querySelector('[data-suite=shapes] tbody tr:not([hidden]) a').click()")
    assert page.run("return document.title").endswith("evaluation report")
    assert page.all_images_load()
    page.assert_quiet()
