"""The command line: its golden texts, exit codes, errors that are sentences, what it imports, and what it says of a run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_extend import FILES

from mmalign import cli, evaluate, verbs

ROOT = Path(__file__).parent.parent
PLUGS = ["--plug", "redness.py", "--plug", "red_things.py", "--plug", "flat.py"]
RED = ["--model", "flat:weights", "--suite", "red_things", "--executor", "inline", *PLUGS]

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command line in an empty folder that holds the examples of docs/extend.md: (exit code, stdout, stderr)."""
    for name, body in FILES.items():
        (tmp_path / name).write_text(body)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "flat.txt").write_text("1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(arguments)
        except SystemExit as stop:  # argparse leaves this way after --help
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


GOLDEN_HEAD = "usage: mmalign [-h] [--version] VERB ...\n\nEvaluate and align text-to-image and unified multimodal models.\n"
GOLDEN_VERBS = """\
    ls        Names of suites, models, scorers and trainers, one line each, with what is missing to run them
    explain   A suite's protocol card
    plan      What eval would run, what of it is there already, its cost and its deviations from the protocol; writes
    eval      Run suites on a model, or continue where an earlier run stopped
    report    Static HTML of one or more runs
    doctor    Environment, cores, GPUs, packages; which suites, scorers and models run here; the commands that fix the
    data      Benchmark files
"""


def test_help_is_one_page(say: Say) -> None:
    code, out, _ = say("--help")
    assert code == 0 and out.startswith(GOLDEN_HEAD) and set(GOLDEN_VERBS.splitlines()) <= set(out.splitlines())
    assert out.count("\n") < 45
    code, out, _ = say()
    assert code == 2 and out.startswith(GOLDEN_HEAD)


def test_ls_filters_by_kind_and_text(say: Say) -> None:
    code, out, _ = say("ls", "suites", "red things", *PLUGS)
    assert (code, out) == (0, "suite  red_things  ready  Red things: is what should be red red?\n")
    code, out, _ = say("ls", "--json", *PLUGS)
    listed = json.loads(out)
    assert code == 0 and {"red_things", "redness", "flat", "shapes"} <= {item["name"] for item in listed}
    assert all(item["description"] for item in listed)


def test_explain_prints_the_whole_card(say: Say) -> None:
    code, out, _ = say("explain", "red-things", *PLUGS)
    assert code == 0 and out.startswith("Red things (suite 'red_things'): Red things: is what should be red red?\n")
    assert re.search(r"^option +--set red_things.threshold=0.4$", out, re.MULTILINE)
    assert re.search(r"^formula +share of images whose redness is above the threshold$", out, re.MULTILINE)
    code, out, _ = say("explain", "flat", *PLUGS)
    assert code == 0 and "--set sampling.brightness=200" in out
    assert re.search(r"^prompts +as many as the data hold; the protocol names no number$", say("explain", "mmdt")[1], re.MULTILINE)
    card = json.loads(say("explain", "geneval", "--json")[1])
    assert card["prompts"] == 553 and card["images_per_prompt"] == 4 and len(card["traps"]) > 2


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["evall"], 2, "Unknown verb 'evall'. Did you mean 'eval'?"),
        (["eval", "--sute", "x"], 2, "Unknown option '--sute' of mmalign eval. Did you mean '--suite'?"),
        (["eval", "--suite", "shapes"], 2, "The following arguments are required: --model. See: mmalign eval --help"),
        (["eval", "--model", "flat:weights", "--suite", "genevall", *PLUGS], 2, "Unknown suite 'genevall'. Did you mean 'geneval'?"),
        (["eval", *RED, "--limit", "0"], 2, "Argument --limit: expected a whole number of at least 1, got '0'. See: mmalign eval --help"),
        (["eval", *RED, "--size", "8y8"], 2, "Argument --size: expected a whole number of at least 1, got '8y8'. See: mmalign eval --help"),
        (["eval", *RED, "--set", "redness"], 2, "--set redness: expected ROOT.OPTION=VALUE, such as sampling.guidance=5"),
        (["eval", *RED, "--set", "rednes.a=1"], 2, "--set rednes.a: nothing here is called 'rednes'. Did you mean 'redness'"),
        (["eval", *RED, "--set", "redness.chanel=1"], 2, "Unknown option 'chanel' of redness. Did you mean 'channel'?"),
        (["eval", *RED, "--set", "sampling.brightnes=1"], 2, "Unknown option 'brightnes' of sampling. Did you mean 'brightness'?"),
        (["eval", *RED, "--model-extra", "decoder"], 2, "--model-extra decoder: expected NAME=PATH, such as decoder=./sana."),
        (["eval", *RED, "--plug", "absent.py"], 2, "--plug absent.py: expected an existing Python file (.py)."),
        (["ls", "scorers", "shapez"], 2, "Nothing is called 'shapez'. Did you mean 'shapes'?"),
        (["explain", "genevall"], 2, "Unknown suite 'genevall'. Did you mean 'geneval'?"),
        (["data", "add", "genevall", "--from", "x"], 2, "Unknown data 'genevall'. Did you mean 'geneval'?"),
        (["data", "add", "geneval"], 2, "Where is the file? mmalign data add geneval --from PATH"),
        (["data", "add"], 2, "`mmalign data add` needs a name; `mmalign data` lists them."),
        (["report", "nowhere"], 2, "There is no result in nowhere: expected"),
    ],
)
def test_wrong_commands_are_sentences(say: Say, arguments: list[str], code: int, sentence: str) -> None:
    got, out, err = say(*arguments)
    assert got == code and out.count("\n") <= 1
    assert err.startswith(f"mmalign: {sentence}") and "Traceback" not in err
    got, out, err = say(*arguments, "--json")
    assert got == code and json.loads(out[out.index("{") :])["error"].startswith(sentence) and err == ""


