"""Flow-GRPO and DenseGRPO: policy gradients on the steps of a denoiser, each credited with the reward it earned itself.

Papers: Flow-GRPO (arXiv 2505.05470; yifan123/flow_grpo ac4c86e), DenseGRPO (arXiv 2601.20218; no public code). An SDE with the ODE's
marginals samples a group per prompt; every step is a Gaussian, so its ratio is known. What a step is credited with is `credit`:

    terminal     R_0, the finished picture's reward, at every step: Flow-GRPO
    gain         R_(t-1) - R_t, with R_t the reward of the picture that deterministic steps make of x_t: DenseGRPO, eq. 7-10
    latent       R_(t-1), the control of DenseGRPO's Figure 6
    similarity   R_0, shared among the steps by how much closer each brought the latents to the final ones: the CoCA baseline. Its formula
                 is not in the paper; here shares are the rises of the cosine to x_0, negative ones 0, divided by their sum, times K

and how much noise a step gets is `noise`: `flow` (Flow-GRPO), `constant` (DanceGRPO), `coefficient` (Flow-CPS), `calibrated` (psi(t) of
DenseGRPO, found before training and kept in calibration.json of the run). Models that predict noise take their steps by DDIM, with the
level as eta. The fast variants are options: `window` steps with noise among deterministic ones, noise=coefficient, clip 1e-5, beta 0.
Changed: KL and clipping are means over all decisions of an update, and a failed reward leaves its sample's decisions out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from mmalign.trainers import _flow as flow
from mmalign.trainers._calibration import Calibrated, Calibration, calibrate

from mmalign import distributed, grpo, history, sde
from mmalign.loop import Loop, LoopConfig
from mmalign.reward import Reward
from mmalign.trajectory import Policy, Trajectory, Which
from mmalign.types import Prompt, UsageError, digest

REWARD = "pickscore=1"
CALIBRATION = "calibration.json"
GROUP_SHOWN = 8  # pictures of a group that are kept to be looked at

Credit = Literal["terminal", "gain", "latent", "similarity"]


@dataclass(frozen=True)
class Config(LoopConfig):
    """Flow-GRPO's values (config/grpo.py there), which DenseGRPO shares (its section 5.1 and Appendix A)."""

    steps: int = 4500
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    lora_rank: int = 32
    lora_alpha: int = 64
    ema: float = 0.987  # the official 0.9 every 8 updates, as one factor per update
    parts: tuple[str, ...] = ("attention",)
    prompts_per_step: int = 6  # P, over all processes: 144 samples an update
    samples: int = 24  # G
    denoising_steps: int = 10  # K
    guidance: float = 4.5
    size: tuple[int, int] | None = None  # height and width in pixels; None: the model's own (the papers: 512 x 512)
    credit: Credit = "terminal"
    ode_steps: int = 0  # n of DenseGRPO's eq. 8; 0: n = t, one per step that remains
    noise: Literal["flow", "constant", "coefficient", "calibrated"] = "flow"
    noise_level: float = 0.7
    window: int = 0  # steps with noise, at a place drawn for each update; 0: all
    window_end: int = 5  # the window lies before this step
    timestep_fraction: float = 0.99  # of the steps that are trained, from the first: of 10 the last is left out, whose noise is tiny
    log_prob: Which = "guided_detach_uncond"
    inner_epochs: int = 1
    clip_low: float = 1e-4
    clip_high: float = 1e-4
    beta: float = 0.04
    kl: Literal["gaussian", "gaussian_nodt", "k1", "k2", "k3"] = "gaussian_nodt"
    ddof: int = 0
    epsilon: float = 1e-4
    scope: grpo.Scope = "batch"  # one spread for all prompts, means by prompt
    limit: float | None = 5.0  # of advantages
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"a group needs at least two samples to compare, got samples={self.samples}")
        if not (self.denoising_steps >= 1 and 0 < self.timestep_fraction <= 1 and int(self.denoising_steps * self.timestep_fraction)):
            raise ValueError("denoising_steps and timestep_fraction leave no step to train")
        if self.window and not 0 < self.window <= self.window_end <= self.denoising_steps:
            raise ValueError(f"a window of {self.window} steps before step {self.window_end} does not fit into {self.denoising_steps}")
        if self.noise_level <= 0:
            raise ValueError("noise_level must be positive: without noise there is nothing to choose between")
        if self.ode_steps < 0:
            raise ValueError("ode_steps is the number of completion steps, or 0 for all that remain")


