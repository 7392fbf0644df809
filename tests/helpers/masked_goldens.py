"""What the golden tests of the masked families share: fixtures, tolerances, and the official samplers' own random numbers."""

import os
from pathlib import Path

import pytest
import torch

SHARED = os.environ.get("MMALIGN_SHARED")
needs_goldens = pytest.mark.skipif(not SHARED, reason="$MMALIGN_SHARED, the folder with goldens/*_fixture.pt, is not set")


def fixture(name):
    return torch.load(Path(str(SHARED)) / "goldens" / f"{name}_fixture.pt", weights_only=True)


def difference(found, reference):
    """Largest difference, asserted to be within the fixtures' tolerance: 1e-5 times the largest reference value, or 1."""
    assert found.shape == reference.shape
    largest = float((found - reference).abs().max())
    assert largest <= 1e-5 * max(1.0, float(reference.abs().max()))
    return largest


def full_rows(values, slots, tokens, fill):
    """[B, K, ...] values at their slots among all N tokens, `fill` elsewhere: the originals draw for decided tokens too."""
    whole = torch.full((len(slots), tokens, *values.shape[2:]), fill)
    index = slots.view(*slots.shape, *[1] * (values.dim() - 2)).expand_as(values)
    return whole.scatter(1, index, values)


class ShowoNoise:
    """Show-o's and MMaDA's numbers: one multinomial over all tokens of the batch, then uniforms for their order."""

    def __init__(self, seed, tokens):
        self.generator, self.tokens = torch.Generator().manual_seed(seed), tokens

    def codes(self, log_prob, step, slots, is_hidden):
        probabilities = full_rows(log_prob.exp(), slots, self.tokens, 1.0)
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=self.generator).view(probabilities.shape[:2])
        return drawn.gather(1, slots)

    def gumbel(self, step, slots):
        uniform = torch.empty(len(slots), self.tokens).uniform_(0, 1, generator=self.generator)
        return -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log().gather(1, slots)


class DimooNoise:
    """Lumina-DiMOO's numbers: Gumbel noise for every code of every hidden token, then for their order (one sample)."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def codes(self, log_prob, step, slots, is_hidden):
        assert is_hidden.all()
        return (log_prob + self._noise(log_prob.shape)).argmax(-1)

    def gumbel(self, step, slots):
        return self._noise(slots.shape)

    def _noise(self, shape):
        return -(-(torch.rand(shape, generator=self.generator) + 1e-20).log() + 1e-20).log()
