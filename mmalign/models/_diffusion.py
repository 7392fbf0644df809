"""The loaded pipeline: prompts, sampling with a record, log-probabilities of recorded steps, completions, losses, pixels.

Legend: B samples, K denoising steps, C H W latents, R rows of a forward (a row is a sample, or a sample at one step).
Sources: yifan123/flow_grpo ac4c86e (guidance inside the log-probability, the unconditional branch detached); DenseGRPO, arXiv 2601.20218
(completions of intermediate states). Changed: noise comes from one stream per sample; states stay float32; guidance is one batched forward;
all completions of all states advance together and reuse the predictions that the rollout made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmalign import sde
from mmalign.models._diffusion_layouts import Layout
from mmalign.models.layers.lanes import ROWS, Lane, lanes
from mmalign.models.layers.noise import normals, streams
from mmalign.trajectory import WHICH, Policy, Prompts, Trajectory, Which
from mmalign.types import UsageError

CHUNK = 32  # rows of one forward where results need not be bitwise independent of the batch
UNCOND = "uncond_"  # prefix of the unconditional twin's embeddings


@dataclass(frozen=True)
class Scored:
    """Recorded steps under the model as it is now, one per row: log-probability [R], and the step's distribution."""

    log_prob: Tensor
    step: sde.Step


