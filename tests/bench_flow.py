"""Completions of a rollout together and one after another, and what dense rewards cost: `python tests/bench_flow.py --size sd35m`.

Shapes of SD3.5-M (512 x 512 pixels, 333 text tokens) with random weights, through the trainers' own code (rollout, rewards and update of
`trainers/_flow.py`, the loop's optimiser). No checkpoint is needed: speed does not depend on what the weights say. `--size tiny` is the
same on any machine in seconds. The reward here is the mean of the red channel, which costs nothing, so the price of a step is that of
the model's own work.
  one by one         every state of every sample by itself, its first prediction made again: a loop of pipeline calls
  step by step       the states of one step together, for all samples
  wavefront          all states of all samples advance together and reuse the predictions of the rollout
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.tiny_diffusion import make_sd3
from mmalign.trainers import _flow as flow
from mmalign.trainers import flow_grpo

from mmalign import grpo, sde
from mmalign.hub import CHECKPOINTS
from mmalign.loop import Loop
from mmalign.models import _diffusion
from mmalign.models._diffusion import UNCOND, Diffusion
from mmalign.models.diffusion import load
from mmalign.reward import RewardBatch
from mmalign.trajectory import Policy, Prompts, Trajectory
from mmalign.types import Prompt, Sample, Value

TEXT = "a photo of a red circle"
PRICES = {"terminal": None, "n = 1": 1, "n = 2": 2, "n = t": 0}  # deterministic steps of a completion, by name


class Large(Diffusion):
    """A denoiser that is given embeddings of the right shapes in place of read texts."""

    def encode_prompts(self, texts: Sequence[str], negative: str = "", tokens: int | None = None) -> Prompts:
        shapes = {"prompt": (333, 4096), "pooled": (2048,)}
        stream = torch.Generator(self.device).manual_seed(0)
        embeds = {
            prefix + name: torch.randn(len(texts), *shape, generator=stream, device=self.device, dtype=self.net.dtype)
            for name, shape in shapes.items()
            for prefix in ("", UNCOND)
        }
        none = torch.zeros(len(texts), 0, dtype=torch.long)
        return Prompts(tuple(texts), none, none.bool(), none, none.bool(), embeds)


def build(size: str, device: str, folder: Path) -> Diffusion:
    """The tests' tiny pipeline, the testbed's, or the first with a denoiser and an image coder of SD3.5-M's shapes."""
    model = load(make_sd3(folder / "sd3", seed=1), device=device)
    if size == "tiny":
        return model
    if size == "testbed":
        return load(CHECKPOINTS / "tiny-sd3", device=device)
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    with torch.random.fork_rng(devices=[device] if device != "cpu" else []), torch.device(device):
        torch.manual_seed(0)
        net = SD3Transformer2DModel(
            sample_size=64, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
            caption_projection_dim=1536, joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=384, qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)),
        )  # fmt: skip
        coder = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
        )  # fmt: skip
    pipe = model.layout.pipe
    pipe.transformer, pipe.vae = net.to(torch.bfloat16).eval(), coder.eval().requires_grad_(False)
    pipe.vae_scale_factor, pipe.default_sample_size = 8, 64
    return Large(type(model.layout)(pipe), 256)


def redness(samples: Sequence[Sample]) -> RewardBatch:
    total = np.array([float(np.asarray(sample.image)[..., 0].mean()) / 255 for sample in samples])
    parts = {"redness": total}
    return RewardBatch(total, parts, parts, np.ones(len(total), bool), {"redness": 1.0}, {"redness": [Value(x) for x in total]})


def completed_apart(model: Diffusion, encoded: Prompts, drawn: Trajectory, at_once: int) -> torch.Tensor:
    """[B, K, ...] completions of the states x_T .. x_1, so many samples of one step at a time."""
    assert drawn.states is not None and drawn.times is not None
    total, n_steps = drawn.actions.shape[:2]
    grid, made = torch.cat([drawn.times[:, 0], drawn.times[-1:, 1]]), torch.empty_like(drawn.states)
    with torch.no_grad():
        for k in range(n_steps):
            plan = sde.stops(n_steps - k, n_steps)
            for first in range(0, total, at_once):
                rows = list(range(first, min(first + at_once, total)))
                x, embeds = drawn.states[rows, k], encoded.select(rows)
                for here, there in zip(plan, plan[1:], strict=False):
                    before, after = grid[n_steps - here], grid[n_steps - there]
                    velocity = model._predict(x, before.expand(len(rows)), embeds, drawn.policy.guidance, "guided")
                    x = sde.step(x, velocity, before, after, 0.0, drawn.policy.noise).mean
                made[rows, k] = x
    return made


