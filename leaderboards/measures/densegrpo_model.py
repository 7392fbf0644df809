"""DenseGRPO's claims about one rollout of a flow model: noise and balance, how exact and how costly the rewards of its states are, and
which steps get the credit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from mmalign.leaderboards.measures.dense_reward import clip
from mmalign.leaderboards.measures.gvu import model
from mmalign.trainers._calibration import Calibration, calibrate
from mmalign.trainers.flow_grpo import Credit, step_rewards
from torch import Tensor

from mmalign import sde
from mmalign.scorers import shapes
from mmalign.testbed.world import KINDS, sample_prompts, text_of
from mmalign.trajectory import Policy, Prompts, Trajectory
from mmalign.types import Prompt, Request, Sample, Scorer

STEPS = 10
EDGE = 3  # steps that "early" and "late" speak of; the last of all is left out, whose noise is tiny
GUIDANCE = 2.5  # tiny-sd3's own


@dataclass(frozen=True)
class Drawn:
    """One trajectory for each prompt."""

    prompts: list[Prompt]
    encoded: Prompts
    path: Trajectory


@torch.no_grad()
def draw(seed: int, levels: tuple[float, ...], noise: sde.Noise, pictures: int, name: str) -> Drawn:
    """Pictures of as many training prompts by the stochastic sampler."""
    stream = sample_prompts("train", KINDS, 60_000_000 + seed)
    asked = [clauses for (_, clauses, _), _ in zip(stream, range(pictures), strict=False)]
    prompts = [Prompt(str(n), text_of(one), meta={"include": [vars(clause) for clause in one]}) for n, one in enumerate(asked)]
    encoded = model(name).encode_prompts([prompt.text for prompt in prompts])
    seeds = [seed * 1_000_003 + n for n in range(pictures)]
    return Drawn(prompts, encoded, model(name).sample(encoded, Policy(GUIDANCE, noise=noise, levels=levels), seeds))


def state_rewards(drawn: Drawn, name: str, reward: str, n: int = 0) -> np.ndarray:
    """[B, K + 1] rewards of the pictures that n deterministic steps make of every state (0: all that remain)."""
    latents_BS = model(name).complete(drawn.encoded, drawn.path, n)
    pictures = model(name).pictures(latents_BS.flatten(0, 1))
    asked = [prompt for prompt in drawn.prompts for _ in range(latents_BS.shape[1])]
    scores = judge(reward).score([Sample(Request(prompt, 0, 0), image=one) for prompt, one in zip(asked, pictures, strict=True)])
    return np.array([getattr(score, "x", np.nan) for score in scores]).reshape(len(drawn.prompts), -1)


def judge(reward: str) -> Scorer:
    """`facts`: the share of right facts, which small changes of a picture do not move. `clip`: tiny-clip's cosine, which they do."""
    return shapes.load(shapes.Config()) if reward == "facts" else clip()


@cache
def rewarded(seed: int, level: float, pictures: int, name: str, reward: str) -> tuple[Drawn, np.ndarray]:
    """A rollout with Flow-GRPO's noise at one level, and the rewards of its states."""
    drawn = draw(seed, (level,) * STEPS, "flow", pictures, name)
    return drawn, state_rewards(drawn, name, reward)


def noise_levels(seed: int, pictures: int = 64, name: str = "tiny-sd3") -> dict[str, float]:
    """By level a, of tiny-clip's cosine: the share of positive gains over late steps, and the gains' standard deviation over early ones."""
    found = {}
    for level in (0.5, 0.7, 0.8):
        gains_BK = np.diff(rewarded(seed, level, pictures, name, "clip")[1], axis=1)[:, :-1]
        found[f"late positive {level}"] = float((gains_BK[:, -EDGE:] > 0).mean())
        found[f"early spread {level}"] = float(gains_BK[:, :EDGE].std(axis=0).mean())
    return found


