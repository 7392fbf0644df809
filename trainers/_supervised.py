"""What learning from image-text pairs has beside its method: the answers' loss, the figures of a step, the pictures of what was asked.

Suffixes: B samples of a micro-batch, N image tokens, L text tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from mmalign.trainers._grounding import Grounding
from torch import Tensor

from mmalign import distributed
from mmalign.attribution.maps import overlay
from mmalign.loop import Loop, LoopConfig
from mmalign.pairs import Pair, Skipped
from mmalign.store import write_atomic
from mmalign.trajectory import TokenLosses

SHOWN = 4  # pairs of a step whose supervision is kept as pictures
SKIPPED = "skipped.json"
WHITE, GREY, RED = (np.array(colour) for colour in ((255, 255, 255), (150, 150, 150), (214, 39, 40)))


@dataclass(frozen=True)
class SupervisedConfig(LoopConfig):
    """The paper's values for Show-o-256 (its Table 7); the schedule after the warm-up is Show-o's own."""

    steps: int = 5000
    learning_rate: float = 5e-7
    weight_decay: float = 0.01
    warmup: int = 1000
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    micro_batch: int = 4
    save_every: int = 250
    pairs_per_step: int = 20  # batch 4, accumulated 5 times; over all processes
    unconditional: float = 0.1  # share of samples that are drawn from the empty prompt, for guidance
    instruction: str = "Draw this picture."  # the text where the caption is left out
    answer_weight: float = 1.0  # lambda of the image-to-text loss; 0 leaves it out
    questions: str = ""  # pairs with question and answer for that loss, as --data; "": the pairs themselves
    question: str = "Describe the image."  # of pairs that have none; their caption is the answer


@dataclass(frozen=True)
class Shown:
    """What is to be seen of one pair: its caption's tokens, its grounding, its hints (bool [N])."""

    words: tuple[str, ...]
    grounding: Grounding
    hint: Tensor | None


def add_answers(config: SupervisedConfig, model: Any, loop: Loop, pairs: Sequence[Pair], tally: Tally) -> None:
    """Adds the gradient of the image-to-text loss (eq. 2): the mean over an answer's tokens, then over answers."""
    for first in range(0, len(pairs), config.micro_batch):
        batch = pairs[first : first + config.micro_batch]
        questions = [pair.question if pair.answer else config.question for pair in batch]
        answers = [pair.answer or pair.prompt.text for pair in batch]
        with loop.autocast():
            log_prob_BL, mask_BL = model.text_log_prob(questions, [pair.image for pair in batch], answers)
        loss_B = -(log_prob_BL.float() * mask_BL).sum(1) / mask_BL.sum(1)
        total = config.answer_weight * loss_B.sum() / config.pairs_per_step
        loop.backward(total, {"answers": loss_B}, [pair.prompt for pair in batch])
        tally.add(answers=float(loss_B.detach().sum()), answered=len(batch))


