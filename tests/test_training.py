"""Training runs: exact resume after kill -9, one process and two, state that is whole or absent, refusals that say what to do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmalign import cli, history, loop
from mmalign.history import hacking_note, read_metrics
from mmalign.images import decode_image
from mmalign.testbed.tiny import make_janus

PLUG = Path(__file__).parent / "helpers" / "redness.py"
STEPS = 4
WATCHED = ("--image-every", "2", "--panel", "shapes", "--panel-every", "2")  # looking at a run changes nothing in it


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_janus(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("".join(f"a photo of {n} red things\n" for n in ("two", "three", "four", "five")))
    return file


def words(checkpoint, prompts, run, *more, trainer="t2i_r1", steps=STEPS):
    return [
        *("train", trainer, "--model", str(checkpoint), "--plug", str(PLUG), "--prompts", str(prompts), "--run-dir", str(run)),
        *("--reward", "redness=1", "--steps", str(steps), "--prompts-per-step", "2", "--samples", "4", "--images", "1"),
        *("--reasoning-tokens", "4", "--learning-rate", "1e-3", "--save-every", "1", "--image-every", "0", "--device", "cpu", *more),
    ]


def run_here(*arguments):
    return cli.main(list(arguments))


def launch(arguments, processes=1):
    start = [sys.executable, "-m", "mmalign"]
    if processes > 1:
        torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "mmalign")
        start = [sys.executable, "-m", *torchrun]
    return subprocess.Popen(
        [*start, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def weights(run):
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


def difference(first, second):
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def figures(run):
    keep = ("step", "reward", "kl", "grad_norm", "ratio_deviation")
    return [{name: line[name] for name in keep} for line in read_metrics(run) if line["step"]]


@pytest.fixture(scope="module")
def undisturbed(checkpoint, prompts, tmp_path_factory):
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert run_here(*words(checkpoint, prompts, run)) == 0
    return run


def test_training_changes_the_model_and_logs_a_ratio_of_one(undisturbed, checkpoint):
    from safetensors.torch import load_file

    before, after = load_file(checkpoint / "model.safetensors"), weights(undisturbed)
    moved = {name.split(".")[1] if name.startswith("model.") else name for name in before if not torch.equal(before[name], after[name])}
    assert "language_model" in moved and "vqmodel" not in moved and "vision_model" not in moved
    lines = read_metrics(undisturbed)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["ratio_deviation"] < 1e-5 and line["kl"] >= 0 for line in lines) and lines[-1]["kl"] > 0
    facts = json.loads((undisturbed / "model" / "training.json").read_text())
    assert facts["trained_on_rewards"] == ["redness"] and facts["steps"] == STEPS


def test_a_killed_run_continues_bit_for_bit(undisturbed, checkpoint, prompts, tmp_path):
    run = tmp_path / "killed"
    process = launch(words(checkpoint, prompts, run, *WATCHED))
    deadline = time.monotonic() + 300
    while not (run / "state" / "step-000002" / "manifest.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "model").exists()
    assert run_here(*words(checkpoint, prompts, run, *WATCHED)) == 0
    assert figures(run) == figures(undisturbed) and difference(run, undisturbed) == 0.0
    lines = read_metrics(run)
    assert [line["step"] for line in lines if "panel/strict" in line] == [0, 2, 4] and [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    albums = history.read_albums(run, "samples")
    assert [album.step for album in albums] == [0, 2, 4] and len(albums[0].files) == 8
    assert albums[0].files[0].read_bytes() != albums[2].files[0].read_bytes()


def test_what_learns_beside_the_model_continues_too(checkpoint, prompts, tmp_path):
    """The amortised head of dense_grpo: its state after 2 + kill + 1 steps is that of 3, to the bit."""
    more = ("--reward", "clipscore=1", "--set", "clipscore.model=tiny-clip", "--attribution", "amortised", "--tool", "{grid: 8}")
    arguments = [words(checkpoint, prompts, tmp_path / name, *more, trainer="dense_grpo", steps=3) for name in ("whole", "killed")]
    assert run_here(*arguments[0]) == 0
    process = launch(arguments[1])
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed/state/step-000002/manifest.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model").exists()
    assert run_here(*arguments[1]) == 0
    whole, killed = (head_of(tmp_path / name / "state" / "step-000003") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    assert float(whole["head.0.memory"][0]) == 3 and any(name.endswith("exp_avg") for name in whole)


def head_of(folder):
    from safetensors.torch import load_file

    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items() if name.startswith("head.")}


def test_lines_of_a_run_that_died_before_its_first_state_are_not_kept(checkpoint, prompts, tmp_path):
    run = tmp_path / "early"
    run.mkdir()
    history.append_metrics(run, {"step": 1, "reward": 9.0})
    assert run_here(*words(checkpoint, prompts, run, steps=1)) == 0
    (line,) = read_metrics(run)
    assert line["reward"] < 1


def test_a_dense_run_keeps_groups_with_their_rewards_and_a_page_with_their_token_weights(checkpoint, prompts, tmp_path):
    run = tmp_path / "dense"
    more = ("--attribution", "random", "--image-every", "1")
    assert run_here(*words(checkpoint, prompts, run, *more, trainer="dense_grpo", steps=1)) == 0
    (album,) = history.read_albums(run, "rollouts")
    assert album.step == 1 and "red things" in album.title and len(album.files) == 4 and album.captions[0].startswith("reward 0.")
    pair = decode_image(album.files[0])
    side = pair.shape[0]
    assert pair.shape == (side, 2 * side, 3) and (pair[:, :side] != pair[:, side:]).any()
    page = (run / "index.html").read_text()
    assert "rollouts/step-000001/00.png" in page and "how much its tokens weigh" in page
    other = words(checkpoint, prompts, run, "--attribution", "random", "--image-every", "7", trainer="dense_grpo", steps=1)
    assert run_here(*other) == 0, "a run may be looked at otherwise when it continues"


def test_a_half_written_state_is_never_read(undisturbed, checkpoint, prompts, tmp_path):
    run = tmp_path / "half"
    assert (
        run_here(
            *words(
                checkpoint,
                prompts,
                run,
                steps=2,
            )
        )
        == 0
    )
    for name in ("step-000009.tmp", "step-000009"):
        (run / "state" / name).mkdir()
        (run / "state" / name / "shard.safetensors").write_bytes(b"half")
    from mmalign import distributed

    assert distributed.latest_state(run / "state").name == "step-000002"


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_resume_each_others_state(undisturbed, checkpoint, prompts, tmp_path):
    both = tmp_path / "both"
    process = launch(words(checkpoint, prompts, both, *WATCHED), processes=2)
    output = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 0, output[-3000:]
    assert difference(both, undisturbed) < 1e-5, output[-3000:]
    # The state that two processes wrote continues on one.
    for path in (both / "state").glob("step-000004*"):
        import shutil

        shutil.rmtree(path)
    assert run_here(*words(checkpoint, prompts, both, *WATCHED)) == 0
    assert difference(both, undisturbed) < 1e-5


def test_lora_trains_adapters_alone_and_is_merged_in_the_checkpoint(checkpoint, prompts, tmp_path):
    run = tmp_path / "lora"
    assert run_here(*words(checkpoint, prompts, run, "--lora-rank", "4", "--inner-epochs", "2", "--ema", "0.5", steps=2)) == 0
    from safetensors.torch import load_file

    before, after = load_file(checkpoint / "model.safetensors"), weights(run)
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all("proj" in name or "lm_head" in name for name in moved)


def test_a_run_of_other_choices_is_refused(undisturbed, checkpoint, prompts, capsys):
    assert run_here(*words(checkpoint, prompts, undisturbed, "--beta", "0.5")) == 2
    assert "another config" in capsys.readouterr().err


def test_a_broken_reward_stops_the_run_and_says_so(checkpoint, prompts, tmp_path, capsys):
    assert run_here(*words(checkpoint, prompts, tmp_path / "broken", "--set", "redness.broken=true")) == 1
    assert "redness" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, expected",
    [
        (("--learning-rat", "1"), "learning_rate"),
        (("--clip-low", "wide"), "clip_low"),
        (("--parts", "[nose]"), "no trainable part"),
        (("--samples", "1"), "at least two"),
    ],
)
def test_wrong_options_are_sentences(checkpoint, prompts, tmp_path, capsys, more, expected):
    assert run_here(*words(checkpoint, prompts, tmp_path / "wrong", *more)) == 2
    assert expected in capsys.readouterr().err


def test_show_config_prints_every_option(checkpoint, prompts, tmp_path, capsys):
    assert run_here(*words(checkpoint, prompts, tmp_path / "shown", "--show-config", trainer="gvu")) == 0
    text = capsys.readouterr().out
    assert "teacher: live" in text and "learning_rate: 0.001" in text and not (tmp_path / "shown").exists()


@pytest.mark.parametrize("trainer, more", [("gvu", ()), ("gvu", ("--teacher", "frozen")), ("dense_grpo", ("--attribution", "random"))])
def test_other_methods_run(trainer, more, checkpoint, prompts, tmp_path):
    run = tmp_path / "other"
    assert run_here(*words(checkpoint, prompts, run, *more, trainer=trainer, steps=1)) == 0
    (line,) = read_metrics(run)
    assert line["grad_norm"] > 0 and line["flat_groups"] == 0


def test_hacking_is_said_in_words():
    falling = [{"reward": 0.1 * n + 0.01 * (n % 2), "panel/strict": 0.9 - 0.05 * n} for n in range(12)]
    steady = [{"reward": 0.1 * n + 0.01 * (n % 2), "panel/strict": 0.5 + 0.01 * (n % 3)} for n in range(12)]
    assert "strict" in (hacking_note(falling) or "") and hacking_note(steady) is None


def test_draws_depend_on_seed_and_step_alone():
    class Bare(loop.Loop):
        def __init__(self, step):
            self.step, self.config = step, loop.LoopConfig(seed=3)

    from mmalign.types import Prompt

    items = [Prompt(str(n), str(n)) for n in range(10)]
    epoch = [prompt for step in range(5) for prompt in Bare(step).draw(items, 2)]
    assert sorted(p.id for p in epoch) == sorted(p.id for p in items)
    assert Bare(3).draw(items, 2) == Bare(3).draw(items, 2) and Bare(0).seeds(items, 2) != Bare(1).seeds(items, 2)