def train(config: Config, model: Any, reward: Reward, prompts: Sequence[Prompt], loop: Loop) -> None:
    if not hasattr(model, "complete"):
        raise UsageError(f"flow_grpo trains models that denoise in steps; the family {model.family} does not. Try t2i_r1.")
    rule, levels = noise(config, model, reward, prompts, loop)
    estimate: grpo.KLForm = "k3" if config.kl == "gaussian" or config.kl == "gaussian_nodt" else config.kl
    objective = grpo.Objective(config.clip_low, config.clip_high, config.beta, estimate)
    how = flow.Update(objective, config.kl, config.log_prob, config.inner_epochs, config.micro_batch)
    advantage_rule = grpo.AdvantageRule(config.ddof, config.epsilon, config.scope, limit=config.limit)
    for _ in loop.steps():
        policy = Policy(config.guidance, noise=rule, levels=windowed(levels, config, loop.step))
        chosen = loop.draw(prompts, config.prompts_per_step)
        with loop.timer("rollout"):
            rows = [prompt for prompt in chosen for _ in range(config.samples)]
            rollout = flow.make_rollout(model, loop, rows, policy, loop.seeds(chosen, config.samples), config.size)
        with loop.timer("reward"):
            scored = flow.reward_states(model, loop, rollout, reward, completion(config))
        advantage_BK = flow.advantages(step_rewards(scored.total, rollout.drawn, config.credit), config.samples, advantage_rule)
        flow.update(model, loop, rollout, advantage_BK, trained_steps(policy.levels, config), how)
        flow.log_rewards(loop, scored, config.samples)
        if loop.shows:
            keep_gains(loop, scored, config.samples, chosen[0].text)
            totals = [f"reward {total:.3f}" if ok else "no reward" for total, ok in zip(scored.final.total, scored.final.ok, strict=True)]
            shown = min(config.samples, GROUP_SHOWN)
            loop.keep("rollouts", list(zip(scored.pictures[:shown], totals[:shown], strict=True)), chosen[0].text)


def keep_gains(loop: Loop, scored: flow.StateRewards, samples: int, title: str) -> None:
    """The first group's gains, where every state has a reward: the report draws them as one line per trajectory."""
    if distributed.rank() == 0 and scored.total.shape[1] > 1:
        history.write_gains(loop.run, loop.step + 1, title, np.diff(scored.total[:samples], axis=1).round(6).tolist())


def completion(config: Config) -> int | None:
    """Deterministic steps of a completion, or None where no state but the last is rewarded."""
    return config.ode_steps if config.credit in ("gain", "latent") else None


def step_rewards(total_BS: np.ndarray, drawn: Trajectory, credit: Credit) -> np.ndarray:
    """[B, K] what each step is credited with, from rewards of all K + 1 states (gain, latent) or of the final one alone."""
    n_steps = drawn.actions.shape[1]
    match credit:
        case "gain":
            return np.diff(total_BS, axis=1)
        case "latent":
            return total_BS[:, 1:]
        case "terminal":
            return np.repeat(total_BS[:, -1:], n_steps, axis=1)
        case "similarity":
            return total_BS[:, -1:] * similarity_shares(drawn)


