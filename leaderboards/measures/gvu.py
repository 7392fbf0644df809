"""GvU's claims about its reward: what lowers it, what it tells apart, and how it depends on the prompt's length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import numpy as np
import torch

from mmalign import hub, registry
from mmalign.grpo import sequence_probability
from mmalign.testbed import corpus, oracle
from mmalign.testbed.measure import caption_ranking
from mmalign.testbed.render import render
from mmalign.testbed.world import (
    COLORS,
    HELD_OUT,
    KINDS,
    REGIONS,
    SHAPES,
    SIZES,
    Clause,
    facts,
    realise,
    sample_prompts,
    spoil,
    strict,
    text_of,
)
from mmalign.trajectory import Policy

FOLDS = ("geometric", "product", "arithmetic")


@cache
def model(name: str) -> Any:
    spec = hub.resolve_model(name)
    return registry.load(registry.find("models", spec.family)).load(spec.path)


def reward(judge: Any, pictures: np.ndarray, texts: list[str], fold: str = "geometric") -> np.ndarray:
    """P(text | picture) as GvU folds its tokens, [B]."""
    with torch.no_grad():
        log_prob, mask = judge.text_log_prob([corpus.DESCRIBE] * len(texts), list(pictures), texts)
    return sequence_probability(log_prob.double(), mask, fold).numpy()


def removed_words(seed: int, pictures: int = 64, judge: str = "tiny-janus") -> dict[str, float]:
    """Mean reward of right pictures for a prompt without some of its facts, or with one of them wrong, as a share of that for the whole
    prompt (1: nothing is lost). Only facts that the world's grammar leaves open are removed; a prompt without a count is none here."""
    rng = Random(f"removed words/{seed}")
    clauses: list[Clause] = []
    scenes = []
    while len(clauses) < pictures:
        shape, color = rng.choice(SHAPES), rng.choice(COLORS)
        clause = Clause(shape, rng.choice((2, 3)), color, rng.choice(SIZES), rng.choice(tuple(REGIONS)))
        scene = None if (shape, color) in HELD_OUT else realise((clause,), rng)
        if scene is not None:
            clauses.append(clause)
            scenes.append(scene)
    shown = render(scenes)

    def none(clause: Clause) -> None:
        return None

    def mean_reward(**changed: Callable[[Clause], Any]) -> float:
        said = [replace(clause, **{name: value(clause) for name, value in changed.items()}) for clause in clauses]
        return float((reward(model(judge), shown, [text_of((clause,)) for clause in said]) / base).mean())

    base = reward(model(judge), shown, [text_of((clause,)) for clause in clauses])
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
    return {
        "no size": mean_reward(size=none),
        "no color": mean_reward(color=none),
        "no region": mean_reward(region=none),
        "no color, no region": mean_reward(color=none, region=none),
        "wrong count": mean_reward(count=lambda clause: 5 - clause.count),
        "wrong color": mean_reward(color=lambda clause: rng.choice([color for color in COLORS if color != clause.color])),
        "wrong region": mean_reward(region=lambda clause: opposite[str(clause.region)]),
    }


def length_bias(seed: int, pictures: int = 128, judge: str = "tiny-janus") -> dict[str, float]:
    """Size of the correlation between the reward of right pictures and the number of words, for each way to fold the tokens."""
    stream = [item for _, item in zip(range(pictures), sample_prompts("val", KINDS, 70_000 + seed), strict=False)]
    texts, shown = [text_of(clauses) for _, clauses, _ in stream], render([scene for _, _, scene in stream])
    words = [len(text.split()) for text in texts]
    return {fold: float(abs(np.corrcoef(words, reward(model(judge), shown, texts, fold))[0, 1])) for fold in FOLDS}


def drawn(seed: int, prompts: int, each: int, name: str, guidance: float = 1.25) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Pictures that a model draws, their prompts, and which are right in everything; rows of one prompt are neighbours."""
    stream = [item for _, item in zip(range(prompts), sample_prompts("val", KINDS, 71_000 + seed), strict=False)]
    texts = [text_of(clauses) for _, clauses, _ in stream for _ in range(each)]
    made = model(name)
    with torch.no_grad():
        codes = made.sample(made.encode_prompts(texts), Policy(guidance, 1.0), [1000 * seed + row for row in range(len(texts))]).actions
        pixels = (made.decode(codes) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    readings = oracle.read(pixels)
    asked = [clauses for _, clauses, _ in stream for _ in range(each)]
    right = [strict(clauses, reading.scene, reading.unclear) for clauses, reading in zip(asked, readings, strict=True)]
    return pixels, texts, np.array(right)


def reward_tells_right_from_wrong(seed: int, prompts: int = 32, each: int = 8, judge: str = "tiny-janus") -> dict[str, float]:
    """Within a prompt: the probability that a right picture has more reward than a wrong one (0.5: no better than chance)."""
    pictures, texts, right = drawn(seed, prompts, each, judge)
    rewards = reward(model(judge), pictures, texts)
    wins = [
        float((rewards[rows][right[rows]][:, None] > rewards[rows][~right[rows]][None]).mean())
        for rows in np.arange(prompts * each).reshape(prompts, each)
        if 0 < right[rows].sum() < each
    ]
    return {"auc": float(np.mean(wins))}


def understanding_and_drawing(seed: int, pairs: int = 128, prompts: int = 32, each: int = 4, name: str = "tiny-janus") -> dict[str, float]:
    """How often the true caption is ranked first, and how often a drawing is right."""
    return {"understanding": caption_ranking(model(name), pairs, seed), "drawing": float(drawn(seed, prompts, each, name)[2].mean())}


def wrong_facts(seed: int, pictures: int = 128, judge: str = "tiny-janus") -> dict[str, float]:
    """Mean reward by how many facts of the prompt a rendered picture breaks, as a share of that of right pictures."""
    rng = Random(f"wrong facts/{seed}")
    texts, right, once, twice = [], [], [], []
    for _, clauses, scene in sample_prompts("val", KINDS, 72_000 + seed):
        bad = spoil(scene, rng)
        worse = spoil(bad, rng)
        broken = [sum(not holds for holds in facts(clauses, shown).values()) for shown in (bad, worse)]
        if 0 < broken[0] < broken[1]:
            texts.append(text_of(clauses))
            right.append(scene), once.append(bad), twice.append(worse)
        if len(texts) == pictures:
            break
    found = [reward(model(judge), render(scenes), texts).mean() for scenes in (right, once, twice)]
    return {"right": 1.0, "few wrong": float(found[1] / found[0]), "more wrong": float(found[2] / found[0])}