def calibrated_noise(seed: int, pictures: int = 96, iterations: int = 30, name: str = "tiny-sd3") -> dict[str, float]:
    """Distance of the share of positive gains from a half, mean over steps, for uniform noise 0.7 and for psi after Algorithm 1 with N = 24
    and completions of one step, and psi's drift per iteration over its last half, in units of its change. Of tiny-clip's cosine."""
    times = model(name).layout.times(STEPS, model(name).layout.shape(model(name).size)).tolist()
    start = [float(sde.coefficients(before, after, 0.7, "flow")[3]) for before, after in times]

    def counts(levels: tuple[float, ...], iteration: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = draw(1000 * (seed + 1) + iteration, levels, "constant", 24, name)
        gains_BK = np.diff(state_rewards(drawn, name, "clip", 1), axis=1)
        return (gains_BK > 0).sum(0), (gains_BK < 0).sum(0)

    psi = calibrate(start, counts, Calibration(iterations=iterations))
    calibrated = state_rewards(draw(seed, psi.levels, "constant", pictures, name), name, "clip")
    return {
        "uniform": imbalance(np.diff(rewarded(seed, 0.7, pictures, name, "clip")[1], axis=1)),
        "calibrated": imbalance(np.diff(calibrated, axis=1)),
        "drift": float(np.mean(psi.drift)),
    }


def imbalance(gains_BK: np.ndarray) -> float:
    """Mean over steps of |share of positive gains - 1/2|; the last step, which has no noise to speak of, is left out."""
    return float(np.abs((gains_BK[:, :-1] > 0).mean(0) - 0.5).mean())


def ranking(seed: int, pictures: int = 64, name: str = "tiny-sd3") -> dict[str, float]:
    """Spearman's correlation of the states' rewards with the finished pictures', and their mean absolute difference."""
    rewards_BS = rewarded(seed, 0.7, pictures, name, "facts")[1]
    rho = [spearman(rewards_BS[:, k], rewards_BS[:, -1]) for k in range(STEPS)]
    gap = np.abs(rewards_BS[:, :-1] - rewards_BS[:, -1:]).mean(0)
    return {
        **{f"rank correlation at step {k}": rho[k] for k in (0, 3, 6, 9)},
        **{f"difference at step {k}": float(gap[k]) for k in (0, 3, 6, 9)},
    }


def ode_steps(seed: int, pictures: int = 32, name: str = "tiny-sd3") -> dict[str, float]:
    """By n: mean absolute difference of the states' rewards from those of full completions, and processor seconds of a completion."""
    drawn, full = rewarded(seed, 0.7, pictures, name, "facts")
    found = {}
    for n in (1, 2, 4, 0):
        begun = time.process_time()
        rewards_BS = state_rewards(drawn, name, "facts", n)
        found[f"seconds n={n or 't'}"] = (time.process_time() - begun) / pictures
        if n:
            found[f"error n={n}"] = float(np.abs(rewards_BS - full).mean())
    return found


def one_picture(seed: int, pictures: int = 16, name: str = "tiny-sd3") -> dict[str, float]:
    """The greatest difference between two completions of the same states, and between the sum of a trajectory's gains and R_0 - R_T."""
    drawn, rewards_BS = rewarded(seed, 0.7, pictures, name, "facts")
    again = [model(name).complete(drawn.encoded, drawn.path) for _ in range(2)]
    whole = rewards_BS[:, -1] - rewards_BS[:, 0]
    return {
        "between completions": float((again[0] - again[1]).abs().max()),
        "between sums": float(np.abs(np.diff(rewards_BS, axis=1).sum(1) - whole).max()),
    }


def planted_step(seed: int, samples: int = 24, groups: int = 40) -> dict[str, float]:
    """Where only one step of ten decides the reward: its share of a group's absolute advantages, by the kind of credit.

    The step adds 0 or 1, every step a little chance; latents walk at random towards the final ones.
    """
    stream = np.random.default_rng(seed)
    shares: dict[Credit, list[float]] = {"terminal": [], "latent": [], "similarity": [], "gain": []}
    for _ in range(groups):
        planted = int(stream.integers(STEPS))
        gains_BK = 0.05 * stream.standard_normal((samples, STEPS))
        gains_BK[:, planted] += stream.integers(0, 2, samples)
        rewards_BS = np.concatenate([np.zeros((samples, 1)), gains_BK.cumsum(1)], 1)
        path = torch.from_numpy(stream.standard_normal((samples, STEPS + 1, 16)).cumsum(1))
        walk = walked(path)
        for credit, found in shares.items():
            credit_BK = step_rewards(rewards_BS, walk, credit)
            size_K = np.abs(credit_BK - credit_BK.mean(0)).mean(0)
            found.append(float(size_K[planted] / size_K.sum()))
    return {credit: float(np.mean(found)) for credit, found in shares.items()}


def walked(path_BSC: Tensor) -> Trajectory:
    """States [B, S, C] as a trajectory without probabilities."""
    states, actions = path_BSC[:, :-1], path_BSC[:, 1:]
    return Trajectory("flow", actions, torch.zeros(actions.shape[:2]), Policy(1.0), tuple(range(len(actions))), states=states)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks; equal values share their mean rank."""
    ranks = [np.array([np.mean([(values < value).sum(), (values <= value).sum() - 1]) for value in values]) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])
