"""SeGroS: learn from image-text pairs where text and picture meet. RecA and plain fine-tuning are its other settings.

Paper: SeGroS (Semantically-Grounded Supervision). The words of the caption that the picture shows give a map of where it shows them
(`_grounding.py`). The parts of the picture highest in it stand before the text as visual hints; the lowest stay visible, so that what is
hidden and learned is what the text speaks of, with the family's own loss on hidden tokens alone. L = L_drawing + lambda L_answers (eq. 13).

`method` names three settings of four choices, each of which can be set by itself (the paper's Tables 3, 5 and 9):

    method   hints       hint_ratio       context    caption
    segros   top         0.3 (Table 7)    bottom     yes
    reca     all         1                random     no      RecA (arXiv 2509.07295): all visual tokens are hints, the text is `instruction`
    sft      none        0                random     yes

Not in the paper's public text, chosen here: the temperature, `diagonal` and the least number of words (`_grounding.py`); the share of the
hidden tokens that the drop-loss variant scores (`scored_share`); the text beside RecA's hints (`instruction`); `unconditional`, which is
Show-o's own share; the mean over an answer's tokens, then over answers. Hints are what the model's understanding reads of a picture; they
keep their order but not their places. Where it reads the very codes that are to be drawn, as in Show-o without CLIP, hints can be copied:
`copy_rate` is logged, and `hint_side` takes hints from a smaller picture. The defaults are the paper's for Show-o-256; recipes hold those
of the other backbones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmalign.trainers._grounding import Affinity, Diagonal, Grounding, count, ground, perturbed, top
from mmalign.trainers._supervised import Shown, SupervisedConfig, Tally, add_answers, keep_supervision
from torch import Tensor

from mmalign.loop import Loop
from mmalign.pairs import Pair, Pairs, open_pairs
from mmalign.reward import Reward
from mmalign.trajectory import Supervision
from mmalign.types import Prompt, UsageError

REWARD = None
DATA = "pairs"  # what --data gives; the trainers beside this one take prompts

SETTINGS: dict[str, tuple[str, str, bool]] = {  # hints, context, caption
    "segros": ("top", "bottom", True),
    "reca": ("all", "random", False),
    "sft": ("none", "random", True),
}


@dataclass(frozen=True)
class Config(SupervisedConfig):
    method: Literal["segros", "reca", "sft"] = "segros"
    hints: Literal["", "top", "bottom", "random", "all", "none"] = ""  # "": the method's
    hint_ratio: float | None = None  # of the visual tokens; None: 0.4 where Show-o draws 512 pixels, else 0.3
    context: Literal["", "bottom", "top", "random"] = ""  # what stays visible; "": the method's
    caption: bool | None = None  # whether the text is the caption; None: the method's
    text_ratio: float = 0.4  # of the caption's tokens that ground
    temperature: float = 0.1  # of every softmax of the grounding
    affinities: tuple[Affinity, ...] = ("intra", "inter")
    diagonal: Diagonal = "after"
    noise: float = 0.5  # uniform, on the map, before tokens are chosen; inf: chance alone
    scored_share: float = 1.0  # of the hidden tokens, the highest in the map, that the loss counts (drop-loss below 1)
    hint_side: int = 0  # pixels to which a picture is made smaller before hints are taken from it (RecA's BAGEL: 224); 0: as it is
    hint_gradient: float = 1.0  # scale of the gradient into the hints (RecA's Harmon: 0.1)
    drop_hint_with_prompt: bool = False  # whether unconditional samples lose their hints too; RecA keeps them

    @property
    def grounds(self) -> bool:
        """Whether anything is chosen by the grounding map."""
        hints, context, _ = self.chosen
        return hints in ("top", "bottom") or context != "random"

    @property
    def chosen(self) -> tuple[str, str, bool]:
        """Hints, context and caption in force."""
        hints, context, caption = SETTINGS[self.method]
        return self.hints or hints, self.context or context, caption if self.caption is None else self.caption

    def __post_init__(self) -> None:
        for name in ("text_ratio", "scored_share", "hint_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is a share above 0 and at most 1, got {value}.")
        if self.temperature <= 0 or self.noise < 0:
            raise ValueError(f"the temperature must be positive and the noise not negative, got {self.temperature} and {self.noise}.")


@dataclass(frozen=True)
class Roles:
    """What one pair's tokens are for, bool [N]: hints (None: there are none), hidden and scored (None: the family draws its own)."""

    hint: Tensor | None = None
    hidden: Tensor | None = None
    scored: Tensor | None = None


