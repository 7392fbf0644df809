"""Flow-GRPO and DenseGRPO: gains telescope, ratios are one, gradients are the policy's, calibration balances, runs resume to the bit."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_diffusion import make_sd3, make_sd15
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmalign.trainers import _flow as flow
from mmalign.trainers import flow_grpo
from mmalign.trainers._calibration import Calibration, calibrate

from mmalign import cli, grpo, history
from mmalign.loop import Loop
from mmalign.models import diffusion as family
from mmalign.trajectory import Policy, Trajectory
from mmalign.types import Prompt

pytestmark = pytest.mark.usefixtures("one_thread")

PLUG = Path(__file__).parent / "helpers" / "redness.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_sd3(tmp_path_factory.mktemp("models") / "sd3", seed=1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("".join(f"a photo of {n} red things\n" for n in ("two", "three", "four", "five")))
    return file


def words(checkpoint, prompts, run, *more, steps=2):
    return [
        *("train", "flow_grpo", "--model", str(checkpoint), "--plug", str(PLUG), "--prompts", str(prompts), "--run-dir", str(run)),
        *("--reward", "redness=1", "--steps", str(steps), "--prompts-per-step", "2", "--samples", "4", "--denoising-steps", "4"),
        *("--micro-batch", "16", "--lora-rank", "4", "--learning-rate", "1e-3", "--save-every", "1", "--image-every", "0"),
        *("--guidance", "2", "--device", "cpu", *more),
    ]


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    from safetensors.torch import load_file

    return load_file(run / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


# Credit


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # neither is about the code
@given(rewards=st.lists(st.floats(-100, 100), min_size=3, max_size=12))
def test_gains_telescope(rewards):
    total = np.array([rewards, rewards[::-1]])
    drawn = Trajectory("flow", torch.zeros(2, len(rewards) - 1, 1, 1, 1), torch.zeros(2, len(rewards) - 1), Policy(), (0, 1))
    gains = flow_grpo.step_rewards(total, drawn, "gain")
    assert np.allclose(gains.sum(1), total[:, -1] - total[:, 0], atol=1e-6)
    assert np.array_equal(flow_grpo.step_rewards(total, drawn, "latent"), total[:, 1:])
    terminal = flow_grpo.step_rewards(total[:, -1:], drawn, "terminal")
    assert terminal.shape == gains.shape and (terminal == total[:, -1:]).all()


def test_shares_by_similarity_have_mean_one_and_go_to_the_steps_that_approach():
    target = torch.tensor([1.0, 0.0])
    path = torch.stack([torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]), target])[None, :, :, None, None]
    drawn = Trajectory("flow", path[:, 1:], torch.zeros(1, 3), Policy(), (0,), states=path[:, :-1])
    shares = flow_grpo.similarity_shares(drawn)
    assert shares.mean() == pytest.approx(1) and shares[0] == pytest.approx([0, 3 * 0.5**0.5, 3 * (1 - 0.5**0.5)])
    still = Trajectory(
        "flow", path[:, :1].repeat(1, 3, 1, 1, 1), torch.zeros(1, 3), Policy(), (0,), states=path[:, :1].repeat(1, 3, 1, 1, 1)
    )
    assert flow_grpo.similarity_shares(still).tolist() == [[1.0, 1.0, 1.0]]


def test_advantages_are_of_each_step_and_a_missing_reward_is_none():
    values = np.array([[1.0, 5.0], [3.0, 5.0], [2.0, np.nan], [2.0, 1.0]])
    made = flow.advantages(values, 2, grpo.AdvantageRule(0, 0.0, "group"))
    assert made[:, 0].tolist() == [-1, 1, 0, 0] or torch.allclose(made[:2, 0], torch.tensor([-1.0, 1.0]).double())
    assert made[2, 1] == 0 and not made[:2, 1].nan_to_num(0).any()


def test_trained_steps_leave_out_the_last_and_the_deterministic():
    config = flow_grpo.Config()
    assert flow_grpo.trained_steps((0.7,) * 10, config) == list(range(9))
    assert flow_grpo.trained_steps((0.0, 0.7, 0.0, 0.7), config) == [1]
    fast = flow_grpo.Config(window=3, window_end=5)
    places = {flow_grpo.windowed((0.7,) * 10, fast, step) for step in range(40)}
    assert len(places) == 3 and all(sum(level > 0 for level in levels) == 3 and not any(levels[5:]) for levels in places)
    assert flow_grpo.windowed((0.7,) * 10, fast, 5) == flow_grpo.windowed((0.7,) * 10, fast, 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 1}, "at least two"),
        ({"window": 6}, "does not fit"),
        ({"noise_level": 0.0}, "must be positive"),
        ({"denoising_steps": 1}, "no step to train"),
    ],
)
def test_wrong_options_are_sentences(options, words):
    with pytest.raises(ValueError, match=words):
        flow_grpo.Config(**options)


# The update


@pytest.fixture
def scene(checkpoint, tmp_path):
    """A model, its loop, and a rollout of six samples with noise at every step."""
    config = flow_grpo.Config(steps=2, lora_rank=4, learning_rate=2e-3, ema=0.0, image_every=0, grad_norm=1e9)
    model = family.load(checkpoint)
    loop = Loop(config, model, tmp_path / "run")
    rows = [Prompt("p", "a red circle")] * 6
    rollout = flow.make_rollout(model, loop, rows, Policy(2.0, levels=(0.7,) * 4), range(6), None)
    return model, loop, rollout


def how(**options):
    chosen = {"kl": "gaussian_nodt", "log_prob": "guided_detach_uncond", "inner_epochs": 1, "micro_batch": 8, "beta": 0.0, "clip": 1e9}
    chosen |= options
    objective = grpo.Objective(chosen.pop("clip"), 1e9, chosen.pop("beta"), "k3")
    return flow.Update(objective, **chosen)


def test_the_gradient_is_the_policy_gradient_whatever_the_micro_batch(scene):
    model, loop, rollout = scene
    advantage = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for micro_batch in (4, 18):
        loop.update = lambda: found.append({name: value.grad.clone() for name, value in loop.parameters.items()})
        flow.update(model, loop, rollout, advantage, [0, 1, 2], how(micro_batch=micro_batch))
        loop.optimizer.zero_grad()
    model_log_prob = model.log_prob(rollout.encoded, rollout.drawn, "guided_detach_uncond")
    (-(model_log_prob * advantage)[:, :3].mean()).backward()
    for name, value in loop.parameters.items():
        assert torch.allclose(found[0][name], found[1][name], atol=1e-6) and torch.allclose(value.grad, found[0][name], atol=1e-6)


@pytest.mark.parametrize(("credit", "sign"), [(1.0, 1), (-1.0, -1)])
def test_a_credited_step_becomes_likelier_and_a_blamed_one_less_likely(scene, credit, sign):
    model, loop, rollout = scene
    advantage = torch.zeros(6, 4)
    advantage[2, 1] = credit
    loop.config = replace(loop.config, learning_rate=1e-5)  # so small that the step is its gradient
    with torch.no_grad():
        before = model.log_prob(rollout.encoded, rollout.drawn)
    for _ in loop.steps():
        flow.update(model, loop, rollout, advantage, [0, 1, 2], how())
        break
    with torch.no_grad():
        change = model.log_prob(rollout.encoded, rollout.drawn) - before
    assert sign * float(change[2, 1]) > 1e-6 and change[:, 1].abs().argmax() == 2


def drift_away(loop):
    with torch.no_grad():
        for name, value in loop.parameters.items():
            if "lora_B" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))


def test_k3_measures_the_new_policy_by_the_reference_and_not_the_reverse(scene):
    model, loop, rollout = scene
    drift_away(loop)
    for _ in loop.steps():
        fresh = flow.make_rollout(model, loop, rollout.rows, rollout.drawn.policy, range(6), None)
        with torch.no_grad():
            new = model.log_prob(fresh.encoded, fresh.drawn)[:, :3].double()
            with loop.reference():
                reference = model.log_prob(fresh.encoded, fresh.drawn)[:, :3].double()
        flow.update(model, loop, fresh, torch.zeros(6, 4), [0, 1, 2], how(kl="k3", beta=1.0))
        break
    expected, reverse = (float((gap.exp() - gap - 1).mean()) for gap in (reference - new, new - reference))
    assert loop._figures["kl"] == pytest.approx(expected, rel=1e-4) and abs(reverse - expected) > 0.01 * expected


@pytest.mark.parametrize("kl", ["gaussian", "gaussian_nodt"])
def test_the_kl_pulls_back_to_the_reference(scene, kl):
    model, loop, rollout = scene
    drift_away(loop)
    seen = []
    for _ in loop.steps():
        fresh = flow.make_rollout(model, loop, rollout.rows, rollout.drawn.policy, range(6), None)
        flow.update(model, loop, fresh, torch.zeros(6, 4), [0, 1, 2], how(kl=kl, beta=1.0))
        seen.append(loop._figures["kl"])
    assert seen[0] > seen[1] > 0


# Calibration


def planted(targets, count=24):
    """Gains that are balanced up to a level of noise of each step's own, and all negative above it."""

    def measure(levels, iteration):
        is_fine = np.array(levels) <= np.array(targets) + 1e-9
        return np.where(is_fine, count // 2, 0), np.where(is_fine, count // 2, count)

    return measure


def test_calibration_finds_the_noise_that_each_step_bears():
    targets = [1.0, 0.4, 0.7]
    found = calibrate([0.7] * 3, planted(targets), Calibration(iterations=60))
    assert np.allclose(found.levels, targets, atol=0.011) and np.abs(found.drift).max() < 0.2
    assert np.allclose(np.abs(np.diff(np.array(found.history), axis=0)), 0.01) and len(found.positive) == 60


def test_calibration_keeps_a_floor_and_shows_when_it_only_falls():
    stream = np.random.default_rng(0)

    def coin(levels, iteration):  # every step is truly balanced; only the counts' noise speaks
        positive = stream.binomial(1000, 0.5, len(levels))
        return positive, 1000 - positive

    found = calibrate([0.7] * 4, coin, Calibration(iterations=40))
    assert max(found.drift) < -0.8
    floored = calibrate([0.1], planted([0.0]), Calibration(iterations=40, floor=0.05))
    assert floored.levels == (0.05,)


# Runs


@pytest.fixture(scope="module")
def undisturbed(checkpoint, prompts, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    options = ("--credit", "gain", "--noise", "calibrated", "--calibration", "{trajectories: 2, iterations: 2}")
    assert cli.main(words(checkpoint, prompts, run, *options)) == 0
    return run, options


def test_a_run_logs_gains_and_ratios_and_keeps_its_calibration(undisturbed, checkpoint):
    run, _ = undisturbed
    found = [line for line in lines(run) if "reward" in line]
    assert len(found) == 2 and all(line["ratio_deviation"] < 1e-5 for line in found)
    assert {f"gain/step_{k}" for k in range(4)} <= set(found[0]) and found[-1]["kl"] > 0
    assert all(0 <= line[f"positive/step_{k}"] <= 1 for line in found for k in range(4))
    assert {group.step: [len(row) for row in group.rows] for group in history.read_gains(run)} == {}  # pictures were not asked for
    kept = json.loads((run / "calibration.json").read_text())
    assert kept["rule"] == "constant" and len(kept["history"]) == 3 and kept["levels"] == kept["history"][-1]
    assert kept["options"]["trajectories"] == 2 and len(kept["positive"][0]) == 4
    # The first step starts from Flow-GRPO's own rate, 0.7 sqrt(1 / (1 - sigma_1)), with the second of four sigmas shifted by 3.
    assert kept["history"][0][0] == pytest.approx(0.7 * (1 / (1 - 0.857666)) ** 0.5, rel=1e-3)
    before = family.load(checkpoint).net.state_dict()
    moved = {name for name, value in weights(run).items() if not torch.equal(before[name], value)}
    assert moved and all("attn" in name for name in moved)


def test_gains_of_a_group_are_kept_with_its_pictures(checkpoint, prompts, tmp_path):
    run = tmp_path / "run"
    command = words(checkpoint, prompts, run, "--credit", "gain", steps=1)
    command[command.index("--image-every") + 1] = "1"
    assert cli.main(command) == 0
    (group,) = history.read_gains(run)
    line = lines(run)[0]
    assert group.step == 1 and group.title.startswith("a photo of") and [len(row) for row in group.rows] == [4] * 4
    rewards = [float(caption.removeprefix("reward ")) for caption in history.read_albums(run, "rollouts")[0].captions]
    assert len(rewards) == 4 and all(sum(row) <= 1 for row in group.rows)
    page = (run / "index.html").read_text()
    assert "Gains of a group at step 1" in page and "Share of positive gains by denoising step" in page and line["gain/step_0"] != 0


def test_a_run_continues_bit_for_bit(undisturbed, checkpoint, prompts, tmp_path):
    run, options = undisturbed
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "state" / "step-000002")
    shutil.rmtree(again / "model")
    assert cli.main(words(checkpoint, prompts, again, *options)) == 0
    first, second = weights(run), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_processes_do_what_one_does(undisturbed, checkpoint, prompts, tmp_path):
    run, options = undisturbed
    both = tmp_path / "both"
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmalign")
    done = subprocess.run(
        [*launch, *words(checkpoint, prompts, both, *options)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    first, second = weights(run), weights(both)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5


@pytest.mark.parametrize(
    "more",
    [
        ("--credit", "terminal", "--kl", "k3", "--inner-epochs", "2"),
        ("--credit", "latent", "--ode-steps", "1", "--window", "2", "--window-end", "3"),
        ("--credit", "similarity", "--noise", "coefficient", "--beta", "0", "--lora-rank", "0"),
    ],
)
def test_other_choices_run(more, checkpoint, prompts, tmp_path):
    assert cli.main(words(checkpoint, prompts, tmp_path / "run", *more, steps=1)) == 0
    line = lines(tmp_path / "run")[-1]
    assert line["grad_norm"] > 0 and line["flat_groups"] == 0


def test_activations_computed_again_give_the_same_update(checkpoint, prompts, tmp_path):
    runs = {name: tmp_path / name for name in ("kept", "again")}
    for name, more in (("kept", ()), ("again", ("--gradient-checkpointing", "true"))):
        assert cli.main(words(checkpoint, prompts, runs[name], *more, steps=1)) == 0
    kept, again = weights(runs["kept"]), weights(runs["again"])
    assert max(float((kept[name] - again[name]).abs().max()) for name in kept) < 1e-6
    before = family.load(checkpoint).net.state_dict()
    assert any(not torch.equal(before[name], value) for name, value in again.items())


def test_models_that_predict_noise_take_their_steps_by_ddim(prompts, tmp_path):
    checkpoint = make_sd15(tmp_path / "sd15", seed=1)
    assert cli.main(words(checkpoint, prompts, tmp_path / "run", "--credit", "gain", "--parts", "[denoiser]", steps=1)) == 0
    line = lines(tmp_path / "run")[-1]
    assert line["grad_norm"] > 0 and line["ratio_deviation"] < 1e-5


def test_a_model_without_denoising_steps_is_refused(prompts, tmp_path, capsys):
    from mmalign.testbed.tiny import make_janus

    janus = make_janus(tmp_path / "janus")
    assert cli.main(words(janus, prompts, tmp_path / "run", "--parts", "[language]")) == 2
    assert "denoise in steps" in capsys.readouterr().err