def similarity_shares(drawn: Trajectory) -> np.ndarray:
    """[B, K] shares with mean 1: the rise of the latents' cosine to the final ones at each step; equal shares where nothing rises."""
    assert drawn.states is not None
    path = torch.cat([drawn.states[:, :1], drawn.actions], 1).flatten(2).double()
    nearness = torch.nn.functional.cosine_similarity(path, path[:, -1:], dim=-1)
    rises = nearness.diff(dim=1).clamp(min=0)
    whole = rises.sum(1, keepdim=True)
    shares = torch.where(whole > 0, rises / whole.clamp(min=1e-12), 1 / rises.shape[1])
    return (shares * rises.shape[1]).cpu().numpy()


def trained_steps(levels: Sequence[float], config: Config) -> list[int]:
    """The steps whose decisions enter the update: noisy ones within the fraction."""
    last = int(len(levels) * config.timestep_fraction)
    return [k for k, level in enumerate(levels) if level > 0 and k < last]


def windowed(levels: tuple[float, ...], config: Config, step: int) -> tuple[float, ...]:
    """The levels of one update: all, or those of a window whose place follows from (seed, step); the other steps are deterministic."""
    if not config.window:
        return levels
    first = Random(f"{config.seed}/window/{step}").randint(0, config.window_end - config.window)
    return tuple(level if first <= k < first + config.window else 0.0 for k, level in enumerate(levels))


def noise(config: Config, model: Any, reward: Reward, prompts: Sequence[Prompt], loop: Loop) -> tuple[sde.Noise, tuple[float, ...]]:
    """The rule and the level of every step."""
    is_flow = "ddim" not in model.layout.rules
    uniform = (config.noise_level,) * config.denoising_steps
    if config.noise != "calibrated":
        return (config.noise if is_flow else "ddim"), uniform
    rule: sde.Noise = "constant" if is_flow else "ddim"
    file = loop.run / CALIBRATION
    if not file.is_file():
        found = calibrated(config, model, reward, prompts, loop, rule)
        if distributed.rank() == 0:
            aside = file.with_suffix(".tmp")
            aside.write_text(json.dumps({"options": asdict(config.calibration), "rule": rule, **asdict(found)}, indent=1) + "\n")
            aside.replace(file)
        distributed.barrier()
    return rule, tuple(json.loads(file.read_text(encoding="utf-8"))["levels"])


def calibrated(config: Config, model: Any, reward: Reward, prompts: Sequence[Prompt], loop: Loop, rule: sde.Noise) -> Calibrated:
    """Algorithm 1 with this model, reward and prompts."""
    options = config.calibration
    start = [options.initial] * config.denoising_steps
    if options.start == "flow" and rule == "constant":
        times = model.layout.times(config.denoising_steps, model.layout.shape(config.size or model.size))
        start = [float(sde.coefficients(before, after, options.initial, "flow")[3]) for before, after in times.tolist()]

    def measure(levels: tuple[float, ...], iteration: int) -> tuple[np.ndarray, np.ndarray]:
        stream = Random(f"{config.seed}/calibration/{iteration}")
        rows = distributed.share([stream.choice(prompts) for _ in range(options.trajectories)], "calibration trajectories")
        first = distributed.rank() * len(rows)
        seeds = [int(digest(config.seed, "calibration", iteration, first + row)[:15], 16) for row in range(len(rows))]
        rollout = flow.make_rollout(model, loop, rows, Policy(config.guidance, noise=rule, levels=levels), seeds, config.size)
        gains = np.diff(flow.reward_states(model, loop, rollout, reward, config.ode_steps).total, axis=1)
        counts = [[distributed.total(float(n)) for n in (gains > 0).sum(0)], [distributed.total(float(n)) for n in (gains < 0).sum(0)]]
        return np.array(counts[0]), np.array(counts[1])

    found = calibrate(start, measure, options)
    if loop.say:
        loop.say("psi by step  " + "  ".join(f"{level:.3f}" for level in found.levels))
        loop.say("drift        " + "  ".join(f"{value:+.2f}" for value in found.drift))
    return found
