"""Trains `tiny-preference`: a head on tiny-clip's features, from simulated choices between two pictures of one prompt.

The simulated annotators see which share of the prompt's facts a picture fulfils, like large things besides, and choose by a coin weighted
by the difference (Bradley and Terry). So the head is a fair reward for ordinary pictures, and how a policy will game it is known
beforehand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from mmalign.scorers import _clip
from mmalign.scorers.shapes_preference import make_head, preference
from mmalign.testbed.render import render
from mmalign.testbed.training import fit
from mmalign.testbed.world import KINDS, Clause, Scene, facts, realise, sample_prompts, spoil, text_of


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    pairs: int = 12_000
    checked: int = 2_000  # validation pairs
    liking: float = 0.4  # what a picture full of large things is worth, in shares of facts
    sharpness: float = 8.0  # of the choice: odds of e to this much for a whole share
    hidden: int = 64
    steps: int = 1500
    batch: int = 256


@dataclass(frozen=True)
class Choice:
    """Two pictures for one prompt, what each is worth to an annotator and to the oracle, and whether the first was chosen."""

    text: str
    scenes: tuple[Scene, Scene]
    worth: tuple[float, float]
    shares: tuple[float, float]
    is_first: bool


def share_of(clauses: tuple[Clause, ...], scene: Scene) -> float:
    verdicts = facts(clauses, scene)
    return sum(verdicts.values()) / len(verdicts)


def choices(recipe: Recipe, split: str, number: int) -> list[Choice]:
    """Seeded choices of a split's prompts; each picture has zero to three things wrong."""
    rng = Random(f"preference/{split}/{recipe.seed}")
    out: list[Choice] = []
    for _, clauses, scene in sample_prompts(split, KINDS, 70_000_000 + recipe.seed):
        if len(out) == number:
            break
        scenes = [scene, realise(clauses, rng) or scene]
        for index in range(2):
            for _ in range(rng.choice((0, 1, 1, 2, 3))):
                scenes[index] = spoil(scenes[index], rng)
        shares = [share_of(clauses, shown) for shown in scenes]
        large = [sum(thing.size == "large" for thing in shown) / len(shown) for shown in scenes]
        worth = [share + recipe.liking * size for share, size in zip(shares, large, strict=True)]
        is_first = rng.random() < 1 / (1 + 2.718281828459045 ** (recipe.sharpness * (worth[1] - worth[0])))
        out.append(Choice(text_of(clauses), (scenes[0], scenes[1]), (worth[0], worth[1]), (shares[0], shares[1]), is_first))
    return out


def features_of(clip: _clip.Clip, made: list[Choice]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of both pictures [N, 2, D] and of the texts [N, D]."""
    pictures = []
    with torch.no_grad():
        for start in range(0, len(made), 100):
            scenes = [scene for choice in made[start : start + 100] for scene in choice.scenes]
            pictures.append(clip.encode_images(list(render(scenes))).unflatten(0, (-1, 2)))
        texts = [clip.text_features([choice.text for choice in made[start : start + 100]]) for start in range(0, len(made), 100)]
    return torch.cat(pictures), torch.cat(texts)


def build(out: Path, work: Path, recipe: Recipe = Recipe()) -> None:
    """Needs tiny-clip beside `out`. Writes head.safetensors, and report.json with the agreement on validation pairs."""
    from safetensors.torch import save_file

    clip = _clip.load(str(out.parent / "tiny-clip"), "tiny-clip", "cpu", "float32")
    made = {split: choices(recipe, split, number) for split, number in (("train", recipe.pairs), ("val", recipe.checked))}
    features = {split: features_of(clip, pairs) for split, pairs in made.items()}
    image_N2D, text_ND = features["train"]
    chosen_N = torch.tensor([float(choice.is_first) for choice in made["train"]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = make_head(text_ND.shape[-1], recipe.hidden)

    def loss_of(step: int):
        rows = torch.randint(len(chosen_N), (recipe.batch,), generator=torch.Generator().manual_seed(step))
        first, second = (preference(head, image_N2D[rows, side], text_ND[rows]) for side in (0, 1))
        return F.binary_cross_entropy_with_logits(first - second, chosen_N[rows]), {}

    fit("preference", work, head.parameters(), {"head": head}, loss_of, recipe.steps, 2e-3, warmup=50)
    report = check(head, features["val"], made["val"])
    out.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.half().contiguous() for key, tensor in head.state_dict().items()}, out / "head.safetensors")
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def check(head: torch.nn.ModuleDict, features: tuple[torch.Tensor, torch.Tensor], made: list[Choice]) -> dict[str, float]:
    """Rescale the head to mean 0 and deviation 1 on these pictures; how often it sides with the annotators, their taste and the oracle."""
    image_N2D, text_ND = features
    with torch.no_grad():
        scores_N2 = torch.stack([preference(head, image_N2D[:, side], text_ND) for side in (0, 1)], 1)
        mean, deviation = scores_N2.mean(), scores_N2.std()
        weight, bias = head["score"].parameters()
        weight.div_(deviation)
        bias.sub_(mean).div_(deviation)
    sides = (scores_N2[:, 0] > scores_N2[:, 1]).tolist()

    def agreement(truth: list[tuple[float, float]]) -> float:
        decided = [(side, first > second) for side, (first, second) in zip(sides, truth, strict=True) if first != second]
        return round(sum(side == is_first for side, is_first in decided) / len(decided), 4)

    return {
        "pairs": len(made),
        "agrees_with_choices": agreement([(float(choice.is_first), float(not choice.is_first)) for choice in made]),
        "agrees_with_taste": agreement([choice.worth for choice in made]),
        "agrees_with_oracle": agreement([choice.shares for choice in made]),
    }
