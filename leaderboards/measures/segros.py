"""SeGroS's claims that need no training: where its map and its masks fall, which words it keeps, what hints tell, what the map costs."""

from __future__ import annotations

import itertools
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from mmalign.leaderboards.measures.dense_reward import area_under_curve
from mmalign.leaderboards.measures.gvu import model
from mmalign.trainers._grounding import Affinity, Grounding, ground, perturbed, top
from mmalign.trainers._supervised import Tally
from mmalign.trainers.segros import Config, Roles, add_drawing, roles_of
from scipy.special import ndtr, ndtri
from torch import Tensor

from mmalign import hub, registry
from mmalign.attribution import Attribution, attribute
from mmalign.loop import Loop
from mmalign.models._harmon import LEAST_HIDDEN, SPREAD
from mmalign.models.layers.noise import uniforms
from mmalign.pairs import Pair
from mmalign.scorers import shapes
from mmalign.testbed import corpus, pairs
from mmalign.testbed.crowds import scenes
from mmalign.testbed.render import SIZE, render
from mmalign.testbed.world import COLORS, HELD_OUT, SHAPES, SIDE, SIZES, Clause, Scene, Thing, noun, sample_prompts, strict, text_of
from mmalign.trajectory import Supervision, TextTokens
from mmalign.types import Prompt, digest

MODEL = "tiny-showo"
PAPER = Config()
SHOWN = {*COLORS, *SIZES, *(noun(shape, count) for shape in SHAPES for count in (1, 2))}  # words of what one place of a picture can show
FILLER = "yes, in the image there is"  # words that the model knows from questions and that no place of a picture shows
SMALL = ("colors", "color_attr", "pp_color_spatial_attr", "pp_size_spatial_attr")  # kinds of prompts with at most some hundred scenes


@dataclass(frozen=True)
class Crowd:
    """Prompts, pictures [B, 3, S, S] with things beside that no prompt names, what a model reads of both before its transformer (visual
    tokens [B, N, E]), and the tokens in which something is that the prompt names, bool [B, N]."""

    prompts: list[Prompt]
    pixels: Tensor
    texts: list[TextTokens]
    visual: Tensor
    spoken: Tensor


@cache
def crowd(seed: int, pictures: int, name: str) -> Crowd:
    """Pictures that no training saw; the oracle says where the named things are."""
    prompts, drawn = scenes("val", pictures, 200 + seed)
    x = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    truth = attribute(Attribution(tool="oracle", grid=SIZE), shapes.ShapesScorer(shapes.Config()), x, prompts).weights
    spoken = F.adaptive_max_pool2d(truth, model(name).grid).flatten(1) > 0
    pixels = model(name).fit(list(drawn))
    with torch.no_grad():
        texts, visual = model(name).text_features([prompt.text for prompt in prompts]), model(name).image_features(pixels)
    return Crowd(prompts, pixels, texts, visual, spoken)


def grounded(
    texts: Sequence[TextTokens],
    visual_BNE: Tensor,
    affinities: Sequence[Affinity] = PAPER.affinities,
    temperature: float = PAPER.temperature,
) -> list[Grounding]:
    """Each pair's grounding as the trainer's defaults have it; without affinities every word counts."""
    options = (PAPER.text_ratio, temperature, affinities, PAPER.diagonal)
    return [ground(text.features, seen, *options) for text, seen in zip(texts, visual_BNE, strict=True)]


def maps(found: Sequence[Grounding]) -> Tensor:
    """[B, N]"""
    return torch.stack([item.map for item in found])


def seeds_of(seed: int, purpose: str, number: int) -> list[int]:
    return [int(digest(seed, purpose, row)[:15], 16) for row in range(number)]


# -- where the map is ---------------------------------------------------------------------------------------------------------------------


