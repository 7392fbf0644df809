"""README and docs: every command of the program in them is one that it takes.

Models and files that a page names are stood in for by tiny ones of the same layout. `eval` and `train` end where they would begin to
compute (--show-config): the options are read, the model is found and recognised, the configuration is built. The other verbs run.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import make_prompts, make_run
from helpers.suites import add_data, needs
from helpers.tiny_geneval import make_clip, make_detector
from helpers.tiny_harmon import make_harmon, make_original_harmon
from helpers.tiny_masked import make_dimoo, make_showo
from helpers.tiny_openuni import make_openuni
from helpers.tiny_xomni import make_xomni
from PIL import Image

from mmalign import cli
from mmalign.hub import CHECKPOINTS

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"tables.md": "test_tables_docs.py", "extend.md": "test_extend.py"}  # pages whose commands run there
COMMAND = re.compile(r"^\s*(?:torchrun [^#\n]*? -m )?(mmalign [^#\n]*?)\s*(?:#.*)?$", re.MULTILINE)


def commands() -> list[Any]:
    pages = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in ELSEWHERE)]
    found = {}
    for page in pages:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found |= {command: page.name for command in COMMAND.findall(block)}
    # What `plan` would run is known from the official prompts alone.
    return [pytest.param(page, line, marks=needs("geneval") if line.startswith("mmalign plan") else ()) for line, page in found.items()]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything that the pages name is there."""
    folder = tmp_path_factory.mktemp("work")
    known = {"tiny-janus": ("CHECKPOINT", "my-janus", "PATH/Janus-Pro-7B"), "tiny-mmada": ("PATH/MMaDA-8B-Base",)}
    known["tiny-sd3"] = ("PATH/stable-diffusion-3.5-medium",)
    for checkpoint, names in known.items():
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(CHECKPOINTS / checkpoint)
    make_dimoo(folder / "PATH" / "Lumina-DiMOO")
    for name in ("showlab/show-o-512x512", "showlab/show-o"):
        make_showo(folder / name)
    make_xomni(folder / "X-Omni-En")
    make_original_harmon(make_harmon(folder / "wusize" / "Harmon-1_5B"), folder / "harmon")
    (folder / "harmon" / "harmon_0.5b.pth").rename(folder / "harmon" / "harmon_1.5b.pth")
    (folder / "harmon" / "qwen2.5").rename(folder / "Qwen2.5-1.5B-Instruct")
    make_openuni(folder / "openuni")
    parts = {"internvl3": "InternVL3-1B", "sana": "Sana_600M_512px_diffusers", "dc-ae": "dc-ae-f32c32-sana-1.1-diffusers"}
    for part, name in parts.items():
        (folder / "openuni" / part).rename(folder / name)
    make_detector(folder / "detector")
    make_clip(folder / "clip")
    (folder / "prompts.jsonl").write_text('{"prompt": "a red star"}\n')
    (folder / "prompts.txt").write_text('a sign that says "open"\na door that says "shut"\n')
    (folder / "DIR").mkdir()
    for number in range(2):
        Image.fromarray(np.full((40, 40, 3), 90 * number, np.uint8)).save(folder / "DIR" / f"{number}.png")
    make_run(folder / "results", make_prompts(4), model="tiny-janus", suite="geneval", scorers=("geneval",))
    (folder / "trainers").symlink_to(ROOT / "trainers")
    return folder


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_documented_command_is_one_that_the_program_takes(work: Path, page: str, command: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(work)
    words = [part for word in shlex.split(command)[1:] for part in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    if words[0] == "plan":
        monkeypatch.setenv("MMALIGN_DATA", str(work / "data"))
        add_data({"geneval": "geneval/evaluation_metadata.jsonl"})
        words += ["--set", f"geneval.detector={work / 'detector'}", "--set", f"geneval.clip={work / 'clip'}"]
    if words[0] in ("plan", "score"):
        words += ["--executor", "inline"]  # worker processes take seconds each to begin
    if words[0] in ("eval", "train") and "--show-config" not in words:
        words.append("--show-config")
    code = cli.main(words)
    assert code == 0, f"{page}: {command}\n{capsys.readouterr().err}"


def test_commands_of_every_page_were_found() -> None:
    pages = {param.values[0] for param in commands()}
    assert {"README.md", "quickstart.md", "training.md", "models.md", "segros.md", "ht_grpo.md", "flow_grpo.md", "gvu.md"} <= pages
    verbs = {param.values[1].split()[1] for param in commands()}
    assert verbs >= {"eval", "train", "plan", "ls", "explain", "score", "report", "table", "doctor"}