def timed(works: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Median seconds and peak GiB of each, taken in turns, so that a busy machine slows all alike; one round is for warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    peak = dict.fromkeys(works, 0.0)
    for number in range(rounds + 1):
        for name, work in works.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            begun = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                peak[name] = torch.cuda.max_memory_allocated(device) / 2**30
            if number:
                seconds[name].append(time.perf_counter() - begun)
    return {name: {"seconds": statistics.median(values), "gib": peak[name]} for name, values in seconds.items()}


def measure(model: Diffusion, options: argparse.Namespace, run: Path) -> dict[str, Any]:
    """Completions three ways, how far their latents are from one another, and whole steps at every price."""
    config = flow_grpo.Config(
        steps=1, samples=options.samples, denoising_steps=options.steps, micro_batch=options.micro_batch, lora_rank=8, beta=0.0,
        image_every=0, autocast="bfloat16" if options.size == "sd35m" else "none", gradient_checkpointing=options.size == "sd35m",
    )  # fmt: skip
    loop = Loop(config, model, run)
    prompts = [Prompt(f"prompt-{number}", f"{TEXT} {number}") for number in range(options.prompts)]
    rows = [prompt for prompt in prompts for _ in range(options.samples)]
    policy = Policy(4.5, levels=(0.7,) * options.steps)
    how = flow.Update(grpo.Objective(1e-4, 1e-4, 0.0, "k3"), config.kl, config.log_prob, 1, config.micro_batch)
    trained = flow_grpo.trained_steps(policy.levels, config)
    rollout = flow.make_rollout(model, loop, rows, policy, range(len(rows)), None)

    def inside(work: Callable[[], Any]) -> Callable[[], Any]:
        def done() -> Any:
            with loop.rollout(), loop.autocast():
                return work()

        return done

    ways = {
        "one by one": inside(lambda: completed_apart(model, rollout.encoded, rollout.drawn, 1)),
        "step by step": inside(lambda: completed_apart(model, rollout.encoded, rollout.drawn, _diffusion.CHUNK)),
        "wavefront": inside(lambda: model.complete(rollout.encoded, rollout.drawn)),
    }
    together = ways["wavefront"]()[:, :-1]
    scale = together.abs().max()  # an untrained denoiser's latents are of any size
    difference = {name: float((ways[name]() - together).abs().max() / scale) for name in ("one by one", "step by step")}

    def a_step(n: int | None) -> Callable[[], None]:
        def work() -> None:
            made = flow.make_rollout(model, loop, rows, policy, range(len(rows)), None)
            flow.reward_states(model, loop, made, redness, n)  # type: ignore[arg-type]
            flow.update(model, loop, made, torch.ones(len(rows), options.steps), trained, how)

        return work

    completions = timed(ways, options.rounds, model.device)
    prices = timed({name: a_step(n) for name, n in PRICES.items()}, options.rounds, model.device)
    return {"completions": completions, "difference": difference, "steps": prices}


def table(found: dict[str, Any], title: str) -> str:
    lines = [title, "", "| completions | seconds | peak GiB | times the wavefront | latents differ by |", "|---|---|---|---|---|"]
    whole = found["completions"]["wavefront"]["seconds"]
    for name, part in found["completions"].items():
        far = f"{found['difference'][name]:.1e}" if name in found["difference"] else "–"
        lines.append(f"| {name} | {part['seconds']:.3g} | {part['gib']:.1f} | {part['seconds'] / whole:.2f} | {far} |")
    lines += ["", "| training step | seconds | peak GiB | times n = 1 | times terminal |", "|---|---|---|---|---|"]
    first, sparse = (found["steps"][name]["seconds"] for name in ("n = 1", "terminal"))
    for name, part in found["steps"].items():
        seconds = part["seconds"]
        lines.append(f"| {name} | {seconds:.3g} | {part['gib']:.1f} | {seconds / first:.2f} | {seconds / sparse:.2f} |")
    return "\n".join(lines) + "\n"


def main(typed: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "testbed", "sd35m"), default="sd35m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--samples", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(typed)
    if options.device == "cpu":
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name(options.device) if options.device != "cpu" else "CPU, one thread"
    with tempfile.TemporaryDirectory() as folder:
        found = measure(build(options.size, options.device, Path(folder)), options, Path(folder) / "run")
    drawn = options.prompts * options.samples
    sys.stdout.write(table(found, f"SD3 {options.size}, {drawn} pictures of {options.steps} steps, {name}"))
    if options.json:
        options.json.write_text(json.dumps({"size": options.size, "chip": name, "pictures": drawn, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
