"""What a dense step costs beside a sparse one, and what its maps are worth: `python tests/bench_dense_step.py [--rounds N] [--slow]`.

Whole training steps of the shipped recipe (rollout, reward, attribution, update) in turns, one of every kind a round, all from the same
weights and seeds (the learning rate is 0), so that they do the same work but for the attribution. Fidelity is measured on pictures that
the model drew in such a step, against the long reference (KernelSHAP) of the recipe's game, and stands beside that of the `shap`
package's 500 evaluations in the same game. `--slow` adds plain SHAP and LIME, which cost many steps each. Times are of the processor,
on one thread, so that other work on the machine disturbs them little. `--write` puts the table into docs/training.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_attribution import correlation, overlap
from helpers.shap_package import explain_grid

from mmalign import config as configs
from mmalign import registry
from mmalign.attribution import AmortisedHead, BlurGame, DropGame, attribute
from mmalign.attribution.game import Game
from mmalign.attribution.reference import kernel_shap
from mmalign.hub import CHECKPOINTS
from mmalign.loop import Loop
from mmalign.reward import load_reward, parse_weights
from mmalign.types import Prompt

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "trainers" / "recipes" / "dense_grpo.tiny-janus.yaml"
DOCUMENT = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- dense step begins -->", "<!-- dense step ends -->"
AIMS = {"fast_shap": 1.25, "amortised": 1.10, "gradcam": 1.10}


class Workbench:
    """The recipe's model, reward, prompts and config, and a loop for each kind of step."""

    def __init__(self, prompts_per_step: int, folder: Path) -> None:
        chosen = configs.load_yaml(RECIPE) or {}
        reward, source, options = chosen.pop("reward"), chosen.pop("prompts"), chosen.pop("options")
        chosen.pop("panel")
        self.dense, self.sparse = (registry.load(registry.find("trainers", name)) for name in ("dense_grpo", "t2i_r1"))
        quiet = {"learning_rate": 0.0, "prompts_per_step": prompts_per_step, "panel_every": 0, "image_every": 0, "steps": 0}
        self.config = configs.build(self.dense.Config, {**chosen, **quiet}, "dense_grpo")
        known = {name: value for name, value in {**chosen, **quiet}.items() if name not in ("attribution", "tool", "explain", "strength")}
        self.sparse_config = configs.build(self.sparse.Config, known, "t2i_r1")
        self.model = registry.load(registry.find("models", "janus")).load(CHECKPOINTS / "tiny-janus")
        self.reward = load_reward(parse_weights(reward), overrides=options)
        evaluator = registry.load(registry.find("evaluators", source)).Evaluator
        self.prompts: list[Prompt] = evaluator(per_kind=64).prompts("train")
        self.folder = folder
        self.scorer: Any = self.dense.explained_scorer(self.reward, self.config.explain, "fast_shap")

    def stepper(self, tool: str | None) -> Callable[[], float]:
        """A function that does the next step with a tool (None: sparse) and returns its seconds of processor time."""
        module = self.dense if tool else self.sparse
        config = replace(self.config, attribution=tool) if tool else self.sparse_config
        loop = Loop(config, self.model, self.folder / (tool or "sparse"))
        loop.save = lambda: None  # type: ignore[method-assign]  # both kinds would write the same state

        def step() -> float:
            loop.config = replace(config, steps=loop.step + 1)
            begun = time.process_time()
            module.train(loop.config, self.model, self.reward, self.prompts, loop)
            return time.process_time() - begun

        return step

    def pictures(self, number: int, step: int = 0) -> tuple[torch.Tensor, list[Prompt]]:
        """Pictures that the model draws in a step of the recipe, evenly out of all its groups, and their prompts."""
        from mmalign.trainers import _autoregressive as ar

        loop = Loop(self.sparse_config, self.model, self.folder / "pictures")
        loop.step = step
        rollout = ar.make_rollout(self.model, loop, loop.draw(self.prompts, self.config.prompts_per_step), self.sparse_config)
        rows = torch.linspace(0, len(rollout.samples) - 1, number).long()
        return rollout.pixels[rows], [rollout.samples[row].request.prompt for row in rows.tolist()]

    def game(self, pixels: torch.Tensor, texts: list[str]) -> Game:
        """The game that the recipe's tools play."""
        tool = self.config.tool
        if tool.masking == "drop":
            return DropGame(self.scorer, pixels, texts, tool.chunk)
        return BlurGame(self.scorer, pixels, texts, (tool.grid, tool.grid), tool.blur, tool.chunk)

    def warm_head(self, steps: int) -> AmortisedHead:
        """A head as a training has it after some steps: it learns online, from the pictures of the steps before."""
        head = self.dense.make_head(self.scorer, self.model, Loop(self.sparse_config, self.model, self.folder / "head"))
        for number in range(steps):
            pixels, prompts = self.pictures(self.config.prompts_per_step * self.config.group, 100 + number)
            head.step(self.game(pixels, [prompt.text for prompt in prompts]))
        say(f"the head's fidelity on spare pairs after {steps} steps: {head.fidelity:.2f}")
        return head

    def reference(self, pixels: torch.Tensor, prompts: list[Prompt], evaluations: int) -> torch.Tensor:
        """Long maps [B, h, w] of the game that the recipe plays."""
        maps, halves = kernel_shap(self.game(pixels, [prompt.text for prompt in prompts]), evaluations, batch=256)
        agreement = correlation(halves[0], halves[1], maps.shape[-1])
        say(f"reference of {evaluations} evaluations a picture: its halves correlate at {agreement:.3f}")
        return maps

    def package(self, pixels: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        """Maps of the `shap` package with 500 evaluations, picture by picture, as it works."""
        played = [self.game(pixels[i : i + 1], [prompt.text]) for i, prompt in enumerate(prompts)]
        return torch.stack([torch.from_numpy(explain_grid(game, 500, 50)[0].copy()) for game in played]).double()


def likeness(credit: torch.Tensor, truth: torch.Tensor) -> list[str]:
    """Correlation on tokens and on 2x2 tokens, overlap of the greatest tenth."""
    side = truth.shape[-1]
    return [f"{correlation(credit, truth, grid):.3f}" for grid in (side, side // 2)] + [f"{overlap(credit, truth):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16, help="of a step; the recipe has 16, each with 8 pictures")
    parser.add_argument("--pictures", type=int, default=24, help="whose maps are compared with the reference")
    parser.add_argument("--evaluations", type=int, default=8_000, help="of the reference, for each picture")
    parser.add_argument("--head-steps", type=int, default=30, help="of the amortised head before it is measured")
    parser.add_argument("--slow", action="store_true", help="plain SHAP and LIME too, one step each")
    parser.add_argument("--write", action="store_true", help="put the table into docs/training.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Workbench(arguments.prompts, Path(folder)), arguments)
    if arguments.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        DOCUMENT.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


def measure(bench: Workbench, arguments: argparse.Namespace) -> list[str]:
    tool, head = bench.config.tool, bench.warm_head(arguments.head_steps)
    bench.dense.make_head = lambda *_: head
    tools: list[str | None] = [None, "fast_shap", "amortised", "gradcam"]
    steppers = {name: bench.stepper(name) for name in [*tools, *(("shap", "lime") if arguments.slow else ())]}
    seconds: dict[str | None, list[float]] = {name: [] for name in steppers}
    for number in range(arguments.rounds):
        for name in tools if number or not arguments.slow else steppers:
            seconds[name].append(steppers[name]())
            say(f"round {number}: {name or 'sparse'} {seconds[name][-1]:.2f} s")
    pixels, prompts = bench.pictures(arguments.pictures)
    truth = bench.reference(pixels, prompts, arguments.evaluations)
    sparse = statistics.median(seconds[None])
    lines = ["| step | seconds | x sparse | aim | evaluations | token r | block r | top 10 % |", "|" + "---|" * 8]
    lines.append(f"| sparse | {sparse:.2f} | 1.00 | | | | | |")
    for name, found in seconds.items():
        if name:
            maps = attribute(replace(tool, tool=name), bench.scorer, pixels, prompts, head)
            cost, aim = statistics.median(found), f"{AIMS[name]:.2f}" if name in AIMS else ""
            values = [f"{cost:.2f}", f"{cost / sparse:.2f}", aim, f"{maps.evaluations:.0f}", *likeness(maps.credit, truth)]
            lines.append(f"| {maps.tool} | " + " | ".join(values) + " |")
    found = likeness(bench.package(pixels, prompts), truth)
    lines.append("| `shap` package, 500 | | | | 500 | " + " | ".join(found) + " |")
    say("\n".join(lines))
    return lines


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