def train(config: Config, model: Any, reward: Reward | None, pairs: Pairs, loop: Loop) -> None:
    check(config, model)
    questions = open_pairs(config.questions, config.seed, "answer") if config.questions else None
    for step in loop.steps():
        with loop.timer("data"):
            drawn, skipped = pairs.draw(step, config.pairs_per_step)
            asked, unread = (drawn, []) if questions is None else questions.draw(step, config.pairs_per_step)
        tally = Tally(loop, [*skipped, *unread])
        for first in range(0, len(drawn), config.micro_batch):
            add_drawing(config, model, loop, drawn[first : first + config.micro_batch], tally, is_shown=first == 0 and loop.shows)
        if config.answer_weight:
            with loop.timer("answers"):
                add_answers(config, model, loop, asked, tally)
        loop.update()
        tally.log(config.answer_weight)


def add_drawing(config: Config, model: Any, loop: Loop, batch: Sequence[Pair], tally: Tally, is_shown: bool) -> None:
    """Adds the gradient of a micro-batch's drawing loss, the first term of eq. 13."""
    prompts, pixels = [pair.prompt for pair in batch], model.fit([pair.image for pair in batch])
    seeds, (hints, _, is_caption) = loop.seeds(prompts, 1, "mask"), config.chosen
    with loop.timer("grounding"), loop.autocast():
        words, groundings = ground_batch(config, model, prompts, pixels) if config.grounds else ([], [])
    with loop.timer("drawing"):
        with loop.autocast():
            features = None if hints == "none" else model.image_features(_smaller(pixels, config.hint_side))
            roles = assign(config, model, loop, prompts, groundings, features)
            blank = torch.tensor([seed / 2**60 < config.unconditional for seed in loop.seeds(prompts, 1, "blank")])
            given = Supervision(
                hidden=_stacked([role.hidden for role in roles]),
                scored=_stacked([role.scored for role in roles]),
                hints=None if features is None else _picked(features, [role.hint for role in roles], config.hint_gradient),
                hinted=~blank if config.drop_hint_with_prompt else None,
            )
            texts = [prompt.text if is_caption else config.instruction for prompt in prompts]
            losses = model.token_losses(model.encode_prompts(texts), pixels, seeds, blank, given)
        loop.backward(losses.mean.sum() / config.pairs_per_step, {"loss": losses.loss}, prompts)
    is_hint = _stacked([role.hint for role in roles])
    tally.add_drawing(losses, is_hint if given.hinted is None or is_hint is None else is_hint & given.hinted[:, None])
    if is_shown:
        shown = [Shown(*item, role.hint) for item, role in zip(zip(words, groundings, strict=True), roles, strict=False)]
        keep_supervision(loop, pixels, shown, losses.scored if given.hidden is None else given.hidden, losses.scored, texts)


def ground_batch(
    config: Config, model: Any, prompts: Sequence[Prompt], pixels_BCHW: Tensor
) -> tuple[list[tuple[str, ...]], list[Grounding]]:
    """The words of each caption and where its picture shows them. The caption grounds even where the model does not get to read it."""
    with torch.no_grad():
        visual_BNE, texts = model.image_features(pixels_BCHW), model.text_features([prompt.text for prompt in prompts])
    options = (config.text_ratio, config.temperature, config.affinities, config.diagonal)
    return [text.words for text in texts], [ground(text.features, seen, *options) for text, seen in zip(texts, visual_BNE, strict=True)]