def map_quality(seed: int, pictures: int = 64, name: str = MODEL) -> dict[str, float]:
    """The probability that a token of a named thing has more of the grounding map than another (0.5: no better than chance), for the
    model's embeddings (at the trainer's temperature and at others, which the paper leaves open) and for random ones, anew for every
    picture: one for each code and each word. `all words`: without the filter."""
    seen, stream = crowd(seed, pictures, name), torch.Generator().manual_seed(seed)
    texts = [TextTokens(redrawn(text.features, stream), text.words) for text in seen.texts]
    visual = torch.stack([redrawn(rows, stream) for rows in seen.visual])
    found = {
        "trained": grounded(seen.texts, seen.visual),
        "trained, all words": grounded(seen.texts, seen.visual, ()),
        "random": grounded(texts, visual),
        "random, all words": grounded(texts, visual, ()),
        **{f"trained, temperature {t}": grounded(seen.texts, seen.visual, temperature=t) for t in (0.02, 0.05, 0.3)},
    }
    return {arm: area_under_curve(maps(made), seen.spoken) for arm, made in found.items()}


def redrawn(rows_NE: Tensor, stream: torch.Generator) -> Tensor:
    """Random rows in place of these, equal where these are equal."""
    different, which = rows_NE.unique(dim=0, return_inverse=True)
    return torch.randn(different.shape, generator=stream)[which]


def filtered_maps(seed: int, pictures: int = 64, name: str = MODEL) -> dict[str, float]:
    """The same probability when the map is made of the words that the filter keeps (or a half of it), of all, of a longer text with
    filler words (all of it, and filtered), and of the words of what can be seen."""
    seen = crowd(seed, pictures, name)
    with torch.no_grad():
        longer = model(name).text_features([f"{FILLER} {prompt.text}" for prompt in seen.prompts])
    content = [TextTokens(text.features[can_be_seen(text.words)], ()) for text in seen.texts]
    sources = {
        "filtered": grounded(seen.texts, seen.visual),
        "intra": grounded(seen.texts, seen.visual, ("intra",)),
        "inter": grounded(seen.texts, seen.visual, ("inter",)),
        "all": grounded(seen.texts, seen.visual, ()),
        "filler": grounded(longer, seen.visual, ()),
        "filler, filtered": grounded(longer, seen.visual),
        "content": grounded(content, seen.visual, ()),
    }
    return {arm: area_under_curve(maps(found), seen.spoken) for arm, found in sources.items()}


def kept_words(seed: int, pictures: int = 64, name: str = MODEL) -> dict[str, float]:
    """The share of words of what can be seen (shapes, colours, sizes) among a text's tokens and among those that a filter keeps, and the
    share of such words that it keeps; means over texts."""
    seen = crowd(seed, pictures, name)
    content = [can_be_seen(text.words).double() for text in seen.texts]
    found = {"share": float(torch.stack([one.mean() for one in content]).mean())}
    halves: dict[str, tuple[Affinity, ...]] = {"intra": ("intra",), "inter": ("inter",), "both": ("intra", "inter")}
    for arm, affinities in halves.items():
        kept = [item.chosen for item in grounded(seen.texts, seen.visual, affinities)]
        found[arm] = float(torch.stack([one[chosen].mean() for one, chosen in zip(content, kept, strict=True)]).mean())
        recalled = [one[chosen].sum() / one.sum() for one, chosen in zip(content, kept, strict=True)]
        found[f"{arm}, recall"] = float(torch.stack(recalled).mean())
    return found


def can_be_seen(words: Sequence[str]) -> Tensor:
    """bool [L] the tokens that are, or are parts of, words of what one place of a picture can show."""
    ends = list(itertools.accumulate(map(len, words)))
    spans = [match.span() for match in re.finditer(r"\w+", "".join(words)) if match.group() in SHOWN]
    return torch.tensor(
        [any(begin < end and end - len(word) < stop for begin, stop in spans) for word, end in zip(words, ends, strict=True)]
    )


# -- what is hidden and hinted ------------------------------------------------------------------------------------------------------------


def wasted(seed: int, pictures: int = 64, name: str = MODEL) -> dict[str, float]:
    """The share of hidden tokens without anything that the text names, for masks at random and by the map: as many as Show-o hides, with
    the share of the model's loss on them (given the text alone), and as many as Harmon hides."""
    seen, seeds = crowd(seed, pictures, name), seeds_of(seed, "mask", pictures)
    numbers = {"": model(name).hidden_number(seeds), ", Harmon": harmon_number(uniforms(seeds, 1)[:, 0], seen.spoken.shape[1])}
    found = {}
    for (law, hidden_B), arm in itertools.product(numbers.items(), ("random", "grounded")):
        noise = PAPER.noise if arm == "grounded" else math.inf
        rows = zip(grounded(seen.texts, seen.visual), seeds_of(seed, arm, pictures), hidden_B, strict=True)
        hidden = torch.stack([top(perturbed(item.map, noise, one), int(number)) for item, one, number in rows])
        found[arm + law] = float((hidden & ~seen.spoken).sum() / hidden.sum())
        if not law:
            loss = losses(seen.prompts, seen.pixels, name, Supervision(hidden=hidden))
            found[f"{arm}, loss"] = float(loss[~seen.spoken].sum() / loss.sum())
    return found


