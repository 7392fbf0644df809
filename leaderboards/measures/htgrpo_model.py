"""HT-GRPO's claims about what a trained masked model draws: how uncertain its codes are, and what the first ones decide.

Everything is measured on groups that tiny-mmada draws for validation prompts without guidance, one code at a time; rewards are the
oracle's (`shapes`, form exact), prompts of the harder kinds, so that rewards differ within a group. The structure is the first 30% of the
codes in the order of unmasking, the refinement is the rest.

Legend: P prompts, G pictures of a prompt, B = P*G pictures, N codes, K codes drawn anew, J slots of a step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from mmalign.trainers import _masked as masked
from mmalign.trainers import _masked_choices as choices
from mmalign.trainers import ht_grpo
from torch import Tensor

from mmalign import grpo, hub, registry
from mmalign.loop import Loop
from mmalign.models.layers.masked import HIDDEN, Streams, decode, first_slots, make_plan
from mmalign.reward import load_reward
from mmalign.testbed import oracle
from mmalign.testbed.world import DENSE, GENEVALPP, Scene, clauses_of, facts, prompts
from mmalign.types import Prompt, Sample, digest

ALPHA = ht_grpo.Config().alpha
PROMPTS, EACH = 2, 8
SEEN = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Group:
    """A rollout of P prompts with G pictures each: rewards, group advantages [B], and the order of unmasking (int [B, N] from 1)."""

    rollout: masked.Rollout
    reward_B: Tensor
    advantage_B: Tensor
    rank_BN: Tensor

    @property
    def is_structure_BN(self) -> Tensor:
        return choices.structure(self.rank_BN, ALPHA)

    @property
    def everything_BN(self) -> Tensor:
        return torch.ones_like(self.rank_BN, dtype=torch.bool)


def config_of(seed: int, **options: Any) -> ht_grpo.Config:
    """The recipe of tiny-mmada without guidance and KL: the ratio's policy is the one that drew."""
    recipe = {"learning_rate": 2e-5, "grad_norm": 1.0, "lora_rank": 0, "guidance": 1.0, "beta": 0.0, "image_every": 0}
    return ht_grpo.Config(seed=seed, **{**recipe, **options})


@contextmanager
def training(config: ht_grpo.Config, name: str) -> Iterator[Loop]:
    """A freshly loaded model about to be trained, in a folder that goes away."""
    spec = hub.resolve_model(name)
    model = registry.load(registry.find("models", spec.family)).load(spec.path)
    with tempfile.TemporaryDirectory() as folder:
        yield Loop(config, model, Path(folder))


@cache
def group(seed: int, name: str) -> Group:
    chosen = Random(f"group/{seed}").sample(prompts("val", kinds=GENEVALPP + DENSE), PROMPTS)
    config = config_of(seed)
    with training(config, name) as loop:
        rollout = masked.make_rollout(loop.model, loop, chosen, EACH, ht_grpo.policy_of(config, loop.model), None, config.micro_batch)
    scored = load_reward({"shapes": 1.0}, overrides={"shapes": {"form": "exact"}})(rollout.samples)
    advantage_B = masked.advantages_of(scored, EACH, grpo.AdvantageRule(config.ddof, config.epsilon)).value.flatten()
    assert rollout.drawn.step_of is not None
    return Group(rollout, torch.from_numpy(scored.total), advantage_B, choices.ranks(rollout.drawn.step_of))


