"""docs/protocols: the pages are those that the cards make."""

from __future__ import annotations

from pathlib import Path

from mmalign import cards, cli, registry

COMMITTED = Path(__file__).parent.parent / "docs" / "protocols"


def test_the_pages_are_up_to_date(tmp_path: Path) -> None:
    """`make cards` writes what is committed."""
    made = cards.write(tmp_path)
    assert {path.name for path in made} == {path.name for path in COMMITTED.iterdir()}
    for path in made:
        assert path.read_text() == (COMMITTED / path.name).read_text(), f"{path.name} is old: run `make cards`"


def test_every_suite_has_a_page_with_all_that_its_card_says(tmp_path: Path) -> None:
    (tmp_path / "gone.md").write_text("a suite that is no more")
    assert cli.main(["explain", "--render", str(tmp_path)]) == 0
    suites = registry.entries("evaluators")
    assert {path.stem for path in tmp_path.iterdir()} == {"README", *suites}
    for name, entry in suites.items():
        card, page = registry.card(entry), (tmp_path / f"{name}.md").read_text()
        assert card.formula in page and all(f"* {trap}" in page for trap in card.traps)
        assert all(source.sha256[:12] in page for source in card.data)


def test_the_verb_explains_one_thing_or_writes_all(tmp_path: Path, capsys) -> None:
    assert cli.main(["explain"]) == 2 and "--render DIR" in capsys.readouterr().err
    assert cli.main(["explain", "geneval", "--render", str(tmp_path)]) == 2 and not list(tmp_path.iterdir())
