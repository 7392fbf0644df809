"""From items to rows of equal length: scorers that ask a network several questions of one image, padded with nothing.

A row is (position of its image in the batch, token ids). Rows are run together only when their lengths agree, so that no answer can depend
on another row's padding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One question: `image` is the position of its image, `ids` its tokens."""

    image: int
    ids: tuple[int, ...]


def token_ids(words: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """The tokenizer's ids of each text, in order; equal texts are encoded once, and all in one call."""
    distinct = list(dict.fromkeys(texts))
    found = dict(zip(distinct, words(distinct, **options).input_ids if distinct else [], strict=True))
    return [found[text] for text in texts]


def buckets(keys: Sequence[Hashable], size: int) -> Iterator[list[int]]:
    """Positions grouped by equal key, in order of first appearance, at most `size` at a time; every position comes exactly once."""
    groups: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def answer(rows: Sequence[Row], size: int, run: Callable[[Sequence[Row]], Sequence[float]]) -> list[float]:
    """One number per row, in order, from `run` on rows of equal length, at most `size` at a time."""
    numbers = [0.0] * len(rows)
    for group in buckets([len(row.ids) for row in rows], size):
        for position, number in zip(group, run([rows[position] for position in group]), strict=True):
            numbers[position] = float(number)
    return numbers
