"""Doctor: needs are recognised with the command that meets them, and the lists here agree with pyproject.toml."""

import json
import os
import re
import tomllib
from pathlib import Path

import pytest

from mmalign import cli, doctor, registry
from mmalign.types import MmalignError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def plug(folder: Path, needs: str) -> Path:
    path = folder / "mine.py"
    path.write_text(f'"""Mine."""\nNEEDS = ({needs},)\nclass Config: ...\ndef load(config): ...\n')
    return path


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_extras_are_those_of_the_package() -> None:
    assert set(doctor.EXTRAS) == set(PROJECT["optional-dependencies"])


def test_required_packages_are_all_looked_at() -> None:
    assert set(doctor.packages()) == {re.match(r"[\w.-]+", text)[0] for text in PROJECT["dependencies"]}  # type: ignore[index]


def test_wrong_and_absent_packages_make_the_install_unsound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: ["numpy>=1", "numpy-that-is-not>=2", "pyyaml>=99"])
    found = doctor.packages()
    assert found["numpy-that-is-not"] == "absent, needs numpy-that-is-not>=2" and found["pyyaml"].endswith(", needs pyyaml>=99")
    examined = doctor.examine()
    assert not examined["is_sound"] and examined["fixes"][0] == doctor.install_command()


@pytest.mark.parametrize(
    ("need", "meet", "fix"),
    [
        ("weights: org/name", lambda folder: (folder / "hub/models--org--name/snapshots/abc").mkdir(parents=True), "hf download org/name"),
        ("endpoint", lambda folder: (folder / ".env").write_text("OPENAI_API_KEY=sk"), "export OPENAI_API_KEY=..."),
        ("folder: their-pictures", lambda folder: (folder / "data" / "their-pictures").mkdir(parents=True), "put their-pictures at "),
        ("package: tomorrow_s_package", lambda folder: (folder / "tomorrow_s_package.py").write_text(""), "pip install tomorrow_s_package"),
    ],
)
def test_a_need_has_a_fix_until_it_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need: str, meet: object, fix: str) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "data"))
    path = plug(tmp_path, repr(need))

    def mine() -> doctor.Readiness:
        return next(item for item in doctor.readiness("scorers", [path]) if item.entry.name == "mine")

    assert mine().mark == f"needs {need}" and fix in doctor.fixes([mine()])[0]
    meet(tmp_path)  # type: ignore[operator]
    assert mine().mark == "ready" and not doctor.fixes([mine()])


def test_extras_are_fixed_by_one_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "ocr", ("no_such_module",))
    monkeypatch.setitem(doctor.EXTRAS, "ray", ("no_such_module",))
    found = [item for item in doctor.readiness("scorers", [plug(tmp_path, "'extra: ray', 'extra: ocr'")]) if item.entry.name == "mine"]
    (command,) = doctor.fixes(found)
    assert command.endswith("[ocr,ray]'") and f"-c {ROOT}/constraints.txt" in command


def test_needs_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MmalignError, match="names no extra of mmalign. Extras: ray"):
        doctor.readiness("scorers", [plug(tmp_path, "'extra: orc'")])
    with pytest.raises(MmalignError, match="must begin with 'extra:'"):
        doctor.readiness("scorers", [plug(tmp_path, "'luck'")])


def test_a_suite_needs_its_data_and_what_its_scorers_need() -> None:
    item = next(item for item in doctor.readiness("evaluators") if item.entry.name == "geneval")
    assert "data: geneval" in {need.text for need in item.unmet}
    scorers = {name for name in doctor.scorers_of(item.entry)}
    needs = {need for entry in registry.entries("scorers").values() if entry.name in scorers for need in entry.needs}
    assert needs and needs <= {need.text for need in item.needs}


def test_every_need_of_every_file_is_understood() -> None:
    for kind in registry.KINDS:
        for item in doctor.readiness(kind):
            assert all(need.fix for need in item.needs), item.entry.name


def test_verb_prints_machine_and_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mmalign ") and f"{doctor.cores()} cores" in out and "  mmalign data add geneval --from PATH\n" in out
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_sound"] and found["cores"] == len(os.sched_getaffinity(0)) and found["evaluators"]["shapes"] == "ready"
