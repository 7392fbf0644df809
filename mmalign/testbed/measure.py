"""What the shipped checkpoints can do, measured on held-out scenes: `python -m mmalign.testbed.measure`.

tiny-janus: how often the true caption outranks one with a changed fact, how often a written plan fulfils its prompt. tiny-showo: the first
of these. tiny-clip: retrieval of the right description among 32. How well pictures are drawn is what the suite `shapes` measures.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import torch

from mmalign.testbed import corpus
from mmalign.testbed.render import render
from mmalign.testbed.world import COLORS, COLUMNS, KINDS, ROWS, SHAPES, SIZES, Thing, facts, plan_of, sample_prompts, text_of


def caption_pairs(number: int, seed: int = 0) -> tuple[np.ndarray, list[str], list[str]]:
    """Held-out pictures, a true caption of each, and the same caption with one fact changed so that it is false of the picture."""
    rng, pictures, true, false = Random(seed), [], [], []
    for _, clauses, scene in sample_prompts("test", KINDS, 90_000_000 + seed):
        changed = corpus.change_one_fact(clauses, rng)
        if changed is None or all(facts(changed, scene).values()):
            continue
        pictures.append(scene)
        true.append(text_of(clauses))
        false.append(text_of(changed))
        if len(true) == number:
            return render(pictures), true, false
    raise AssertionError("the stream of prompts has no end")


def caption_ranking(model: Any, number: int = 200, seed: int = 0) -> float:
    """Share of pictures whose true caption has the greater log-probability under the understanding branch."""
    pictures, true, false = caption_pairs(number, seed)
    totals = []
    with torch.no_grad():
        for captions in (true, false):
            parts = []
            for at in range(0, number, 50):
                part = slice(at, at + 50)
                values, mask = model.text_log_prob([corpus.DESCRIBE] * len(captions[part]), list(pictures[part]), captions[part])
                parts.append((values * mask).sum(-1) / mask.sum(-1))
            totals.append(torch.cat(parts))
    return float((totals[0] > totals[1]).float().mean())


def parse_plan(text: str) -> tuple[Thing, ...] | None:
    """The scene that a plan describes, or None when it is no plan of this world."""
    things = []
    for part in text.strip().split(","):
        words = part.split()
        if len(words) < 4 or words[0] not in SIZES or words[1] not in COLORS or words[2] not in SHAPES:
            return None
        place = words[3:]
        row = next((ROWS.index(word) for word in place if word in ROWS), 1)
        column = next((COLUMNS.index(word) for word in place if word in ("left", "right")), 1)
        things.append(Thing(row, column, words[2], words[1], words[0]))
    return tuple(things)


def plan_accuracy(janus: Any, number: int = 100, seed: int = 0) -> float:
    """Share of greedily written plans that fulfil every fact of their prompt."""
    stream = [item for _, item in zip(range(number), sample_prompts("test", KINDS, 91_000_000 + seed), strict=False)]
    asked = [f"{corpus.PLAN} {text_of(clauses)}" for _, clauses, _ in stream]
    written = janus.generate_text(asked, None, list(range(number)), temperature=0.0, max_tokens=80).texts
    scenes = [parse_plan(text) for text in written]
    return float(np.mean([s is not None and all(facts(clauses, s).values()) for s, (_, clauses, _) in zip(scenes, stream, strict=True)]))


def retrieval(clip: Any, tokenizer: Any, rounds: int = 8, seed: int = 0) -> float:
    """Top-1 rate of picking a held-out picture's full description among 32."""
    from mmalign.testbed.build_clip import features
    from mmalign.testbed.build_janus import pixels_of

    hits = []
    for number in range(rounds):
        stream = sample_prompts("test", KINDS, 92_000_000 + seed + number)
        scenes = [scene for _, (_, _, scene) in zip(range(32), stream, strict=False)]
        with torch.no_grad():
            image, text = features(clip, tokenizer, [plan_of(scene) for scene in scenes], pixels_of(scenes))
        hits.append((image @ text.T).argmax(1) == torch.arange(32))
    return float(torch.cat(hits).float().mean())


def main() -> None:
    from transformers import CLIPModel, CLIPTokenizer

    from mmalign.models import janus as janus_family
    from mmalign.models import showo as showo_family
    from mmalign.testbed.build import CHECKPOINTS

    janus, showo = janus_family.load(CHECKPOINTS / "tiny-janus"), showo_family.load(CHECKPOINTS / "tiny-showo")
    clip = CLIPModel.from_pretrained(CHECKPOINTS / "tiny-clip", dtype=torch.float32).eval()
    figures = {
        **{
            f"{name} true caption ranked first": float(np.mean([caption_ranking(model, 1200, seed) for seed in range(5)]))
            for name, model in {"tiny-janus": janus, "tiny-showo": showo}.items()
        },
        "tiny-janus greedy plan fulfils its prompt": plan_accuracy(janus, 200),
        "tiny-clip top-1 of 32": retrieval(clip, CLIPTokenizer.from_pretrained(CHECKPOINTS / "tiny-clip")),
    }
    for name, value in figures.items():
        print(f"{name:<44} {value:.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