def rows_of(rollout: masked.Rollout) -> list[int]:
    """The prompt of each picture."""
    return [row // rollout.group for row in range(len(rollout.samples))]


def streams(purpose: str, seed: int, rows: int) -> list[int]:
    """A seed for each picture."""
    return [int(digest(purpose, seed, row)[:15], 16) for row in range(rows)]


# -- how uncertain codes are -------------------------------------------------------------------------------------------------------


def entropies(model: Any, rollout: masked.Rollout, hidden_BN: Tensor) -> Tensor:
    """[B, N] nats of what the model says of each code when `hidden_BN` is hidden; of visible codes it means nothing."""
    encoded = model.to_width(rollout.encoded.select(rows_of(rollout)))
    slots_BN = torch.arange(hidden_BN.shape[1]).expand(hidden_BN.shape)
    with torch.no_grad():
        logits = model._logits_at(encoded, rollout.drawn.policy, "cond")(rollout.drawn.actions.masked_fill(hidden_BN, HIDDEN), slots_BN)
    return torch.distributions.Categorical(logits=logits.double()).entropy()


def context(seed: int, orders: int = 4, name: str = "tiny-mmada") -> dict[str, float]:
    """Mean entropy (nats) of a hidden code when a random 0, 25, 50, 75% of its picture's codes is seen. Larger sets hold smaller ones,
    and only codes that are hidden in all four count. `rises`: the share of single codes that a quarter more makes less certain."""
    found = group(seed, name)
    with training(config_of(seed), name) as loop:
        levels = []
        for order in range(orders):
            rows, codes = found.rank_BN.shape
            place_BN = choices.uniforms(streams(f"context/{order}", seed, rows), codes).argsort(1).argsort(1) / codes
            kept_BN = place_BN >= SEEN[-1]
            levels.append(torch.stack([entropies(loop.model, found.rollout, place_BN >= share)[kept_BN] for share in SEEN]))
    nats = torch.cat(levels, 1)
    means = {f"{share:.0%} seen": float(one.mean()) for share, one in zip(SEEN, nats, strict=True)}
    return {**means, "rises": float((nats[1:] > nats[:-1]).double().mean())}


def surprise(seed: int, name: str = "tiny-mmada") -> dict[str, float]:
    """Mean of -log p (nats) of the codes decided first and of the rest, in the state each was drawn from; and the mean entropy of both
    when the whole picture is hidden."""
    found = group(seed, name)
    with training(config_of(seed), name) as loop:
        blank = entropies(loop.model, found.rollout, found.everything_BN)
    parts = {"structure": found.is_structure_BN, "refinement": ~found.is_structure_BN}
    drawn = {part: float(-found.rollout.drawn.log_prob[where].double().mean()) for part, where in parts.items()}
    return {**drawn, **{f"{part} blank": float(blank[where].mean()) for part, where in parts.items()}}


# -- what a part of the codes decides ----------------------------------------------------------------------------------------------


def redrawn(model: Any, rollout: masked.Rollout, hidden_BN: Tensor, seeds: Sequence[int]) -> Tensor:
    """int [B, N] codes of which the hidden ones (K in each picture) are drawn anew, given the others, in the model's own order."""
    places_BK = first_slots(hidden_BN, int(hidden_BN[0].sum()))
    policy, kept_BN = rollout.drawn.policy, rollout.drawn.actions
    logits_at = model._logits_at(model.to_width(rollout.encoded.select(rows_of(rollout))), policy, "guided")

    def logits_of(codes_BK: Tensor, slots_BJ: Tensor) -> Tensor:
        return logits_at(kept_BN.scatter(1, places_BK, codes_BK), places_BK.gather(1, slots_BJ))

    number = places_BK.shape[1]
    plan = make_plan(number, model.schedule(number), policy.order_noise or 0.0, model.fades, model.holds_last)
    with torch.no_grad():
        made = decode(logits_of, len(kept_BN), plan, Streams(seeds, number, number, model.device), policy.temperature, model.device)
    return kept_BN.scatter(1, places_BK, made.codes)


def layout(seed: int, name: str = "tiny-mmada") -> dict[str, float]:
    """What changes when some codes are drawn anew given the others: `first` (the structure), `rest`, `last` and `random` (as many as
    first), `others` (all but the random ones), `all` (another picture of the group). `cells`: the share of the board's nine cells that
    show something else; `layout`: that are newly filled or emptied; `facts`: the share of the prompt's facts that turn true or false.
    Things that the oracle cannot name count as nothing. `reward variance`: between pictures (`all`), between two with one structure
    (`rest`)."""
    found = group(seed, name)
    rollout, rank_BN = found.rollout, found.rank_BN
    rows, codes = rank_BN.shape
    first = int(found.is_structure_BN[0].sum())
    random_BN = choices.uniforms(streams("places", seed, rows), codes).argsort(1).argsort(1) < first
    hidden = {"first": rank_BN <= first, "rest": rank_BN > first, "last": rank_BN > codes - first}
    hidden |= {"random": random_BN, "others": ~random_BN}
    asked = [sample.request.prompt for sample in rollout.samples]
    before = [sample.image for sample in rollout.samples]
    images: dict[str, list[np.ndarray]] = {}
    with training(config_of(seed), name) as loop:
        for part, hidden_BN in hidden.items():
            drawn = loop.model.decode(redrawn(loop.model, rollout, hidden_BN, streams(f"layout/{part}", seed, rows)))
            images[part] = list((drawn * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())
    images["all"] = [before[row - row % rollout.group + (row + 1) % rollout.group] for row in range(rows)]
    scenes = {part: [one.scene for one in oracle.read(np.stack(shown))] for part, shown in {"before": before, **images}.items()}
    changes = {part: changed(asked, scenes["before"], after) for part, after in scenes.items() if part != "before"}
    numbers = {f"{what} {part}": value for part, by_name in changes.items() for what, value in by_name.items()}
    judge = load_reward({"shapes": 1.0}, overrides={"shapes": {"form": "exact"}})
    redone = [Sample(sample.request, image=image) for sample, image in zip(rollout.samples, images["rest"], strict=True)]
    halved_B = (found.reward_B - torch.from_numpy(judge(redone).total)) ** 2 / 2
    between = float(found.reward_B.unflatten(0, (-1, rollout.group)).var(1).mean())
    return {**numbers, "reward variance all": between, "reward variance rest": float(halved_B.mean())}


def changed(asked: Sequence[Prompt], before: list[Scene], after: list[Scene]) -> dict[str, float]:
    """Mean shares over pictures, as `layout` names them."""
    cells, filled, turned = [], [], []
    for prompt, old, new in zip(asked, before, after, strict=True):
        shown = [{(thing.row, thing.column): thing for thing in scene} for scene in (old, new)]
        cells.append(sum(shown[0].get(cell) != shown[1].get(cell) for cell in shown[0].keys() | shown[1].keys()) / 9)
        filled.append(len(shown[0].keys() ^ shown[1].keys()) / 9)
        held = [facts(clauses_of(prompt), scene) for scene in (old, new)]
        turned.append(sum(held[0][fact] != held[1][fact] for fact in held[0]) / len(held[0]))
    return {"cells": float(np.mean(cells)), "layout": float(np.mean(filled)), "facts": float(np.mean(turned))}
