"""Rollout, log-prob and update of Janus-Pro shapes with random weights: `python tests/bench_gpu_janus.py --size 7b`.

Seconds, peak memory and the share of the chip's limit of each part of a training step, through the trainers' own code (rollout and
update of `trainers/_autoregressive.py`, the loop's optimiser). No checkpoint is needed: speed does not depend on what the weights say.
`--size tiny` is the same on any machine in seconds. The chip's limit is the longer of what its arithmetic and its memory allow:
  rollout    each token reads the trunk's and the head's weights once and the keys and values of all rows so far
  log-prob   one forward: 2 operations a weight and position, and the causal half of attention
  update     three forwards' worth of operations (what checkpointing computes again is no useful work), and the optimiser's traffic
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmalign.trainers import _autoregressive as ar

from mmalign.loop import Loop
from mmalign.models._janus import Janus
from mmalign.models._janus_text import ChatFormat, Pixels
from mmalign.testbed.tiny import make_janus
from mmalign.trajectory import Trajectory
from mmalign.types import Prompt

# width, feed-forward, layers, heads, vocabulary, side, (vision width, layers, heads), VQ (codes, base channels, multipliers)
SHAPES: dict[str, tuple[Any, ...]] = {
    "tiny": (48, 96, 2, 6, 512, 16, (32, 2, 4), (64, 32, [1, 1, 1])),
    "1b": (2048, 5632, 24, 16, 102400, 384, (1024, 24, 16), (16384, 128, [1, 1, 2, 2, 4])),
    "7b": (4096, 11008, 30, 32, 102400, 384, (1024, 24, 16), (16384, 128, [1, 1, 2, 2, 4])),
}
# Dense bfloat16 operations and bytes a second of NVIDIA's data sheets (SXM parts).
CHIPS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.04e12), "B200": (2250e12, 8.0e12)}
TEXT = "a photo of a red circle to the left of two small blue squares"


@dataclass(frozen=True)
class Part:
    """A part of a step: median seconds, peak memory, and the seconds that the chip's limit allows (None: an unknown chip)."""

    seconds: float
    gib: float
    limit: float | None

    @property
    def share(self) -> float | None:
        return None if self.limit is None else self.limit / self.seconds


@dataclass(frozen=True)
class Work:
    """Operations and bytes that a part cannot do without."""

    operations: float
    bytes: float

    def seconds(self, chip: tuple[float, float] | None) -> float | None:
        return None if chip is None else max(self.operations / chip[0], self.bytes / chip[1])


class RandomJanus(Janus):
    """A Janus without a checkpoint; it makes pixels as one with a checkpoint does."""

    def render(self, prompts: object, drawn: Trajectory) -> torch.Tensor:
        return self.decode(drawn.actions)


def build(size: str, device: str, dtype: torch.dtype, folder: Path) -> Janus:
    """A Janus of the size with random weights, made on the device; its tokenizer is a tiny one, whose ids all sizes have."""
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    width, inner, layers, heads, vocabulary, side, vision, vq = SHAPES[size]
    patch = 4 if size == "tiny" else 16
    tokens = (side // patch) ** 2
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=16384,
    )  # fmt: skip
    sight = JanusVisionConfig(
        hidden_size=vision[0], num_hidden_layers=vision[1], num_attention_heads=vision[2], image_size=side, patch_size=patch,
        projection_dim=width, num_image_tokens=tokens,
    )  # fmt: skip
    codes = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=vq[0], base_channels=vq[1], channel_multiplier=vq[2], projection_dim=width, image_token_embed_dim=width,
        **({"latent_channels": 32, "num_res_blocks": 1} if size == "tiny" else {}),
    )  # fmt: skip
    settings = JanusConfig(text_config=text, vision_config=sight, vq_config=codes, tie_word_embeddings=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[device] if device != "cpu" else []), torch.device(device):
            torch.manual_seed(0)
            net = JanusForConditionalGeneration(settings).eval()
    finally:
        torch.set_default_dtype(before)
    return RandomJanus(net, ChatFormat(make_janus(folder / "tokenizer"), tokens), Pixels(side))


