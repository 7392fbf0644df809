"""Experiments behind claims: rules on paired numbers, runs that continue, and measurements with known answers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from mmalign.leaderboards import experiments, verdict_report, verdicts
from mmalign.leaderboards.experiments import Values
from mmalign.leaderboards.measures import dense_reward, densegrpo, gvu, htgrpo
from mmalign.leaderboards.verdicts import Claim

from mmalign import cli
from mmalign.types import MmalignError

ROOT = Path(__file__).parent.parent
NEVER = float("inf")


def claim(**experiment) -> Claim:
    return Claim(0, "made-up", "across", "", experiment={"measure": "htgrpo.contamination", **experiment})


def answer(rule: dict, *seeds: dict[str, float]) -> str:
    made = claim(rules=[rule], seeds=len(seeds))
    return experiments.judge(made, Values(dict(enumerate(seeds)), 0.0)).answer


def test_an_order_is_judged_on_differences_of_the_same_seed():
    """The arms vary far more than they differ: only pairs show the order."""
    paired = [{"a": level + 0.1 + 0.01 * n, "b": level} for n, level in enumerate((0, 5, -3, 8))]
    assert answer({"order": ["a", "b"]}, *paired) == "agrees"
    assert answer({"order": ["b", "a"]}, *paired) == "opposite"
    mixed = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": 0.2, "b": 0.1}]
    assert answer({"order": ["a", "b"]}, *mixed) == "not resolved"
    assert answer({"order": ["a", "b", "c"]}, *({**one, "c": one["b"] + 1} for one in paired)) == "opposite", "the weakest pair decides"


def test_the_interval_is_students():
    (one,) = experiments.judge(
        claim(rules=[{"above": {"a": 0}}], seeds=3), Values({n: {"a": v} for n, v in enumerate((1, 2, 3))}, 0)
    ).comparisons
    half = 4.302653 / 3**0.5  # t of two degrees of freedom times the standard deviation 1
    assert (one.low, one.high) == pytest.approx((2 - half, 2 + half), abs=1e-5)


def test_levels_equivalence_and_single_seeds():
    seeds = [{"a": 0.50, "b": 0.49}, {"a": 0.51, "b": 0.52}, {"a": 0.49, "b": 0.49}]
    assert answer({"same": ["a", "b"], "margin": 0.1}, *seeds) == "agrees"
    assert answer({"same": ["a", "b"], "margin": 0.02}, *seeds) == "not resolved"
    far = [{"a": one["a"], "b": one["b"] - 1} for one in seeds]
    assert answer({"same": ["a", "b"], "margin": 0.1}, *far) == "opposite"
    assert answer({"below": {"a": 0.6}}, *seeds) == "agrees" and answer({"above": {"a": 0.6}}, *seeds) == "opposite"
    assert answer({"never_below": {"a": 0.48}}, *seeds) == "agrees" and answer({"never_below": {"a": 0.495}}, *seeds) == "opposite"
    with pytest.raises(MmalignError, match="a rule needs one of order, above"):
        answer({"highest": "a"}, *seeds)


def test_a_run_stops_when_time_is_over_and_continues(tmp_path, monkeypatch):
    made, asked = claim(rules=[{"above": {"seen of 1": 0}}], seeds=3, options={"draws": 10}), []

    def counted(seed, draws):
        asked.append(seed)
        return {"seen of 1": 0.5 + seed / 10}

    monkeypatch.setattr(htgrpo, "contamination", counted)
    assert experiments.run(made, tmp_path, 0.0, print) is None and asked == []
    clock = iter([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 9.0, 9.0])
    monkeypatch.setattr(experiments.time, "monotonic", lambda: next(clock))
    assert experiments.run(made, tmp_path, 5.0, print) is None and asked == [0, 1]
    monkeypatch.setattr(experiments.time, "monotonic", time.perf_counter)
    found = experiments.run(made, tmp_path, NEVER, print)
    assert asked == [0, 1, 2] and found.by_seed == {0: {"seen of 1": 0.5}, 1: {"seen of 1": 0.6}, 2: {"seen of 1": 0.7}}
    experiments.run(made, tmp_path, NEVER, print)
    assert asked == [0, 1, 2], "what is known is not measured again"
    experiments.run(claim(rules=[{"below": {"seen of 1": 1}}], seeds=2, options={"draws": 10}), tmp_path, NEVER, print)
    assert asked == [0, 1, 2], "another rule asks for no other numbers"
    experiments.run(claim(rules=[{"above": {"seen of 1": 0}}], seeds=1, options={"draws": 11}), tmp_path, NEVER, print)
    assert asked == [0, 1, 2, 0], "other options do"


def test_entries_that_are_no_experiments_are_named():
    with pytest.raises(MmalignError, match="'made-up' cannot be read"):
        experiments.of(claim(rules=[], seed=5))
    with pytest.raises(MmalignError, match="needs `measure` or `train`"):
        experiments.of(claim(rules=[], train={"a": "gvu"}))


def test_every_experiment_of_the_claims_names_a_function_or_arms_and_arms_that_exist():
    for made in verdicts.load().values():
        if made.experiment:
            experiment = experiments.of(made)
            arms = {
                arm for rule in experiment.rules for key in ("order", "above", "below", "same", "never_below") for arm in rule.get(key, ())
            }
            module, _, name = experiment.measure.partition(".")
            assert arms and (
                experiment.train.keys() >= arms
                or callable(getattr(__import__(f"mmalign.leaderboards.measures.{module}", fromlist=["x"]), name))
            )


def test_the_verb_runs_experiments_within_a_budget(tmp_path, capsys):
    folder = str(tmp_path / "claims")
    assert cli.main(["claims", "run", "context-lowers-entropy", "--out", folder]) == 2
    assert "Give them time with --budget MINUTES" in capsys.readouterr().err
    assert cli.main(["claims", "run", "57", "context-lowers-entropy", "--budget", "2", "--out", folder]) == 0
    out = capsys.readouterr().out
    assert "sampler-keeps-the-marginals, seed 4: 10 steps" in out and "2 claims: 2 agree" in out
    kept = json.loads((tmp_path / "claims" / "context-lowers-entropy.testbed.json").read_text())
    assert (
        kept["evidence"] == "testbed"
        and kept["seeds"] == 5
        and kept["command"].startswith("mmalign claims run context-lowers-entropy --budget")
    )
    assert cli.main(["claims", "report", "--out", folder]) == 0


def test_committed_verdicts_follow_from_committed_numbers():
    folder = ROOT / "results" / "claims"
    kept = [verdict for verdict in verdict_report.read(folder) if verdict["evidence"] == "testbed"]
    assert len(kept) >= 42
    for verdict in kept:
        made = verdicts.load()[verdict["name"]]
        values = experiments.read(made, folder)
        assert verdict_report.content(experiments.judge(made, values)) == verdict, f"run `{verdict['command']}`"


# -- measurements whose answer is known ---------------------------------------------------------------------------------------------------


def test_the_sampler_on_a_gaussian_and_the_enumerated_world():
    assert densegrpo.marginals(1, samples=4000)["160 steps"] < 0.05
    found = htgrpo.contamination(0, draws=4000)
    assert found["seen of 4"] == pytest.approx(found["formula of 4"], abs=0.03)
    pictures, joint = htgrpo._world(3)
    everything = htgrpo._entropies(pictures, joint, tuple(range(9)))
    assert everything.abs().max() < 1e-12, "nothing is uncertain when all is seen"


def test_gaps_and_flips_of_a_group():
    reward = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert dense_reward._flips(reward, reward) == 0 and dense_reward._flips(-reward, reward) == pytest.approx(12 / 16)
    assert dense_reward._gap(reward, reward) == pytest.approx(2 / float(reward.std()))


def test_a_wrong_colour_has_less_reward():
    found = gvu.removed_words(7, pictures=16)
    assert found["wrong color"] < 0.8 and found["wrong region"] < 0.9
    assert found["no color, no region"] < found["no color"]
