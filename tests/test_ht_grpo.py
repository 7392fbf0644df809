"""HT-GRPO and its baselines: the objective in closed form, what a forward is spent on, stages and controls, runs that resume to the bit."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import redness
from helpers.tiny_masked import make_dimoo, make_mmada, make_showo
from mmalign.trainers import _masked as masked
from mmalign.trainers import _masked_choices as choices
from mmalign.trainers import ht_grpo

from mmalign import cli
from mmalign.loop import Loop
from mmalign.models import lumina_dimoo, mmada, showo
from mmalign.models._llada import renamed
from mmalign.reward import Reward
from mmalign.trajectory import Policy
from mmalign.types import Prompt, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

PLUG = Path(__file__).parent / "helpers" / "redness.py"
FAMILIES = {"mmada": (mmada, make_mmada, None), "showo": (showo, make_showo, None), "lumina_dimoo": (lumina_dimoo, make_dimoo, (16, 16))}
PROMPTS = [Prompt("a", "a red circle"), Prompt("b", "two small blue squares to the left of a star")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_mmada(tmp_path_factory.mktemp("models") / "mmada", seed=1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("".join(f"a photo of {n} red things\n" for n in ("two", "three", "four", "five")))
    return file


def config_of(**options):
    small = {"steps": 2, "samples": 3, "prompts_per_step": 2, "lora_rank": 0, "learning_rate": 1e-3, "grad_norm": 1e9, "image_every": 0}
    return ht_grpo.Config(**{**small, "denoising_steps": 4, "micro_batch": 8, **options})


class Scene:
    """A model with its loop and a rollout of two groups of three; `gradients` runs an update of these options and keeps its gradients."""

    def __init__(self, checkpoint, run, **options):
        self.config = config_of(**options)
        self.model = mmada.load(checkpoint)
        self.loop = Loop(self.config, self.model, run)
        policy = ht_grpo.policy_of(self.config, self.model)
        self.rollout = masked.make_rollout(self.model, self.loop, PROMPTS, 3, policy, None, 8)
        self.rank = choices.ranks(self.rollout.drawn.step_of)
        self.advantage = torch.randn(6, generator=torch.Generator().manual_seed(1))
        self.rows = [0, 0, 0, 1, 1, 1]

    def plan(self, config):
        is_structure = choices.structure(self.rank, config.alpha)
        return ht_grpo.in_context(config, self.rollout, is_structure, ht_grpo.decisions(config, self.rollout, is_structure, self.loop))

    def gradients(self, config, plan=None, credit=None):
        found = []
        self.loop.update = lambda: (
            found.append({name: value.grad.clone() for name, value in self.loop.parameters.items()}) or self.loop.optimizer.zero_grad()
        )
        masked.update(self.model, self.loop, self.rollout, self.advantage, plan or self.plan(config), ht_grpo.how(config), credit)
        return found

    def expected(self, value):
        self.loop.optimizer.zero_grad()
        value.backward()
        found = {name: parameter.grad.clone() for name, parameter in self.loop.parameters.items()}
        self.loop.optimizer.zero_grad()
        return found


@pytest.fixture
def scene(checkpoint, tmp_path):
    return Scene(checkpoint, tmp_path / "run")


def assert_close(one, other, atol=2e-6):
    assert one.keys() == other.keys() and max(float(value.abs().max()) for value in other.values()) > 1e-3
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < atol


# The objective


def test_the_gradient_is_that_of_equation_2_in_the_hidden_state(scene):
    """At the old policy: mean over samples of the mean over the subset of A w grad log p; whatever the micro-batch."""
    config = config_of(beta=0.0)
    plan, is_structure = scene.plan(config), choices.structure(scene.rank, 0.3)
    credit = choices.credit(is_structure, 1.5, 0.5, False)
    found = scene.gradients(config, plan, credit)
    assert [one.stage for one in plan.updates] == ["global"] * 2 + ["structure"] * 4 + ["refinement"] * 2 and len(found) == 8
    everything = torch.ones_like(is_structure)
    repeated = scene.rollout.encoded.select(scene.rows)
    for number in (0, 3, 7):
        said = scene.model.log_prob_given(repeated, scene.rollout.drawn, everything, which="cond")
        tokens = plan.updates[number].tokens
        mean = (said * credit * tokens).sum(1) / tokens.sum(1).clamp(min=1)
        assert_close(found[number], scene.expected(-(mean * scene.advantage).mean()))
    again = scene.gradients(replace(config, micro_batch=1), plan, credit)
    assert_close(again[2], found[2])


def test_ratios_with_recorded_states_are_the_samplers_own(scene):
    config = config_of(method="trace_grpo", beta=0.0, log_prob="guided", updates=1)
    plan = scene.plan(config)
    assert len(plan.contexts) == 4 and sum(int(tokens.sum()) for tokens in plan.updates[0].scored.values()) == 6 * 16
    said = scene.model.log_prob(scene.rollout.encoded.select(scene.rows), scene.rollout.drawn)
    assert torch.allclose(said, scene.rollout.drawn.log_prob, atol=1e-5)
    (found,) = scene.gradients(config)
    assert_close(found, scene.expected(-(said.mean(1) * scene.advantage).mean()), atol=1e-5)


def test_shared_states_have_the_tokens_of_several_steps(scene):
    config = config_of(method="trace_grpo", shrink=2)
    plan = scene.plan(config)
    assert len(plan.contexts) == 2 and torch.equal(plan.updates[0].tokens, torch.ones(6, 16, dtype=torch.bool))
    assert plan.contexts["state 0"].all() and not plan.contexts["state 1"].all()


def test_one_ratio_of_a_sample_is_of_its_mean_log_probability(scene):
    config = config_of(method="uni_grpo", beta=0.0, updates=2)
    plan = scene.plan(config)
    found = scene.gradients(config, plan)
    tokens = plan.updates[1].tokens
    said = scene.model.log_prob_given(scene.rollout.encoded.select(scene.rows), scene.rollout.drawn, tokens, which="cond")
    assert_close(found[1], scene.expected(-((said.sum(1) / tokens.sum(1)) * scene.advantage).mean()))


def test_mask_grpo_takes_the_mean_of_all_tokens_and_the_rest_is_seen(scene):
    config = config_of(method="mask_grpo", beta=0.0)
    plan = scene.plan(config)
    assert len(plan.updates) == 6 and torch.equal(plan.contexts["update 2"], plan.updates[2].tokens)
    found = scene.gradients(config, plan)
    tokens = plan.updates[2].tokens
    said = scene.model.log_prob_given(scene.rollout.encoded.select(scene.rows), scene.rollout.drawn, tokens, which="cond")
    assert_close(found[2], scene.expected(-(said * tokens * scene.advantage[:, None]).sum() / tokens.sum()))


def test_revealed_structure_is_seen_by_the_rest_alone(scene):
    config = config_of(context="structure", beta=0.0)
    plan, is_structure = scene.plan(config), choices.structure(scene.rank, 0.3)
    assert plan.contexts["blank"] is None and torch.equal(plan.contexts["structure"], ~is_structure)
    first = plan.updates[0].scored
    assert torch.equal(first["blank"], is_structure) and torch.equal(first["structure"], ~is_structure)


def test_the_kl_to_the_reference_pulls_back(scene):
    with torch.no_grad():
        for number, value in enumerate(scene.loop.parameters.values()):
            value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number)))
    seen = []
    scene.advantage = torch.zeros(6)
    config = config_of(beta=1.0)
    for _ in range(2):
        masked.update(scene.model, scene.loop, scene.rollout, scene.advantage, scene.plan(config), ht_grpo.how(config))
        seen.append(scene.loop._figures["kl"])
    assert seen[0] > seen[1] > 0


def test_a_ratio_beyond_the_clip_has_no_gradient(scene):
    config = config_of(beta=0.0, clip_low=1e-9, clip_high=1e-9)
    masked.update(scene.model, scene.loop, scene.rollout, scene.advantage, scene.plan(config), ht_grpo.how(config))
    figures = scene.loop._figures
    assert figures["ratio_deviation"] < 1e-6 and figures["clipped/structure"] > 0.3 and figures["clipped/refinement"] > 0.3


# What it costs


def test_the_hidden_state_is_computed_once_for_a_prompt_and_the_output_layer_where_it_is_needed(scene, monkeypatch):
    calls = []
    branch = scene.model._branch
    monkeypatch.setattr(
        scene.model, "_branch", lambda ids, mask, codes, slots: calls.append(slots.shape) or branch(ids, mask, codes, slots)
    )
    config = config_of()
    plan = scene.plan(config)
    scene.gradients(config, plan)
    assert [shape[0] for shape in calls] == [2] * 10, "old, reference and eight updates: two prompts each, not six samples"
    needed = [int(one.tokens.view(2, 3, 16).any(1).sum(1).max()) for one in plan.updates]
    assert [shape[1] for shape in calls] == [16, 16, *needed] and min(needed) < 12
    calls.clear()
    scene.gradients(config_of(method="mask_grpo"))
    assert [shape[0] for shape in calls] == [6] * 18


# Choices


def test_every_method_has_its_own_choices_and_shows_them():
    found = {method: ht_grpo.Config(method=method) for method in ht_grpo.OWN}
    assert [(one.decisions, one.context, one.credit, one.updates, one.level) for one in found.values()] == [
        ("stages", "blank", (1.5, 0.5), 8, "token"),
        ("remasked", "visible", (1.0, 1.0), 6, "token"),
        ("remasked", "visible", (1.0, 1.0), 8, "sequence"),
        ("all", "trajectory", (1.0, 1.0), 8, "token"),
    ]
    assert (
        found["mask_grpo"].order == "random" and found["mask_grpo"].denoising_steps == 12 and found["mask_grpo"].reduction == "token_mean"
    )
    paper = found["ht_grpo"]
    assert (paper.samples, paper.guidance, paper.alpha, paper.budget, paper.beta) == (9, 4.5, 0.3, (2, 4, 2), 0.01)
    mixed = ht_grpo.Config(method="mask_grpo", context="blank", updates=3)
    assert (mixed.decisions, mixed.context, mixed.updates) == ("remasked", "blank", 3) and replace(mixed, seed=1).context == "blank"


@pytest.mark.parametrize("order", list(itertools.permutations(choices.STAGES)))
def test_stages_follow_any_order(scene, order):
    plan = scene.plan(config_of(stage_order=order, rate_mode=("constant",), rate_max=(0.75,)))
    budget = dict(zip(choices.STAGES, (2, 4, 2), strict=True))
    assert [one.stage for one in plan.updates] == [stage for stage in order for _ in range(budget[stage])]
    is_structure = choices.structure(scene.rank, 0.3)
    for one in plan.updates:
        assert one.stage == "global" or not (one.tokens & (is_structure if one.stage == "refinement" else ~is_structure)).any()


def test_rates_may_differ_by_stage_and_subsets_by_update(scene):
    plan = scene.plan(config_of(rate_min=(1.0, 0.0, 0.5), subset="fixed"))
    sizes = [one.tokens.sum(1).tolist() for one in plan.updates]
    assert sizes == [[16] * 6, [16] * 6, [4] * 6, [3] * 6, [1] * 6, [0] * 6, [12] * 6, [6] * 6]
    assert torch.equal(plan.updates[3].tokens, scene.plan(config_of(rate_min=(1.0, 0.0, 0.5), subset="fixed")).updates[3].tokens)
    scene.loop.step += 1
    assert not torch.equal(plan.updates[3].tokens, scene.plan(config_of(rate_min=(1.0, 0.0, 0.5), subset="fixed")).updates[3].tokens)


def test_permuted_ranks_keep_their_number_and_lose_their_place(scene):
    rank = ht_grpo.ranks(config_of(ranks="permuted"), scene.rollout, scene.loop)
    assert torch.equal(rank.sort(1).values, scene.rank.sort(1).values) and not torch.equal(rank, scene.rank)
    assert torch.equal(ht_grpo.ranks(config_of(), scene.rollout, scene.loop), scene.rank)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 1}, "at least two"),
        ({"stage_order": ("global", "global", "refinement")}, "names each"),
        ({"rate_max": (1.0, 0.5)}, "one value, or one each"),
        ({"rate_min": (1.5,)}, "between 0 and 1"),
        ({"updates": 3}, "8 updates by their budget"),
        ({"budget": (0, 0, 0)}, "one update is the least"),
        ({"method": "uni_grpo", "credit": (1.5, 0.5)}, "equal credit"),
        ({"method": "trace_grpo", "level": "sequence"}, "one context"),
        ({"compat": "upstream"}, "no public code"),
    ],
)
def test_wrong_options_are_sentences(options, words):
    with pytest.raises(ValueError, match=words):
        ht_grpo.Config(**options)


def test_upstream_rows_are_of_one_length_and_padding_is_seen(scene):
    seen = ht_grpo.with_padding(scene.model, scene.rollout)
    assert seen.encoded.ids.shape == (2, 513 + 16 + 2) and seen.encoded.mask.all()
    everything = torch.ones(6, 16, dtype=torch.bool)
    wide, own = (
        scene.model.log_prob_given(rollout.encoded.select(scene.rows), scene.rollout.drawn, everything, which="cond")
        for rollout in (seen, scene.rollout)
    )
    assert (wide - own).abs().max() > 1e-3
    with pytest.raises(UsageError, match="one length"):
        ht_grpo.with_padding(SimpleNamespace(family="lumina_dimoo"), scene.rollout)


# Runs


@pytest.mark.parametrize("method", list(ht_grpo.OWN))
def test_it_learns_what_is_rewarded(method, checkpoint, tmp_path):
    """A picture is as red as its codes are high: within ten rollouts of 2 x 8 pictures the mean rises from 0.45 to 0.7."""
    options = {"samples": 8, "steps": 10, "learning_rate": 2e-3, "grad_norm": 1.0, "guidance": 1.0, "order": "surest", "beta": 0.0}
    config = config_of(method=method, updates=None if method == "ht_grpo" else 4, save_every=99, micro_batch=16, **options)
    model = mmada.load(checkpoint)
    model.decode = lambda codes: (codes / 31).view(-1, 1, 4, 4).expand(-1, 3, -1, -1)
    loop = Loop(config, model, tmp_path / "run")
    ht_grpo.train(config, model, Reward({"redness": redness.load()}, {"redness": 1.0}), PROMPTS, loop)
    found = [line["reward"] for line in lines(tmp_path / "run")]
    assert sum(found[-2:]) / 2 > found[0] + 0.15


def words(checkpoint, prompts, run, *more, steps=2):
    return [
        *("train", "ht_grpo", "--model", str(checkpoint), "--plug", str(PLUG), "--prompts", str(prompts), "--run-dir", str(run)),
        *("--reward", "redness=1", "--steps", str(steps), "--prompts-per-step", "2", "--samples", "3", "--denoising-steps", "4"),
        *(
            "--lora-rank",
            "0",
            "--micro-batch",
            "8",
            "--learning-rate",
            "1e-3",
            "--save-every",
            "1",
            "--image-every",
            "0",
            "--device",
            "cpu",
            *more,
        ),
    ]


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(checkpoint, prompts, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert cli.main(words(checkpoint, prompts, run)) == 0
    return run


def test_a_run_logs_ratios_stages_and_surprise_and_moves_the_trunk(undisturbed, checkpoint):
    from safetensors.torch import load_file

    found = lines(undisturbed)
    assert [line["step"] for line in found] == [1, 2] and all(line["ratio_deviation"] < 1e-5 for line in found)
    assert {"clipped/global", "clipped/structure", "clipped/refinement", "surprise/structure", "surprise/refinement"} <= set(found[0])
    assert found[-1]["kl"] > 0 and found[0]["flat_groups"] == 0
    before, after = load_file(checkpoint / "model.safetensors"), weights(undisturbed)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    kept = json.loads((undisturbed / "run.json").read_text())["config"]
    assert kept["decisions"] == "stages" and kept["credit"] == [1.5, 0.5]


def test_a_run_continues_bit_for_bit(undisturbed, checkpoint, prompts, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(undisturbed, again)
    shutil.rmtree(again / "state" / "step-000002")
    shutil.rmtree(again / "model")
    assert cli.main(words(checkpoint, prompts, again)) == 0
    first, second = weights(undisturbed), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ht_grpo", "trace_grpo"])
def test_two_processes_do_what_one_does(method, checkpoint, prompts, tmp_path):
    """Sums are rounded in another order, and AdamW makes of a rounding in a tiny gradient a share of the learning rate."""
    both, one, more = tmp_path / "both", tmp_path / "one", ("--method", method, "--learning-rate", "1e-4")
    assert cli.main(words(checkpoint, prompts, one, *more)) == 0
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmalign")
    command = [*launch, *words(checkpoint, prompts, both, *more)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    first, second, before = weights(one), weights(both), mmada.load(checkpoint).net.state_dict()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5
    assert max(float((first[name] - value).abs().max()) for name, value in renamed(before, to_llama=False).items()) > 3e-4


@pytest.mark.parametrize(
    "more",
    [
        ("--method", "mask_grpo", "--compat", "upstream", "--lora-rank", "4"),
        ("--method", "uni_grpo", "--updates", "2"),
        ("--method", "trace_grpo", "--compat", "upstream", "--updates", "1", "--shrink", "2"),
        ("--context", "structure", "--ranks", "permuted", "--unit-mean", "--image-every", "1", "--log-prob", "guided"),
    ],
)
def test_other_choices_run(more, checkpoint, prompts, tmp_path):
    run = tmp_path / "run"
    assert cli.main(words(checkpoint, prompts, run, *more, steps=1)) == 0
    line = lines(run)[-1]
    assert line["grad_norm"] > 0 and line["ratio_deviation"] < 1e-5
    assert ("--image-every" in more) == (run / "rollouts").is_dir()


@pytest.mark.parametrize("family", ["showo", "lumina_dimoo"])
def test_other_families_are_trained(family, prompts, tmp_path):
    _, make, size = FAMILIES[family]
    more = () if size is None else ("--set", "ht_grpo.size=16,16")
    assert cli.main(words(make(tmp_path / family, seed=2), prompts, tmp_path / "run", *more, steps=1)) == 0
    assert lines(tmp_path / "run")[-1]["grad_norm"] > 0


def test_a_model_without_hidden_tokens_is_refused(prompts, tmp_path, capsys):
    from mmalign.testbed.tiny import make_janus

    assert cli.main(words(make_janus(tmp_path / "janus"), prompts, tmp_path / "run")) == 2
    assert "hidden image tokens" in capsys.readouterr().err


def test_the_guidance_is_the_papers():
    assert ht_grpo.policy_of(ht_grpo.Config(), None) == Policy(4.5)
