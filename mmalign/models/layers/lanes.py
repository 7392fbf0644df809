"""Batches of constant shape: how a result is kept from depending on its companions.

The last bits of a matrix product depend on its shape (the library picks its method, and so the order of its sums, by size), but not on
what the other rows hold. So work is cut into lanes of one fixed number of rows, of one padded length each that follows from the row
itself, and a lane that is not full is filled with copies. Measured on CPU in float32: the same bits for batches of 1, 3, 7 and 64.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 16  # rows of a lane: few enough that one request alone is not much work
WIDE = 64  # rows of a wide lane, which uses the processor better, where `Lanes` has found it to give the same bits
SLOTS = 16  # prompts are padded to a multiple of this many tokens


@dataclass(frozen=True)
class Lane:
    """Rows that are computed together: `rows` are indices into the batch, of which those after the first `n_real` are filling."""

    key: Any
    rows: list[int]
    n_real: int

    @property
    def real(self) -> list[int]:
        return self.rows[: self.n_real]


def lanes(keys: Sequence[Hashable], width: int | None) -> Iterator[Lane]:
    """Lanes of rows with equal keys, `width` rows each; with None, one lane per key of all its rows."""
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    for key, rows in groups.items():
        yield from lanes_of(key, rows, width)


def lanes_of(key: Hashable, rows: list[int], width: int | None) -> Iterator[Lane]:
    """Lanes of rows that share one key."""
    for start in range(0, len(rows), width or len(rows) or 1):
        real = rows[start : start + (width or len(rows))]
        yield Lane(key, real + real[-1:] * ((width or len(real)) - len(real)), len(real))


def few(count: int, most: int, is_fixed: bool) -> Iterator[Lane]:
    """Lanes of at most so many rows, all of one key; where shapes are fixed the last one is filled up."""
    for start in range(0, count, most):
        rows = list(range(start, min(start + most, count)))
        yield from lanes_of(None, rows, most if is_fixed else None)


class Lanes:
    """Lanes for a loaded model, which remembers for which kinds of work wide lanes give the bits of narrow ones on this machine."""

    def __init__(self) -> None:
        self._is_wide: dict[Hashable, bool] = {}

    def run(
        self, keys: Sequence[Hashable], width: int | None, wide: int | None, compute: Callable[[Lane], tuple[Tensor, ...]]
    ) -> Iterator[tuple[Lane, tuple[Tensor, ...]]]:
        """Each lane with its tensors [rows, ...]. `keys` name all that shapes the work.

        `width` is that of a lane (None: no fixed shapes, a key is one lane), `wide` that of a wide one (None: there are none).
        """
        for group in lanes(keys, None):
            rows = group.rows
            while width and wide and len(rows) > wide // 2 and self._is_wide.get(group.key, True):
                (lane,) = lanes_of(group.key, rows[:wide], wide)
                made = compute(lane)
                if group.key not in self._is_wide:
                    pairs = zip(made, compute(Lane(group.key, lane.rows[:width], width)), strict=True)
                    self._is_wide[group.key] = all(bool((whole[:width] == part).all()) for whole, part in pairs)
                    if not self._is_wide[group.key]:
                        break
                yield lane, made
                rows = rows[wide:]
            for lane in lanes_of(group.key, rows, width):
                yield lane, compute(lane)


def padded_lengths(lengths: Sequence[int], is_fixed: bool) -> list[int]:
    """For each row the slots it is padded to: the next multiple of SLOTS, or without fixed shapes the longest row."""
    return [-(-length // SLOTS) * SLOTS if is_fixed else max(lengths) for length in lengths]