@pytest.mark.parametrize("model", ["nowhere", "weights", "folder/absent"])
def test_models_that_are_none_are_sentences(say: Say, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = say("eval", "--model", model, "--suite", "shapes")
    assert code in (1, 2) and out == "" and "Unexpected" not in err
    assert re.fullmatch(r"mmalign: [^\n]+\.\n", err), err


def test_debug_shows_the_traceback_and_a_fault_of_ours_is_a_sentence(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, err = say("explain", "genevall", "--debug")
    assert "Traceback" in err and err.rstrip().endswith("mmalign: Unknown suite 'genevall'. Did you mean 'geneval'?")

    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("mmalign.explain.explain", broken)
    code, _, err = say("explain", "geneval")
    assert code == 1 and err.startswith("mmalign: Unexpected ZeroDivisionError: by zero. This is a fault in mmalign or a plug-in")


def test_eval_says_line_and_report_and_continues(say: Say) -> None:
    code, out, err = say("eval", *RED)
    lines = out.splitlines()
    assert code == 0 and err == ""
    assert lines[0] == "weights on red_things: this process, results in results/weights"
    assert re.fullmatch(r"Red things 0\.\d{3} \+/- 0\.\d{3} \(4x2, 0 failed, protocol: official\)", lines[1])
    assert lines[2] == "  report    results/weights/red_things/index.html" and len(lines) == 3
    again = say("eval", *RED)
    assert again[0] == 0 and again[1] == out
    code, out, _ = say("plan", *RED, "--json")
    (plan,) = json.loads(out)
    assert (plan["images"], plan["cached"]) == (8, {"images": 8, "values": 8, "failures": 0})
    code, out, _ = say("report", "results/weights/red_things", "--out", "pages")
    assert (code, out) == (0, "pages/index.html\n") and Path("pages/index.html").is_file()


def test_limit_is_marked_and_still_complete(say: Say) -> None:
    code, out, _ = say("eval", *RED, "--limit", "2", "--json")
    (result,) = json.loads(out)
    assert code == 0 and result["status"] == "partial" and result["line"].endswith("PARTIAL") and result["counts"]["expected"] == 4


def test_plan_writes_nothing_and_names_deviations(say: Say, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = say("plan", *RED, "--seed", "7", "--set", "redness.channel=1")
    assert code == 0 and [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before
    assert "red_things: 4 prompts, 8 images, scored by redness" in out
    assert "  deviates       seed=7 (card: 42)" in out and "  deviates       redness.channel=1 (card: 0)" in out
    assert "unknown before the first images" in out


ABSENT = (
    FILES["red_things.py"]
    .replace("red things", "blue things")
    .replace(
        "    def prompts(self",
        "    def prompts(self, split='test'):\n        from mmalign.types import MmalignError\n\n"
        "        raise MmalignError('The data are not here. Bring them.')\n\n    def old_prompts(self",
    )
)
WEIGHTLESS = FILES["redness.py"].replace("    return Redness(", "    raise OSError('no weights')\n    return Redness(")


def test_all_runs_what_can_run_and_names_the_rest(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.registry._built_ins", lambda kind: [])
    (tmp_path / "blue_things.py").write_text(ABSENT)
    (tmp_path / "green_things.py").write_text(FILES["red_things.py"].replace('("redness",)', '("greenness",)'))
    (tmp_path / "greenness.py").write_text(WEIGHTLESS)
    for name in ("blue_things", "green_things"):
        (tmp_path / f"{name}.yaml").write_text((tmp_path / "red_things.yaml").read_text())
    every = [*RED[:3], "all", *RED[4:], "--plug", "blue_things.py", "--plug", "green_things.py", "--plug", "greenness.py"]
    code, out, err = say("eval", *every)
    assert code == 3 and err == "" and "Red things 0." in out and Path("results/weights/red_things/index.html").is_file()
    left = out[out.index("Left out 2 of 3 suites:\n") :].splitlines()[1:]
    assert left[0] == "  blue_things   The data are not here. Bring them." and left[1].startswith("  green_things  The scorer 'greenness'")
    assert "no weights" in left[1]
    code, out, _ = say("eval", *every, "--json")
    listed = json.loads(out)
    assert code == 3 and [item["is_complete"] for item in listed] == [True, False, False]
    assert listed[1] == {
        "suite": "blue_things",
        "status": "left out",
        "reason": "The data are not here. Bring them.",
        "is_complete": False,
    }
    code, out, _ = say("plan", *every)
    assert code == 3 and "red_things: 4 prompts, 8 images" in out and "Left out 2 of 3 suites:" in out
    code, out, err = say("eval", *RED[:3], "blue_things,red_things", *every[4:])
    assert code == 1 and err.startswith("mmalign: The data are not here"), "a suite that is named must be there"
    assert say("eval", *RED[:3], "ALL", *RED[4:])[0] == 0, "nothing is left out of one suite that runs"


def test_show_config_prints_every_option(say: Say) -> None:
    code, out, _ = say("eval", *RED, "--show-config", "--set", "redness.channel=2")
    assert code == 0 and not Path("results").exists()
    assert out == "red_things:\n  threshold: 0.4\nredness:\n  channel: 2\nsampling:\n  brightness: 200\n"


def test_incomplete_run_exits_3_and_says_how_to_continue(say: Say) -> None:
    source = FILES["redness.py"]
    fault = 'if "bus" in sample.request.prompt.text:\n            raise OSError("no luck")\n        return Value('
    Path("redness.py").write_text(source.replace("return Value(", fault, 1))
    code, out, _ = say("eval", *RED)
    lines = out.splitlines()
    assert code == 3 and lines[1].endswith(" INCOMPLETE") and "2 failed, bounds" in lines[1]
    assert lines[2:4] == ["  8 images, 6 scored, 2 failed: 2 score/error", "  not written to the leaderboard"]
    assert lines[4].startswith("  continue  mmalign eval --model flat:weights") and lines[4].endswith("--retry-failed")
    assert lines[5] == "  inspect   results/weights/red_things/index.html#failed"
    Path("redness.py").write_text(source)
    sys.modules.pop("mmalign_plug_scorers_redness")
    code, out, _ = say("eval", *RED, "--retry-failed", "--json")
    (result,) = json.loads(out)
    assert code == 0 and result["counts"]["retried"] == 2 and result["provenance"]["cached"] == 8


def test_busy_directory_is_refused(say: Say) -> None:
    from mmalign.store import Store

    with Store.write(Path("results/weights/red_things"), command="another command"):
        code, out, err = say("eval", *RED)
    assert code == 2 and "is in use by process" in err and "(another command)" in err and "--wait" in err
    assert say("eval", *RED)[0] == 0


def test_interrupt_says_what_is_saved(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    real = evaluate._generate

    def interrupted(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_generate", interrupted)
    code, _, err = say("eval", *RED)
    assert code == 3
    assert err.startswith("mmalign: Stopped in red_things. Saved in results/weights/red_things: 8 of 8 images. Continue: mmalign eval")


def _heed_interrupts() -> None:
    """A shell starts its background jobs with interrupts ignored, and what they start inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_on_a_real_run_leaves_no_traceback(say: Say, tmp_path: Path) -> None:
    pause = "        import time\n\n        import numpy as np\n\n        time.sleep(0.2)\n"
    (tmp_path / "flat.py").write_text(FILES["flat.py"].replace("        import numpy as np\n", pause))
    command = [sys.executable, "-m", "mmalign", "eval", *RED[:4], *PLUGS, "-j", "1", "--batch-size", "1", "--images-per-prompt", "200"]
    environment, pipe = {**os.environ, "PYTHONPATH": str(ROOT)}, subprocess.PIPE
    run = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True, preexec_fn=_heed_interrupts
    )
    deadline = time.monotonic() + 120
    # An image is on disk before the driver counts it as saved; with a few there, the first are counted.
    while len(list(tmp_path.glob("results/weights/red_things/store/images/*/*.png"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)  # what a terminal does: the whole group gets it
    _, err = run.communicate(timeout=60)
    assert run.returncode == 3, err
    assert re.search(r"Saved in results/weights/red_things: [1-9]\d* of 800 images", err) and "Traceback" not in err


@pytest.mark.parametrize("arguments", [["--help"], ["ls"], ["explain", "shapes"], ["eval", "--model", "x", "--suite", "genevall"]])
def test_light_verbs_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from mmalign.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'PIL', 'pyarrow', 'scipy', 'rich'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stdout + done.stderr


def test_a_new_verb_is_one_file(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "verbs"
    folder.mkdir()
    (folder / "listen.py").write_text(
        '"""Listen at a port: for a while."""\n\n'
        "def declare(parser):\n"
        "    parser.add_argument('--port', type=int, default=1)\n"
        "    return lambda options, screen: screen.say(f'port {options.port}') or 0\n"
    )
    monkeypatch.setattr(verbs, "__path__", [*verbs.__path__, str(folder)])
    assert say("listen", "--port", "7")[:2] == (0, "port 7\n")
    assert "    listen    Listen at a port" in say("--help")[1]


def test_secrets_stay_out_of_everything(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("OPENAI_API_KEY=canary-0123456789\n")
    source = FILES["redness.py"].replace("        total =", "        raise OSError(open('.env').read())\n        total =", 1)
    Path("redness.py").write_text(source)
    code, out, err = say("eval", *RED)
    assert code == 3 and "canary" not in out + err
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".env"]
    assert len(files) > 10 and not [path for path in files if b"canary" in path.read_bytes()]


def test_a_method_with_sizes_trains_at_the_size_of_the_evaluation(capsys):
    words = ("train", "flow_grpo", "--model", "tiny-sd3", "--prompts", "shapes", "--size", "64x32", "--show-config")
    assert cli.main(["--debug", *words, "--json"]) == 0, "general options may stand before the verb"
    assert json.loads(capsys.readouterr().out)["config"]["size"] == [64, 32]
