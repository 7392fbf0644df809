"""The long reference: constrained least squares on masks of the Shapley kernel (KernelSHAP), as many as patience allows.

Sizes follow the kernel, (N - 1) / (s (N - s)), every mask comes with its complement, and the sum of the credit is fixed. With pairs the
least squares of v(z) on z is that of v(z) - v(1 - z) on 2z - 1, so even interactions cancel. It converges to the Shapley values; the
distance between its two halves says how far it has come.

Source: Lundberg and Lee 2017 (KernelSHAP), Covert and Lee 2021 (paired sampling).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmalign.attribution.game import Game, ends


def kernel_shap(game: Game, evaluations: int, seed: int = 0, batch: int = 512) -> tuple[Tensor, Tensor]:
    """Credit [B, h, w] from about `evaluations` per picture and the same from each half of them [2, B, h, w]."""
    players = game.grid[0] * game.grid[1]
    generator = torch.Generator().manual_seed(seed)
    full, empty = ends(game)
    sizes = torch.arange(1, players, dtype=torch.float64)
    odds = 1 / (sizes * (players - sizes))
    gram = torch.zeros(2, players, players, dtype=torch.float64, device=game.device)
    right = torch.zeros(2, game.count, players, dtype=torch.float64, device=game.device)
    for number in range(-(-evaluations // (2 * batch))):
        size = sizes[torch.multinomial(odds, batch, replacement=True, generator=generator)]
        rank = torch.rand(batch, players, generator=generator).argsort(1).argsort(1)
        masks = (rank < size[:, None]).reshape(batch, *game.grid).to(game.device)
        signs = masks.flatten(1).double() * 2 - 1
        gram[number % 2] += signs.T @ signs
        for picture in range(game.count):
            index = torch.full((2 * batch,), picture, device=game.device)
            found = game.rows(index, torch.cat([masks, ~masks])[:, None])
            right[number % 2, picture] += signs.T @ (found[:batch] - found[batch:])
    solved = torch.stack([_constrained(a, b, full - empty) for a, b in [(gram.sum(0), right.sum(0)), *zip(gram, right, strict=True)]])
    maps = solved.unflatten(2, game.grid)
    return maps[0], maps[1:]


def _constrained(gram_NN: Tensor, right_BN: Tensor, total_B: Tensor) -> Tensor:
    """argmin of the least squares with sum = total."""
    ones = torch.ones(len(gram_NN), 1, dtype=gram_NN.dtype, device=gram_NN.device)
    solved = torch.linalg.lstsq(gram_NN, torch.cat([right_BN.T, ones], 1)).solution
    free, direction = solved[:, :-1], solved[:, -1:]
    return (free + direction * (total_B - free.sum(0)) / direction.sum()).T