def harmon_number(uniform_B: Tensor, tokens: int) -> Tensor:
    """int [B] how many of so many tokens Harmon hides: a share of the normal distribution around 1, cut at 0.7 and 1, rounded up."""
    low = ndtr((LEAST_HIDDEN - 1) / SPREAD)
    return torch.from_numpy(1 + SPREAD * ndtri(low + uniform_B.numpy() * (0.5 - low))).mul(tokens).ceil().long()


def coverage(seed: int, pictures: int = 64, draws: int = 8, name: str = MODEL) -> dict[str, float]:
    """The share of a picture's tokens that are ever a hint, and ever hidden, in so many draws of the same pair, for levels of noise."""
    seen = crowd(seed, pictures, name)
    found = grounded(seen.texts, seen.visual)
    drawn = [
        (model(name).hidden_number(seeds_of(seed, f"mask {n}", pictures)), seeds_of(seed, f"noise {n}", pictures)) for n in range(draws)
    ]
    shares = {}
    for noise in (0.0, 0.25, 0.5, 1.0):
        hinted, hidden = torch.zeros_like(seen.spoken), torch.zeros_like(seen.spoken)
        for numbers, seeds in drawn:
            roles = [roles_of(g.map, one, n_hidden=int(n), noise=noise) for g, one, n in zip(found, seeds, numbers, strict=True)]
            hinted, hidden = hinted | _stacked(roles, "hint"), hidden | _stacked(roles, "hidden")
        shares[f"hinted {noise:g}"] = float(hinted.double().mean())
        shares[f"hidden {noise:g}"] = float(hidden.double().mean())
    return shares


def _stacked(roles: Sequence[Roles], name: str) -> Tensor:
    return torch.stack([getattr(role, name) for role in roles])


@torch.no_grad()
def losses(prompts: Sequence[Prompt], pixels_BCHW: Tensor, name: str, given: Supervision) -> Tensor:
    """[B, N] the model's cross-entropy of hidden tokens, 0 elsewhere."""
    encoded = model(name).encode_prompts([prompt.text for prompt in prompts])
    return model(name).token_losses(encoded, pixels_BCHW, [0] * len(prompts), given=given).loss


# -- what hints tell ----------------------------------------------------------------------------------------------------------------------


def uncertainty(seed: int, prompts: int = 4, name: str = MODEL) -> dict[str, float]:
    """Exact entropies, in nats, of the scene: given a text, of which every scene that fulfils it is as probable, and given the hints
    beside the text. Hints are the codes at the map's top 30% (no noise) in their order, without their places."""
    stream = sample_prompts("val", SMALL, 80_000_000 + seed)
    found: dict[str, list[float]] = {"text": [], "text and hints": []}
    for _, clauses, _ in itertools.islice(stream, prompts):
        pixels = model(name).fit(list(render(fulfilling(clauses))))
        with torch.no_grad():
            visual, text = model(name).image_features(pixels), model(name).text_features([text_of(clauses)])
        codes = visual.flatten(0, 1).unique(dim=0, return_inverse=True)[1].view(visual.shape[:2])
        hint = _stacked([roles_of(item.map, 0, noise=0.0) for item in grounded(text * len(pixels), visual)], "hint")
        alike = Counter(tuple(row[chosen].tolist()) for row, chosen in zip(codes, hint, strict=True))
        found["text"].append(math.log(len(pixels)))
        found["text and hints"].append(sum(number * math.log(number) for number in alike.values()) / len(pixels))
    return {arm: sum(values) / len(values) for arm, values in found.items()}


