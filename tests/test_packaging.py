"""The three ways to have the package: wheel, editable install, bare checkout. Each finds the same suites, cards and checkpoints."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ASK = """
import json, mmalign, mmalign.evaluators, mmalign.trainers, mmalign.leaderboards
from pathlib import Path
from mmalign import registry, hub
suites = registry.entries("evaluators")
cards = {name: registry.card(entry).title for name, entry in suites.items()}
module = registry.load(suites["shapes"])
names = {kind: sorted(registry.entries(kind)) for kind in registry.KINDS}
print(json.dumps({"names": names, "cards": cards, "module": module.__name__, "file": module.__file__, "package": mmalign.__file__,
                  "checkpoints": hub.bundled_names()}))
"""


def tracked() -> list[str]:
    """The files git knows, or all files where there is no git."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.split("\n") if listed.returncode == 0 else [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]


def ask(python: str | Path, folder: Path, **environment: str) -> dict:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(python), "-c", ASK], cwd=folder, env={**clean, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def environment(folder: Path) -> Path:
    """A fresh virtual environment that sees the packages of this one, but not an mmalign installed in it; returns its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of what git tracks, so that a build leaves nothing in the real one."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        source = ROOT / name
        if source.is_file() and not name.startswith("results/"):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="module")
def bare(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return ask(sys.executable, tmp_path_factory.mktemp("elsewhere"), PYTHONPATH=str(copy))


def test_bare_checkout(bare: dict, copy: Path) -> None:
    assert bare["package"] == str(copy / "mmalign" / "__init__.py")
    assert bare["file"] == str(copy / "evaluators" / "shapes.py") and bare["module"] == "mmalign.evaluators.shapes"
    assert {"shapes", "geneval"} <= set(bare["cards"]) and {"janus", "folder"} <= set(bare["names"]["models"])


def test_wheel_holds_every_file_of_the_package(copy: Path, bare: dict, tmp_path: Path) -> None:
    pip(Path(sys.executable), "wheel", str(copy), "-w", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    tops = {name.split("/")[0] for name in inside}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mmalign"}, "nothing generic may land in site-packages"
    for name in tracked():
        top = name.split("/")[0]
        if top in {"mmalign", "evaluators", "trainers", "leaderboards"} and not name.startswith("leaderboards/rendered/"):  # made from it
            assert (name if top == "mmalign" else f"mmalign/{name}") in inside, f"{name} is not in the wheel"

    python = environment(tmp_path / "venv")
    pip(Path(sys.executable), "--python", str(python), "install", str(wheel))
    installed = ask(python, tmp_path)
    assert installed["file"].endswith("site-packages/mmalign/evaluators/shapes.py")
    assert (installed["names"], installed["cards"], installed["checkpoints"]) == (bare["names"], bare["cards"], bare["checkpoints"])
    command = subprocess.run([python.parent / "mmalign", "ls", "suites"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert command.returncode == 0 and "shapes" in command.stdout, command.stderr


def test_editable_install(copy: Path, bare: dict, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    pip(Path(sys.executable), "--python", str(python), "install", "--editable", str(copy))
    installed = ask(python, tmp_path)
    assert installed["file"] == str(copy / "evaluators" / "shapes.py") and installed["module"] == "mmalign.evaluators.shapes"
    assert (installed["names"], installed["cards"]) == (bare["names"], bare["cards"])
    cards = copy / "evaluators" / "cards"
    (copy / "evaluators" / "later.py").write_text('"""A suite made after the install."""\nclass Evaluator: ...\n')
    (cards / "later.yaml").write_text((cards / "shapes.yaml").read_text().replace("Shapes", "Later").replace("name: shapes", "name: later"))
    try:
        assert "later" in ask(python, tmp_path)["names"]["evaluators"], "a new file must be found without installing again"
    finally:
        (copy / "evaluators" / "later.py").unlink()
        (cards / "later.yaml").unlink()


def test_constraints_pin_every_dependency_exactly() -> None:
    import tomllib

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][extra] for extra in ("test", "ocr", "safety", "attribution")]
    wanted = [*project["dependencies"], *(text for extra in extras for text in extra)]
    names = {text.split(">")[0].split("[")[0].strip().lower() for text in wanted}
    assert names <= set(pins), names - set(pins)
    assert pins["torch"] == "2.13.0" and not [name for name in pins if name.startswith(("nvidia", "cuda"))]
