"""docs/extend.md: every file shown there is under 40 lines and runs as it stands, as a plug and as an entry point."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmalign import registry
from mmalign.types import Prompt

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(?:python|yaml)\n# (\S+)\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
FILES = {name: f"{body}\n" for name, body in BLOCK.findall((ROOT / "docs" / "extend.md").read_text())}
ARGUMENTS = ["eval", "--model", "flat:weights", "--suite", "red-things", "--executor", "inline", "--json"]


def mmalign(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([environment.pop("PYTHONPATH", ""), str(ROOT)])
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    command = [sys.executable, "-m", "mmalign", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, body in FILES.items():
        (tmp_path / name).write_text(body)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "flat.txt").write_text("1")
    return tmp_path


def test_each_example_is_one_short_file() -> None:
    assert set(FILES) == {"redness.py", "red_things.py", "red_things.yaml", "flat.py", "keep_the_best.py"}
    for name, body in FILES.items():
        assert body.count("\n") < 40, f"{name} has {body.count(chr(10))} lines"


def test_plugged_files_give_a_complete_result(folder: Path) -> None:
    plugs = [word for name in ("redness.py", "red_things.py", "flat.py") for word in ("--plug", name)]
    done = mmalign([*ARGUMENTS, *plugs], folder)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert result["counts"]["expected"] == result["counts"]["scored"] == 8
    assert result["line"].startswith("Red things ") and result["line"].endswith("(4x2, 0 failed, protocol: official)")
    assert Path(folder, result["report"]).is_file() and Path(folder, result["file"]).is_file()

    changed = mmalign([*ARGUMENTS, *plugs, "--set", "redness.channel=2", "--set", "red_things.threshold=0.2"], folder)
    (other,) = json.loads(changed.stdout)
    assert {"redness.channel", "red_things.threshold"} <= {deviation["field"] for deviation in other["deviations"]}
    assert other["provenance"]["cached"] == 8, "another scorer option must not make the images again"


def test_an_installed_package_registers_the_same_files(folder: Path, tmp_path: Path) -> None:
    package, info = tmp_path / "site" / "third_party", tmp_path / "site" / "third_party-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("")
    for name in FILES:
        shutil.move(folder / name, package / name)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    groups = {"scorers": "redness", "evaluators": "red_things", "models": "flat", "trainers": "keep_the_best"}
    (info / "entry_points.txt").write_text("".join(f"[mmalign.{kind}]\n{name} = third_party.{name}\n" for kind, name in groups.items()))
    listed = mmalign(["ls", "--json"], folder, PYTHONPATH=str(tmp_path / "site"))
    origins = {item["name"]: item["origin"] for item in json.loads(listed.stdout) if "origin" in item}
    assert {origins[name] for name in groups.values()} == {"entry point"}
    done = mmalign(ARGUMENTS, folder, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["counts"]["scored"] == 8


def test_the_trainer_learns_from_the_best_image(folder: Path) -> None:
    trainer = registry.load(registry.find("trainers", "keep-the-best", [folder / "keep_the_best.py"]))
    learned: list[Any] = []
    logged: list[float] = []

    class Model:
        def draw(self, prompt: Prompt, seed: int) -> int:
            return seed

        def supervised_loss(self, prompts: list[Prompt], samples: list[int]) -> int:
            return samples[0]

    class Loop:
        def update(self, loss: int) -> None:
            learned.append(loss)

        def log(self, step: int, reward: float) -> None:
            logged.append(reward)

    config = trainer.Config(steps=3, images_per_prompt=4)
    trainer.train(config, Model(), lambda seeds: [-abs(seed - 6) for seed in seeds], [Prompt("a", "a")], Loop())
    assert learned == [3, 6, 8] and logged == [-3, 0, -2]
