"""One stream of random numbers per sample: noise belongs to the seed, never to the batch, the device or the library's version."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """[len(seeds), count] float64 in [0, 1) on the CPU; row b depends on seeds[b] alone, and its first numbers not on `count`.

    Philox in counter mode, keyed by the whole 64-bit seed (torch's CPU generator keeps only 32 bits of it). NumPy guarantees the raw
    words of its bit generators; the top 53 bits of each word make the number.
    """
    rows = [np.random.Philox(key=seed % 2**64).random_raw(count) >> np.uint64(11) for seed in seeds]
    return torch.from_numpy(np.stack(rows).astype(np.float64) * 2.0**-53)


def streams(seeds: Sequence[int]) -> list[np.random.Philox]:
    """One stream of random words per seed, for noise that is drawn in parts."""
    return [np.random.Philox(key=seed % 2**64) for seed in seeds]


def numbers(sources: Sequence[np.random.Philox], *shape: int) -> Tensor:
    """[len(sources), *shape] float64 in [0, 1) on the CPU, the next ones of each stream; a fresh stream's are those of `uniforms`."""
    words = np.stack([source.random_raw(int(np.prod(shape))) for source in sources]) >> np.uint64(11)
    return torch.from_numpy(words.astype(np.float64) * 2.0**-53).reshape(len(sources), *shape)


def normals(sources: Sequence[np.random.Philox], *shape: int) -> Tensor:
    """[len(sources), *shape] float32 normal numbers on the CPU, the next ones of each stream.

    By inversion, number by number in float64, so that neither the batch nor the processor's vector width touches a bit.
    """
    from scipy.special import ndtri

    words = np.stack([source.random_raw(int(np.prod(shape))) for source in sources]) >> np.uint64(11)
    return torch.from_numpy(ndtri((words + 0.5) * 2.0**-53).astype(np.float32)).reshape(len(sources), *shape)


def draw(log_prob_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """[B] categories by inversion: the first whose cumulative probability exceeds the number. A category of probability 0 is never drawn.

    Cumulative sums are float64, so that a vocabulary of 10^5 entries leaves no visible bias.
    """
    cumulative_BV = log_prob_BV.exp().cumsum(-1, dtype=torch.float64)
    total_B = cumulative_BV[:, -1]
    # Rounding may lift u * total to total itself, past the last category that has any probability.
    target_B = torch.minimum(uniform_B.to(total_B) * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    return torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