class Diffusion:
    """A pipeline of any layout. `net` is the denoiser, the part that trains; text encoders and the image coder stay as they are."""

    def __init__(self, layout: Layout, tokens: int) -> None:
        from diffusers.models.attention import AttentionModuleMixin
        from diffusers.models.attention_processor import Attention

        self.layout, self.net, self.tokens = layout, layout.net, tokens
        every: Iterator[nn.Module] = self.net.modules()
        attention = [module for module in every if isinstance(module, (Attention, AttentionModuleMixin))]
        self.trainable: dict[str, nn.Module] = {"denoiser": self.net, "attention": nn.ModuleList(attention)}

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def size(self) -> tuple[int, int]:
        return self.layout.size

    def shard_units(self) -> list[nn.Module]:
        """The denoiser's blocks, then the denoiser: what FSDP2 gathers one by one."""
        blocks = [child for module in self.net.children() if isinstance(module, nn.ModuleList) for child in module]
        return [*(block for block in blocks if any(True for _ in block.parameters())), self.net]

    # Drawing

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str], negative: str = "", tokens: int | None = None) -> Prompts:
        """What the denoiser reads of each prompt, and of the negative one as its unconditional twin."""
        embeds = self._encode(texts, tokens or self.tokens)
        if self.layout.has_negative:
            blank = self.layout.encode_negative(negative, tokens or self.tokens)
            embeds |= {UNCOND + name: value.expand(len(texts), *value.shape[1:]) for name, value in blank.items()}
        none = torch.zeros(len(texts), 0, dtype=torch.long, device=self.device)  # the denoiser reads embeddings, not ids
        return Prompts(tuple(texts), none, none.bool(), none, none.bool(), embeds)

    @torch.no_grad()
    def sample(self, prompts: Prompts, policy: Policy, seeds: Sequence[int], size: tuple[int, int] | None = None) -> Trajectory:
        """Draw one picture per prompt and record every step; row b depends on prompt b, its seed and the policy alone."""
        made = [self._run(prompts, lane, policy, seeds, size) for lane in self._lanes(self._check(prompts, policy, seeds))]
        path, predictions, log_prob = (torch.cat(parts) for parts in zip(*made, strict=True))
        channels, height, width = path.shape[2:]
        times = self.layout.times(len(policy.levels), (channels, height, width))
        return Trajectory(
            "flow", path[:, 1:], log_prob, policy, tuple(seeds), states=path[:, :-1], times=times.to(path.device), predictions=predictions
        )

    @torch.no_grad()
    def draw(self, prompts: Prompts, policy: Policy, seeds: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """[B, C, H, W] final latents of the same samples, without a record."""
        rows = self._lanes(self._check(prompts, policy, seeds))
        return torch.cat([self._run(prompts, lane, policy, seeds, size, keep=False)[0][:, -1] for lane in rows])

    def log_prob(self, prompts: Prompts, trajectory: Trajectory, which: Which = "guided") -> Tensor:
        """[B, K] float32 log-probabilities of all recorded steps, with gradients; 0 at deterministic ones."""
        n_steps = trajectory.actions.shape[1]
        rows = [row for row in range(len(trajectory)) for _ in range(n_steps)]
        return self.score(prompts, trajectory, rows, list(range(n_steps)) * len(trajectory), which).log_prob.reshape(-1, n_steps)

    def score(self, prompts: Prompts, trajectory: Trajectory, rows: Sequence[int], steps: Sequence[int], which: Which) -> Scored:
        """The recorded steps `steps[i]` of samples `rows[i]`, in one forward per lane.

        `guided` scores the policy that was sampled from; `guided_detach_uncond` does too, with no gradient (and no cost of one) through the
        unconditional branch; `cond` scores the conditional branch alone.
        """
        if which not in WHICH:
            raise UsageError(f"There is no log-probability '{which}'; there are {', '.join(WHICH)}.")
        assert trajectory.states is not None and trajectory.times is not None
        policy, parts = trajectory.policy, []
        levels = torch.tensor(policy.levels, dtype=torch.float64, device=trajectory.times.device)
        for lane in self._lanes(len(rows)):
            row, step = [rows[at] for at in lane.rows], [steps[at] for at in lane.rows]
            x, times = trajectory.states[row, step], trajectory.times[step]
            made = self._predict(x, times[:, 0], prompts.select(row), policy.guidance, which)
            now = sde.step(x, made, times[:, 0], times[:, 1], levels[step], policy.noise)
            value = sde.log_prob(trajectory.actions[row, step], now)
            parts.append([tensor[: lane.n_real] for tensor in (value, now.mean, now.std, now.rate)])
        log_prob, mean, std, rate = (torch.cat(column) for column in zip(*parts, strict=True))
        return Scored(log_prob, sde.Step(mean, std, rate))

    @torch.no_grad()
    def complete(self, prompts: Prompts, trajectory: Trajectory, n: int = 0) -> Tensor:
        """[B, K + 1, C, H, W] clean latents that n deterministic steps make of every recorded state, the final one as it is.

        n = 0 takes one step per remaining step of the schedule, the standard sampler. All states advance together, and each one's first
        prediction is the rollout's own: B K (K - 1) / 2 evaluations for n = 0, none for n = 1.
        """
        assert trajectory.states is not None and trajectory.times is not None and trajectory.predictions is not None
        total, n_steps = trajectory.actions.shape[:2]
        grid = torch.cat([trajectory.times[:, 0], trajectory.times[-1:, 1]])
        plans = [sde.stops(n_steps - k, n or n_steps) for k in range(n_steps)]
        x = trajectory.states.clone()
        for wave in range(max(map(len, plans)) - 1):
            active = [k for k, plan in enumerate(plans) if wave < len(plan) - 1]
            pairs = [(row, k) for k in active for row in range(total)]
            for lane in self._lanes(len(pairs)):
                row, k = (list(column) for column in zip(*[pairs[at] for at in lane.rows], strict=True))
                before, after = (grid[[n_steps - plans[at][wave + later] for at in k]] for later in (0, 1))
                now = x[row, k]
                if wave == 0:
                    made = trajectory.predictions[row, k]
                else:
                    made = self._predict(now, before, prompts.select(row), trajectory.policy.guidance, "guided")
                moved = sde.step(now, made, before, after, 0.0, trajectory.policy.noise).mean
                x[row[: lane.n_real], k[: lane.n_real]] = moved[: lane.n_real]
        return torch.cat([x, trajectory.actions[:, -1:]], 1)

    # Learning from pictures

    def supervised_loss(self, prompts: Prompts, pixels_BCHW: Tensor, seeds: Sequence[int], blank_B: Tensor | None = None) -> Tensor:
        """[B] flow-matching loss of pictures in [0, 1] at one time each, drawn from the logistic normal (SD3, eq. 19) by the sample's seed.

        Rows True in `blank_B` train the unconditional branch. Models that predict noise have no such loss here.
        """
        if "ddim" in self.layout.rules:
            raise UsageError("This pipeline predicts noise; supervised_loss is for flow-matching pipelines.")
        x0 = self.encode_image(pixels_BCHW)
        sources = streams(seeds)
        time = normals(sources, 1).to(self.device).sigmoid()[:, 0]
        eps = normals(sources, *x0.shape[1:]).to(self.device)
        at = time[:, None, None, None]
        velocity = self._predict((1 - at) * x0 + at * eps, time, self._blanked(prompts, blank_B), 1.0, "cond")
        return ((velocity - (eps - x0)) ** 2).flatten(1).mean(1)

    # Pixels, always in [0, 1]

    @torch.no_grad()
    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] latents of pictures."""
        return self.layout.encode_image(pixels_BCHW.to(self.device))

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] float32 pixels of latents of any state; of a noisy one, what the decoder makes of it."""
        parts = []
        with torch.autocast(self.device.type, enabled=False):
            for lane in self._lanes(len(latents_BCHW)):
                parts.append(self.layout.decode(latents_BCHW[lane.rows])[: lane.n_real])
        return torch.cat(parts)

    def pictures(self, latents_BCHW: Tensor) -> list[Any]:
        """uint8 [H, W, 3] of each latent, rounded as diffusers does: what is scored in training is what a benchmark would see."""
        bytes_BHWC = (self.decode(latents_BCHW) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [picture.copy() for picture in bytes_BHWC]

    # Inside

    def _lanes(self, count: int) -> Iterator[Lane]:
        """Rows of one forward: lanes of constant shape on the CPU, where results are bitwise independent of the batch; chunks elsewhere."""
        if self.device.type == "cpu":
            yield from lanes([None] * count, ROWS)
            return
        for start in range(0, count, CHUNK):
            rows = list(range(start, min(start + CHUNK, count)))
            yield Lane(None, rows, len(rows))

    def _encode(self, texts: Sequence[str], tokens: int) -> dict[str, Tensor]:
        parts = [(lane, self.layout.encode([texts[row] for row in lane.rows], tokens)) for lane in self._lanes(len(texts))]
        return {name: torch.cat([made[name][: lane.n_real] for lane, made in parts]) for name in parts[0][1]}

    def _check(self, prompts: Prompts, policy: Policy, seeds: Sequence[int]) -> int:
        if len(seeds) != len(prompts):
            raise UsageError(f"Each of the {len(prompts)} prompts needs its own seed; got {len(seeds)} seeds.")
        if not policy.levels:
            raise UsageError("A policy of denoising steps needs its levels, one per step; 0 is a deterministic step.")
        if policy.noise not in self.layout.rules:
            raise UsageError(f"This pipeline has no noise '{policy.noise}'; it has {', '.join(self.layout.rules)}.")
        return len(seeds)

    def _run(
        self, prompts: Prompts, lane: Lane, policy: Policy, seeds: Sequence[int], size: tuple[int, int] | None, keep: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Path [R, K + 1, ...] (the last state alone unless kept), predictions [R, K, ...], log-probs [R, K] of a lane's real rows."""
        shape = self.layout.shape(size or self.size)
        times = self.layout.times(len(policy.levels), shape)
        own, sources = prompts.select(lane.rows), streams([seeds[row] for row in lane.rows])
        path, predictions, values = [normals(sources, *shape).to(self.device)], [], []
        for (before, after), level in zip(times.tolist(), policy.levels, strict=True):
            x = path[-1]
            made = self._predict(x, torch.full((len(x),), before, dtype=torch.float64), own, policy.guidance, "guided")
            now = sde.step(x, made, before, after, level, policy.noise)
            following = now.mean
            if level:
                following = now.mean + now.std[:, None, None, None] * normals(sources, *shape).to(self.device)
            values.append(sde.log_prob(following, now))
            path = [*path, following] if keep else [following]
            if keep:
                predictions.append(made)
        real = slice(lane.n_real)
        kept = torch.stack(predictions, 1)[real] if keep else path[-1][real]
        return torch.stack(path, 1)[real], kept, torch.stack(values, 1)[real]

    def _predict(self, x: Tensor, time_R: Tensor, prompts: Prompts, guidance: float, which: Which) -> Tensor:
        """The guided prediction, float32. Guidance is one forward over both branches, except where only one of them takes a gradient."""
        names = [name for name in prompts.embeds if not name.startswith(UNCOND)]
        cond = {name: prompts.embeds[name] for name in names}
        if guidance == 1 or which == "cond" or not self.layout.has_negative:
            return self.layout.predict(x, time_R, cond, guidance).float()
        uncond = {name: prompts.embeds[UNCOND + name] for name in names}
        if which == "guided":
            both = {name: torch.cat([uncond[name], cond[name]]) for name in names}
            low, high = self.layout.predict(torch.cat([x, x]), torch.cat([time_R, time_R]), both, guidance).float().chunk(2)
        else:
            with torch.no_grad():
                low = self.layout.predict(x, time_R, uncond, guidance).float()
            high = self.layout.predict(x, time_R, cond, guidance).float()
        return self.layout.guide(low, high, guidance)

    def _blanked(self, prompts: Prompts, blank_B: Tensor | None) -> Prompts:
        if blank_B is None:
            return prompts
        embeds = dict(prompts.embeds)
        for name in [name for name in embeds if not name.startswith(UNCOND)]:
            blank = blank_B.to(self.device).reshape(-1, *[1] * (embeds[name].ndim - 1))
            embeds[name] = torch.where(blank, embeds[UNCOND + name], embeds[name])
        return Prompts(prompts.texts, prompts.ids, prompts.mask, prompts.uncond_ids, prompts.uncond_mask, embeds)
