"""Registry: names from files, without importing them; plugs; entry points; collisions; suggestions."""

import sys
from pathlib import Path

import pytest

from mmalign import registry
from mmalign.types import MmalignError, UsageError

SCORER = '"""One thing.\n\nMore about it."""\nclass Config: ...\ndef load(config, device="cpu"): return 7\n'


def write(folder: Path, name: str, source: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(source)
    return path


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_file_is_registered_and_described(kind: str) -> None:
    found = registry.entries(kind)
    root = Path(__file__).parent.parent
    folder = root / kind if (root / kind).is_dir() else root / "mmalign" / kind
    assert set(found) == {path.stem for path in folder.glob("*.py") if not path.name.startswith("_")}
    for entry in found.values():
        assert entry.description and entry.origin == "built-in" and entry.module == f"mmalign.{kind}.{entry.name}"


def test_plug_is_found_by_what_it_defines_and_loaded_once(tmp_path: Path) -> None:
    plug = write(tmp_path, "my-scorer.py", 'NEEDS = (\n    "extra: ocr",\n    "endpoint",\n)\n')
    plug.write_text(SCORER + plug.read_text())
    entry = registry.find("scorers", " My_Scorer ", [plug])
    assert (entry.name, entry.description, entry.needs, entry.origin) == ("my_scorer", "One thing.", ("extra: ocr", "endpoint"), "plug")
    assert "my_scorer" not in registry.entries("models", [plug])
    assert registry.load(entry) is registry.load(entry)
    assert registry.load(entry).load(None) == 7


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("class Evaluator: ...", "evaluators"),
        ("class Sampling: ...\ndef recognises(path): ...\ndef load(path): ...", "models"),
        ("class Config: ...\ndef train(config): ...\ndef load(): ...", "trainers"),
        ("class Config: ...\ndef load(config): ...", "scorers"),
    ],
)
def test_kind_of_a_plug(tmp_path: Path, source: str, kind: str) -> None:
    assert registry.kind_of(write(tmp_path, "plug.py", source)) == kind


def test_plug_that_defines_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="defines nothing that mmalign can register.*Evaluator for a suite"):
        registry.entries("scorers", [write(tmp_path, "plug.py", "x = 1")])
    with pytest.raises(UsageError, match="not valid Python"):
        registry.entries("scorers", [write(tmp_path, "plug.py", "def (")])
    with pytest.raises(UsageError, match="expected an existing Python file"):
        registry.entries("scorers", [tmp_path / "absent.py"])


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"^Unknown suite 'genevall'. Did you mean 'geneval'\?$"):
        registry.find("evaluators", "genevall")
    with pytest.raises(UsageError, match="Unknown suite '../../etc/passwd'. Known: .*shapes"):
        registry.find("evaluators", "../../etc/passwd")


def test_two_files_with_one_name_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Two files are the scorer 'shapes'.*built-in.*plug"):
        registry.entries("scorers", [write(tmp_path, "Shapes.py", SCORER)])
    first, second = write(tmp_path / "a", "mine.py", SCORER), write(tmp_path / "b", "MINE.py", SCORER)
    with pytest.raises(UsageError, match="Two files are the scorer 'mine'"):
        registry.entries("scorers", [first, second])
    assert "mine" in registry.entries("scorers", [first, first]), "the same file twice is one file"


def test_file_that_cannot_be_imported_is_a_sentence(tmp_path: Path) -> None:
    broken = write(tmp_path, "broken.py", SCORER + "1 / 0\n")
    with pytest.raises(MmalignError, match="The scorer 'broken' could not be imported from .*ZeroDivisionError"):
        registry.load(registry.find("scorers", "broken", [broken]))
    lacking = write(tmp_path, "lacking.py", SCORER + "import no_such_module\n")
    with pytest.raises(MmalignError, match="needs the module 'no_such_module', which is not installed"):
        registry.load(registry.find("scorers", "lacking", [lacking]))
    assert "mmalign_plug_scorers_broken" not in sys.modules


def test_entry_points_are_found_without_importing_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "other_package", "__init__.py", "raise RuntimeError('a listing must not import this')")
    write(tmp_path / "other_package" / "deep", "__init__.py", "")
    write(tmp_path / "other_package" / "deep", "mine.py", SCORER)
    info = tmp_path / "other-1.0.dist-info"
    write(info, "METADATA", "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    write(info, "entry_points.txt", "[mmalign.scorers]\nfar-away = other_package.deep.mine\ngone = other_package.no.such\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = registry.entries("scorers")
    assert (found["far_away"].description, found["far_away"].origin) == ("One thing.", "entry point")
    assert "other_package.no.such" in found["gone"].description and "other" in found["gone"].description
    with pytest.raises(MmalignError, match="'gone'"):
        registry.load(found["gone"])


def test_needs_must_be_literal(tmp_path: Path) -> None:
    with pytest.raises(MmalignError, match="must be a literal tuple"):
        registry.entries("scorers", [write(tmp_path, "plug.py", SCORER + "NEEDS = tuple(x for x in 'ab')\n")])


def test_cards_are_checked(tmp_path: Path) -> None:
    plug = write(tmp_path, "mine.py", '"""Mine."""\nclass Evaluator: ...\n')
    entry = registry.find("evaluators", "mine", [plug])
    with pytest.raises(MmalignError, match="has no protocol card: expected .*mine.yaml"):
        registry.card(entry)
    card = write(tmp_path, "mine.yaml", "title: Mine\nformla: none\n")
    with pytest.raises(MmalignError, match="lacks paper, repository"):
        registry.card(entry)
    rest = "paper: p\nrepository: r\ncommit: 12\nprompts: 3\nimages_per_prompt: 1\nsize: s\njudge: j\nheadline: h\nlicence: l\n"
    card.write_text(f"title: Mine\nformla: none\nformula: f\n{rest}")
    with pytest.raises(MmalignError, match="Unknown option 'formla'.*'formula'"):
        registry.card(entry)
    card.write_text(f"title: Mine\nformula: f\n{rest}")
    assert (registry.card(entry).name, registry.card(entry).commit, registry.card(entry).prompts) == ("mine", "12", 3)
    card.write_text(f"title: Mine\nformula: f\n{rest}prompts: many\n")
    with pytest.raises(MmalignError, match="must be a whole number, got 'many'"):
        registry.card(entry)


@pytest.mark.parametrize("name", registry.entries("evaluators"))
def test_every_suite_has_a_card(name: str) -> None:
    card = registry.card(registry.find("evaluators", name))
    assert card.name == name and card.headline and card.prompts >= 0  # 0: the protocol fixes no number