class Tally:
    """Sums of one step over its micro-batches, and over processes when they are logged."""

    NAMES = (
        *("drawing", "drawn", "hidden", "tokens", "answers", "answered"),
        *("hinted", "hinted_right", "hinted_loss", "other", "other_right", "other_loss"),
    )

    def __init__(self, loop: Loop, skipped: Sequence[Skipped]) -> None:
        self.loop, self.skipped = loop, list(skipped)
        self.sums = dict.fromkeys(self.NAMES, 0.0)
        self.has_codes = False

    def add(self, **sums: float) -> None:
        for name, value in sums.items():
            self.sums[name] += value

    def add_drawing(self, losses: TokenLosses, hint_BN: Tensor | None) -> None:
        """Counts scored tokens that a hint showed and those that none did, and how often the right code was the most probable."""
        scored = losses.scored
        self.add(drawing=float(losses.mean.detach().sum()), drawn=len(scored), hidden=float(scored.sum()), tokens=scored.numel())
        hinted = torch.zeros_like(scored) if hint_BN is None else hint_BN.to(scored.device)
        if hinted.shape != scored.shape:  # the understanding's tokens are not the drawing's: hints show no token in particular
            return
        self.has_codes = losses.right is not None
        for name, part in (("hinted", scored & hinted), ("other", scored & ~hinted)):
            right = 0.0 if losses.right is None else float((losses.right & part).sum())
            found = {name: float(part.sum()), f"{name}_right": right, f"{name}_loss": float((losses.loss.detach() * part).sum())}
            self.add(**found)

    def log(self, answer_weight: float) -> None:
        """`copy_rate` and `fill_rate`: how often the most probable code is right where a hint showed the token and where none did."""
        loop, total = self.loop, {name: distributed.total(value) for name, value in self.sums.items()}
        drawing = total["drawing"] / total["drawn"]
        loop.log(**{"loss/drawing": drawing}, hidden=total["hidden"] / total["tokens"])
        answers = total["answers"] / total["answered"] if total["answered"] else 0.0
        if total["answered"]:
            loop.log(**{"loss/answers": answers})
        loop.log(loss=drawing + answer_weight * answers)
        for name, rate in (("hinted", "copy_rate"), ("other", "fill_rate")):
            if total[name]:
                loop.log(**{f"loss/{name}": total[f"{name}_loss"] / total[name]})
                if self.has_codes:
                    loop.log(**{rate: total[f"{name}_right"] / total[name]})
        self._keep_skipped()

    def _keep_skipped(self) -> None:
        """skipped.json: every pair that could not be read so far, and why. A step that is done again adds nothing."""
        skipped = distributed.gather(self.skipped)
        self.loop.log(skipped=len(skipped))
        file = self.loop.run / SKIPPED
        if skipped and distributed.rank() == 0:
            known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            for item in skipped:
                if item.name not in known and self.loop.say:
                    self.loop.say(f"warning   skipped {item.name}: {item.reason}")
                known[item.name] = item.reason
            write_atomic(file, (json.dumps(known, indent=1, ensure_ascii=False) + "\n").encode())


def keep_supervision(
    loop: Loop, pixels_BCHW: Tensor, shown: Sequence[Shown], hidden_BN: Tensor, scored_BN: Tensor, texts: Sequence[str]
) -> None:
    """Keeps, for a few pairs: the picture, its grounding map, its hints (the rest faded), and what the model saw and learned (hidden tokens
    grey, red where the loss counts them). The caption is the text with the chosen words in brackets. Without grounding, map and hints are
    left out."""
    pictures = []
    for row in range(min(SHOWN, len(pixels_BCHW))):
        image = (pixels_BCHW[row].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        panels, caption = [image], texts[row]
        if shown:
            caption = marked(shown[row].words, shown[row].grounding.chosen.tolist())
            panels.append(overlay(image, _square(shown[row].grounding.map)))
            hint = shown[row].hint
            panels += [] if hint is None else [_painted(image, ~_square(hint), WHITE, 0.8)]
        learned = _painted(image, _square(hidden_BN[row].cpu()), GREY, 1.0)
        panels.append(_painted(learned, _square(scored_BN[row].cpu()), RED, 0.35))
        pictures.append((np.concatenate(panels, axis=1), caption))
    loop.keep("grounding", pictures)


def marked(words: Sequence[str], chosen: Sequence[bool]) -> str:
    """The text of tokens, the chosen ones in brackets."""
    pieces = []
    for word, is_chosen in zip(words, chosen, strict=True):
        bare = word.strip()
        pieces.append(word.replace(bare, f"[{bare}]", 1) if is_chosen and bare else word)
    return "".join(pieces).strip()


def _square(values_N: Tensor) -> Tensor:
    side = math.isqrt(len(values_N))
    return values_N.view(side, -1)


def _painted(image_HWC: np.ndarray, where_DD: Tensor, colour: np.ndarray, strength: float) -> np.ndarray:
    """The image with the colour laid over its marked tokens."""
    height, width = image_HWC.shape[:2]
    mask = where_DD.numpy().repeat(height // where_DD.shape[0], 0).repeat(width // where_DD.shape[1], 1)[..., None]
    return np.where(mask, image_HWC * (1 - strength) + colour * strength, image_HWC).round().astype(np.uint8)