def weights(module: torch.nn.Module) -> int:
    """Numbers in the matrices of a module, LoRA's among them."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)


def forward_operations(model: Janus, rows: int, slots: int) -> float:
    """Of one teacher-forced forward of so many rows with prompts of so many slots."""
    positions, layers = slots + model.tokens - 1, len(model.trunk.layers)
    attention = 2 * layers * positions**2 * model.trunk.config.hidden_size  # two products of 2 operations, causal: half of the square
    aligner = model.net.model.generation_aligner
    matrices = positions * weights(model.trunk.layers) + (model.tokens - 1) * weights(aligner)
    return rows * (2 * matrices + 2 * model.tokens * weights(model.net.model.generation_head) + attention)


def rollout_work(model: Janus, rows: int, slots: int, is_guided: bool) -> Work:
    """Of drawing: the prompts are read once, then every token is a forward of all rows."""
    lanes, size = rows * (2 if is_guided else 1), model.net.lm_head.weight.element_size()
    read = weights(model.trunk.layers) + weights(model.net.model.generation_head) + weights(model.net.model.generation_aligner)
    kept = 2 * len(model.trunk.layers) * model.trunk.config.num_key_value_heads * model.trunk.layers[0].self_attn.head_dim
    history = sum(slots + index for index in range(model.tokens))
    return Work(forward_operations(model, lanes, slots), size * (model.tokens * read + lanes * history * kept))


def measure(model: Janus, config: ar.AutoregressiveConfig, rounds: int, chip: tuple[float, float] | None, run: Path) -> dict[str, Part]:
    """The parts of a step after a step of warm-up."""
    loop = Loop(config, model, run)
    prompts = [Prompt(f"prompt-{number}", f"{TEXT} {number}") for number in range(config.prompts_per_step)]
    rollout = ar.make_rollout(model, loop, prompts, config)
    rows = len(rollout.samples)
    slots = rollout.encoded.ids.shape[1]
    batches = [list(range(at, min(at + config.micro_batch, rows))) for at in range(0, rows, config.micro_batch)]
    advantage_B = torch.linspace(-1, 1, rows)

    def score() -> None:
        with torch.no_grad(), loop.autocast():
            for batch in batches:
                ar.decisions(model, rollout, batch, config)

    once = forward_operations(model, rows, slots) * (2 if config.log_prob != "cond" and config.guidance != 1 else 1)
    size = model.net.lm_head.weight.element_size()
    held, trained = size * weights(model.trunk), sum(parameter.numel() for parameter in loop.parameters.values())
    steps = {
        "rollout": (lambda: ar.make_rollout(model, loop, prompts, config), rollout_work(model, rows, slots, config.guidance != 1)),
        "log-prob": (score, Work(once, held)),
        "update": (lambda: ar.update(model, loop, rollout, advantage_B, config), Work(3 * once, 2 * held + 7 * size * trained)),
    }
    return {name: _timed(verb, work.seconds(chip), rounds, model.device) for name, (verb, work) in steps.items()}


def _timed(verb: Callable[[], object], limit: float | None, rounds: int, device: torch.device) -> Part:
    is_gpu = device.type == "cuda"
    verb()
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(rounds):
        if is_gpu:
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        verb()
        if is_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated(device) if is_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Part(statistics.median(seconds), peak / 2**30, limit)


def table(parts: dict[str, Part], size: str, rows: int, where: str) -> str:
    lines = [f"Janus {size}, {rows} pictures a step, {where}", ""]
    lines += ["| part | seconds | peak GiB | limit s | share of the limit |", "|---|---|---|---|---|"]
    for name, part in parts.items():
        limit, share = ("–", "–") if part.limit is None or part.share is None else (f"{part.limit:.3g}", f"{part.share:.0%}")
        lines.append(f"| {name} | {part.seconds:.3g} | {part.gib:.1f} | {limit} | {share} |")
    return "\n".join(lines) + "\n"


def main(typed: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=tuple(SHAPES), default="7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=None, help="default: bfloat16, float32 on the CPU")
    parser.add_argument("--samples", type=int, default=8, help="pictures of the step's one prompt")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--lora-rank", type=int, default=0, help="0: all weights of the language trunk are trained")
    parser.add_argument("--autocast", choices=("none", "bfloat16"), default="none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(typed)
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    name = torch.cuda.get_device_name(options.device) if options.device != "cpu" else "CPU"
    chip = next((limits for known, limits in CHIPS.items() if known in name), None)
    config = ar.AutoregressiveConfig(
        steps=1, prompts_per_step=1, samples=options.samples, reasoning=False, micro_batch=options.micro_batch, beta=0.0,
        lora_rank=options.lora_rank, autocast=options.autocast, gradient_checkpointing=True, image_every=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = build(options.size, options.device, getattr(torch, dtype), Path(folder))
        parts = measure(model, config, options.rounds, chip, Path(folder) / "run")
    where = f"{name}, {dtype}" + (f", LoRA {options.lora_rank}" if options.lora_rank else "")
    sys.stdout.write(table(parts, options.size, options.samples, where))
    if options.json:
        content = {"size": options.size, "chip": name, "dtype": dtype, "samples": options.samples, "lora_rank": options.lora_rank}
        content["parts"] = {name: {**asdict(part), "share": part.share} for name, part in parts.items()}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
