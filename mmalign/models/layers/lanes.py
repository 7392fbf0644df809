"""Batches of constant shape: how a result is kept from depending on its companions.

The last bits of a matrix product depend on its shape (the library picks its method, and so the order of its sums, by size), but not on
what the other rows hold. So work is cut into lanes of one fixed number of rows, of one padded length each that follows from the row
itself, and a lane that is not full is filled with copies. Measured on CPU in float32: the same bits for batches of 1, 3, 7 and 64.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

ROWS = 16  # rows of a lane: enough to use the processor well, few enough that one request alone is not much work
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
        for start in range(0, len(rows), width or len(rows)):
            real = rows[start : start + (width or len(rows))]
            yield Lane(key, real + real[-1:] * ((width or len(real)) - len(real)), len(real))


def padded_lengths(lengths: Sequence[int], is_fixed: bool) -> list[int]:
    """For each row the slots it is padded to: the next multiple of SLOTS, or without fixed shapes the longest row."""
    return [-(-length // SLOTS) * SLOTS if is_fixed else max(lengths) for length in lengths]