def assign(
    config: Config, model: Any, loop: Loop, prompts: Sequence[Prompt], groundings: Sequence[Grounding], features: Tensor | None
) -> list[Roles]:
    """The roles of each pair's tokens. A family's own law says how many of them are hidden."""
    hints, context, _ = config.chosen
    if features is None and not groundings:
        return [Roles()] * len(prompts)
    numbers = None if context == "random" else model.hidden_number(loop.seeds(prompts, 1, "mask"))
    ratio = config.hint_ratio or (0.4 if model.family == "showo" and model.size[0] >= 512 else 0.3)
    maps = [item.map for item in groundings] if features is None or groundings else torch.zeros(features.shape[:2])
    if numbers is not None and len(maps[0]) != math.prod(model.grid):
        raise UsageError(
            f"{model.name} ({model.family}) reads a picture as {len(maps[0])} tokens and draws it as {math.prod(model.grid)}, so a map of "
            "the first cannot choose among the second. Train it with --context random, which leaves the hidden tokens to the family."
        )
    return [
        roles_of(map_N, seed, hints, context, ratio, None if numbers is None else int(numbers[row]), config.noise, config.scored_share)
        for row, (map_N, seed) in enumerate(zip(maps, loop.seeds(prompts, 1, "noise"), strict=True))
    ]


def roles_of(
    map_N: Tensor, seed: int, hints: str = "top", context: str = "bottom", ratio: float = 0.3, n_hidden: int | None = None,
    noise: float = 0.5, scored_share: float = 1.0,
) -> Roles:  # fmt: skip
    """Who is hint, hidden and scored (section 3.4): floor(ratio N) hints; of the perturbed map the `n_hidden` highest are hidden when the
    context is `bottom`, the lowest when it is `top`. Without `n_hidden`, or at random, the family hides its own."""
    score = perturbed(map_N, noise, seed)
    ranked = {"top": score, "bottom": -score, "random": perturbed(map_N, math.inf, seed ^ 1)}
    hint = None if hints == "none" else torch.ones(len(score), dtype=torch.bool)
    if hints in ranked:
        hint = top(ranked[hints], count(ratio, len(score)))
    if n_hidden is None or context == "random":
        return Roles(hint)
    hidden = top(score if context == "bottom" else -score, n_hidden)
    scored = top(score.masked_fill(~hidden, -math.inf), max(1, count(scored_share, n_hidden)))
    return Roles(hint, hidden, scored)


def check(config: Config, model: Any) -> None:
    """UsageError when the model lacks what the method in force needs."""
    hints, context, _ = config.chosen
    needed = ["token_losses"]
    needed += ["text_features", "image_features"] if config.grounds else ["image_features"] if hints != "none" else []
    needed += ["hidden_number"] if context != "random" else []
    needed += ["text_log_prob"] if config.answer_weight else []
    missing = [name for name in needed if not hasattr(model, name)]
    if missing:
        raise UsageError(f"{model.name} ({model.family}) cannot learn from pairs by {config.method}: it has no {', '.join(missing)}.")


def _picked(features_BNE: Tensor, hints: Sequence[Tensor | None], scale: float) -> Tensor:
    """[B, K, E] the features of the hints, in their order; gradients into them are scaled."""
    scaled = features_BNE if scale == 1 else features_BNE * scale + features_BNE.detach() * (1 - scale)
    return torch.stack([row[hint.to(row.device)] for row, hint in zip(scaled, hints, strict=True) if hint is not None])


def _stacked(rows: Sequence[Tensor | None]) -> Tensor | None:
    """[B, N] of rows [N]; None when they are None."""
    known = [row for row in rows if row is not None]
    return torch.stack(known) if known else None


def _smaller(pixels_BCHW: Tensor, side: int) -> Tensor:
    """The pictures with no more detail than `side` pixels hold, at their own size; as they are when that is 0 or no less."""
    if not side or side >= min(pixels_BCHW.shape[-2:]):
        return pixels_BCHW
    small = F.interpolate(pixels_BCHW, (side, side), mode="bilinear", antialias=True)
    return F.interpolate(small, pixels_BCHW.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