def fulfilling(clauses: Sequence[Clause]) -> list[Scene]:
    """Every scene in which the clauses are strictly true; without the pairs of shape and colour that training never shows."""
    cells = list(itertools.product(range(SIDE), range(SIDE)))
    choices = []
    for clause in clauses:
        colors = [clause.color] if clause.color else [color for color in COLORS if (clause.shape, color) not in HELD_OUT]
        looks = list(itertools.product(colors, [clause.size] if clause.size else SIZES))
        groups = itertools.product(itertools.combinations(cells, clause.count), itertools.product(looks, repeat=clause.count))
        choices.append([tuple(Thing(*c, clause.shape, *look) for c, look in zip(*group, strict=True)) for group in groups])
    made = (tuple(sorted(itertools.chain(*groups))) for groups in itertools.product(*choices))
    return [scene for scene in made if len({(t.row, t.column) for t in scene}) == len(scene) and strict(clauses, scene)]


def loss_given_hints(seed: int, pictures: int = 64, name: str = MODEL) -> dict[str, float]:
    """The model's loss on hidden tokens (by the map, as many as Show-o hides) given the text alone, and with hints before it: the map's,
    as many at random places, and the map's of another picture. The pictures are such as the model learned to draw."""
    drawings = corpus.drawings(pairs.SEED + 1000 + seed, pictures, wrong=0.0, planned=0.0, arranged=True)
    prompts = [Prompt(str(n), drawing.text) for n, drawing in enumerate(drawings)]
    pixels = model(name).fit(list(render([drawing.scene for drawing in drawings])))
    with torch.no_grad():
        texts, visual = model(name).text_features([prompt.text for prompt in prompts]), model(name).image_features(pixels)
    rows = list(zip(maps(grounded(texts, visual)), seeds_of(seed, "noise", pictures), strict=True))
    numbers = model(name).hidden_number(seeds_of(seed, "mask", pictures))
    roles = [roles_of(map_N, one, n_hidden=int(number)) for (map_N, one), number in zip(rows, numbers, strict=True)]
    by_chance = _stacked([roles_of(map_N, one, hints="random") for map_N, one in rows], "hint")
    hidden, hint = _stacked(roles, "hidden"), _stacked(roles, "hint")
    hints = torch.stack([seen[chosen] for seen, chosen in zip(visual, hint, strict=True)])
    arms = {
        "text": None,
        "text and hints": hints,
        "random hints": torch.stack([seen[chosen] for seen, chosen in zip(visual, by_chance, strict=True)]),
        "another's hints": hints.roll(1, 0),
    }
    return {
        arm: float((losses(prompts, pixels, name, Supervision(hidden=hidden, hints=before)).sum(1) / hidden.sum(1)).mean())
        for arm, before in arms.items()
    }


# -- what the map costs -------------------------------------------------------------------------------------------------------------------


def step_seconds(seed: int, steps: int = 8, name: str = MODEL) -> dict[str, float]:
    """Processor seconds of forward and backward of a micro-batch with the grounding map and with as many hints at random places and a
    mask at random in its place, in turn; and their ratio."""
    spec = hub.resolve_model(name)
    own = registry.load(registry.find("models", spec.family)).load(spec.path)  # a loop sets what learns: not on the shared one
    arms = {"with": Config(seed=seed), "without": Config(seed=seed, hints="random", context="random")}
    drawings = corpus.drawings(pairs.SEED + 2000 + seed, PAPER.micro_batch * (steps + 1), wrong=0.0, planned=0.0)
    pictures = render([drawing.scene for drawing in drawings])
    data = [Pair(Prompt(str(n), item.text), image) for n, (item, image) in enumerate(zip(drawings, pictures, strict=True))]
    spent = dict.fromkeys(arms, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(PAPER, own, Path(folder))
        for step, (arm, config) in itertools.product(range(steps + 1), arms.items()):
            batch = data[step * config.micro_batch : (step + 1) * config.micro_batch]
            begun = time.process_time()
            add_drawing(config, own, loop, batch, Tally(loop, []), is_shown=False)
            spent[arm] += (time.process_time() - begun) * (step > 0)  # the first one warms up
            loop.optimizer.zero_grad(set_to_none=True)
    return {**{arm: seconds / steps for arm, seconds in spent.items()}, "ratio": spent["with"] / spent["without"]}
