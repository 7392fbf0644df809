"""Rows of token ids: padding, and Show-o's row of a prompt to draw, which MMaDA shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(rows: Sequence[Sequence[int]], pad: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """ids [B, L] and mask [B, L] (True = real) with padding before the text; L is the longest row, or `width`."""
    width = max(map(len, rows)) if width is None else width
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    return ids, torch.arange(width) >= width - torch.tensor([len(row) for row in rows])[:, None]


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """ids [B, L] and mask [B, L] (True = real) with padding after the text."""
    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [pad] * (width - len(row)) for row in rows])
    return ids, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def prompt_row(task: int, text: Sequence[int], end: int, slots: int) -> list[int]:
    """The task's token, the text, its end; cut so that it fits into the slots and still ends (prompting_utils.py of both)."""
    row = [task, *text, end]
    return row if len(row) <= slots else [*row[: slots - 1], end]
