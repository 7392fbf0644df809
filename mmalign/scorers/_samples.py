"""From samples to batches and back: what a scorer refuses to measure, and how batches keep the samples' order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmalign.types import Failure, Sample, Score

if TYPE_CHECKING:
    import numpy as np

MIN_SIDE = 8  # an image with fewer pixels a side shows nothing that a network could judge
MAX_CHARACTERS = 8000  # a context of 77 or 512 tokens would leave out nearly all of a longer text, and the number would mean little

TextSource = Literal["auto", "prompt", "answer", "reasoning"]


@dataclass(frozen=True)
class Item:
    """A sample that can be measured: its pixels (uint8 [H, W, 3], None for text scorers) and its text ("" for image scorers)."""

    sample: Sample
    image: np.ndarray | None = None
    text: str = ""

    @property
    def pixels(self) -> np.ndarray:
        assert self.image is not None, "this scorer did not ask for images"
        return self.image


def score_in_batches(
    samples: Sequence[Sample],
    batch_size: int,
    measure: Callable[[Sequence[Item]], Sequence[Score]],
    *,
    image: bool = True,
    text: TextSource | None = "prompt",
) -> list[Score]:
    """One score per sample, in order: a Failure for what cannot be measured, else what `measure` gives it in its batch.

    A value that is not finite becomes a Failure of kind nonfinite, whatever made it so (damaged weights, an overflow in half precision).
    """
    scores: list[Score] = [Failure("score", "error", "not measured")] * len(samples)
    usable: list[tuple[int, Item]] = []
    for index, sample in enumerate(samples):
        item = item_of(sample, image, text)
        if isinstance(item, Failure):
            scores[index] = item
        else:
            usable.append((index, item))
    for start in range(0, len(usable), batch_size):
        chunk = usable[start : start + batch_size]
        for (index, item), value in zip(chunk, measure([item for _, item in chunk]), strict=True):
            scores[index] = finite(value, item.sample)
    return scores


def item_of(sample: Sample, image: bool, text: TextSource | None) -> Item | Failure:
    """What there is to measure of a sample, or why there is nothing."""
    pixels = image_of(sample) if image else None
    if isinstance(pixels, Failure):
        return pixels
    words = text_of(sample, text) if text else ""
    if isinstance(words, Failure):
        return words
    return Item(sample, pixels, words)


def image_of(sample: Sample) -> np.ndarray | Failure:
    """The sample's pixels; encoded bytes and files are decoded."""
    from mmalign.images import ImageError, check_image, decode_image

    if sample.image is None:
        return Failure("score", "missing", f"The sample {sample.request.id} holds no image.")
    try:
        pixels = decode_image(sample.image) if isinstance(sample.image, (bytes, Path)) else check_image(sample.image)
    except ImageError as error:
        return Failure("score", "error", f"The sample {sample.request.id} has no usable image: {error}")
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        return Failure(
            "score", "error", f"The image of {sample.request.id} has {height} x {width} pixels; expected at least {MIN_SIDE} a side."
        )
    return pixels


def text_of(sample: Sample, source: TextSource) -> str | Failure:
    """The text: prompt, answer, the model's reasoning (`extra["reasoning"]`), or "auto": reasoning if there is some, else prompt."""
    reasoning = str(sample.extra.get("reasoning") or "")
    texts = {"prompt": sample.request.prompt.text, "answer": sample.answer or "", "reasoning": reasoning}
    name = ("reasoning" if reasoning.strip() else "prompt") if source == "auto" else source
    text = texts[name]
    if not text.strip():
        return Failure("score", "missing", f"The {name} of {sample.request.id} is empty; there is no text to score.")
    if len(text) > MAX_CHARACTERS:
        return Failure(
            "score",
            "error",
            f"The {name} of {sample.request.id} has {len(text)} characters; expected at most {MAX_CHARACTERS}, as no scorer reads so many.",
        )
    return text


def finite(value: Score, sample: Sample) -> Score:
    """The value, or a Failure when its number is NaN or infinite."""
    if isinstance(value, Failure) or math.isfinite(value.x):
        return value
    return Failure("score", "nonfinite", f"The score of {sample.request.id} is {value.x}; expected a finite number. Are the weights sound?")


def cut_note(n_tokens: int, limit: int) -> str:
    """The words for a row whose text is longer than the network reads; "" when nothing was cut. Both counts include the special tokens."""
    return f"text cut: {n_tokens} tokens, the first {limit} read" if n_tokens > limit else ""
