"""Measurements on flow rollouts and on GvU runs, where the answer is known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from mmalign.leaderboards.measures import densegrpo_model, gvu_training

from mmalign.types import MmalignError


def test_ranks_with_ties():
    a = np.array([0.1, 0.5, 0.5, 0.9])
    assert densegrpo_model.spearman(a, a**3) == pytest.approx(1.0) and densegrpo_model.spearman(a, -a) == pytest.approx(-1.0)
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5 of variances 4.5 and 5.
    assert densegrpo_model.spearman(a, np.arange(4.0)) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_balance_leaves_the_last_step_out():
    gains = np.array([[1.0, -1, 1], [1, 1, 1], [1, -1, 1], [1, 1, 1]])
    assert densegrpo_model.imbalance(gains) == pytest.approx((0.5 + 0.0) / 2)


def test_credit_of_a_planted_step():
    found = densegrpo_model.planted_step(0)
    assert found["terminal"] == pytest.approx(0.1), "one reward at every step"
    assert found["gain"] > 0.5 > found["latent"] > found["terminal"]


def test_a_rollout_of_a_flow_model_is_measured_from_its_own_rewards(monkeypatch):
    """Rewards that fall by the level at every late step, and completions that come closer with n."""
    steps = densegrpo_model.STEPS

    def rewards(drawn, name, reward, n=0):
        rising = np.linspace(0.5, 1.5, steps + 1)[None].repeat(4, 0) * np.arange(1, 5)[:, None]
        return rising + (1 / n if n else 0.0)

    monkeypatch.setattr(densegrpo_model, "draw", lambda seed, levels, noise, pictures, name: levels)
    monkeypatch.setattr(densegrpo_model, "state_rewards", rewards)
    densegrpo_model.rewarded.cache_clear()
    levels = densegrpo_model.noise_levels(0, 4, "none")
    assert levels["late positive 0.5"] == 1.0 and levels["early spread 0.5"] == pytest.approx(np.std([0.1, 0.2, 0.3, 0.4]))
    assert densegrpo_model.ranking(0, 4, "none")["rank correlation at step 3"] == pytest.approx(1.0)
    assert densegrpo_model.ranking(0, 4, "none")["difference at step 9"] == pytest.approx(0.25)
    found = densegrpo_model.ode_steps(0, 4, "none")
    assert [found[f"error n={n}"] for n in (1, 2, 4)] == pytest.approx([1.0, 0.5, 0.25])
    densegrpo_model.rewarded.cache_clear()


def test_a_run_of_gvu_is_read_from_its_results(tmp_path, monkeypatch):
    kinds = sorted({kind for group in gvu_training.KINDS.values() for kind in group})

    def run(words, **_):
        place = dict(zip(words, words[1:], strict=False))
        folder = tmp_path / "run-3-60"
        assert place["--run-dir"] == str(folder) and place["--seed"] == "3" and place["--then-eval"] == "shapes"
        for name, strict, of_kind in (("tiny-janus", 0.4, 0.2), (folder.name, 0.5, 0.3)):
            results = tmp_path / "results" / name / "shapes"
            results.mkdir(parents=True)
            metrics = {"strict": {"value": strict}, **{kind: {"value": of_kind + ("count" in kind) * 0.1} for kind in kinds}}
            (results / "1.json").write_text(json.dumps({"metrics": metrics}))
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "reward": float(n)}) + "\n" for n in range(20)))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(gvu_training, "scratch", lambda: tmp_path)
    monkeypatch.setattr(gvu_training.subprocess, "run", run)
    monkeypatch.setattr(gvu_training, "model", lambda name: 0.9 if name == "tiny-janus" else 0.8)
    monkeypatch.setattr(gvu_training, "caption_ranking", lambda made, pairs, seed: made)
    found = gvu_training.trained(3)
    assert (found["base"], found["trained"], found["captions before"], found["captions after"]) == (0.4, 0.5, 0.9, 0.8)
    assert found["gain on dense"] == pytest.approx(0.1) and (found["first reward"], found["last reward"]) == (4.5, 14.5)
    monkeypatch.setattr(gvu_training.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=2, stderr="No such model."))
    with pytest.raises(MmalignError, match="ended with 2: No such model"):
        gvu_training.trained(4)
