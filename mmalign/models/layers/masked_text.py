"""Text of masked language models (LLaDA, arXiv 2502.09992): writing it block by block, and what its log-probability can mean.

Suffixes: B samples, A tokens of an answer, K slots, V vocabulary. Source: ML-GSAI/LLaDA's generation as Gen-Verse/MMaDA at 3cdb870 and
Alpha-VLLM/Lumina-DiMOO at 81344e6 carry it. Changed: the output layer works on the block's hidden tokens only, which are all that the
originals look at; noise comes from one stream per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmalign.models.layers.masked import HIDDEN, LogitsAt, first_slots
from mmalign.models.layers.noise import draw, uniforms
from mmalign.types import UsageError

Estimator = Literal["one_step", "mc"]


@dataclass(frozen=True)
class Written:
    """Token ids [B, A] and the log-probability of each when it was decided, float32 [B, A]."""

    ids: Tensor
    log_prob: Tensor


def rounds_of(tokens: int, block: int, steps: int) -> int:
    """Rounds per block; UsageError when blocks do not divide the tokens or the steps."""
    if tokens < 1 or block < 1 or tokens % block or steps % (tokens // block):
        raise UsageError(
            f"An answer of {tokens} tokens cannot be written in blocks of {block} and {steps} steps: the block must divide the tokens, "
            "and the number of blocks the steps. Correct max_tokens, answer_block or answer_steps."
        )
    return steps // (tokens // block)


def write(
    logits_at: LogitsAt, samples: int, tokens: int, block: int, steps: int, temperature: float, noise_BU: Tensor, device: torch.device
) -> Written:
    """Answers of `tokens` tokens: blocks from left to right, in each of them the most probable drawn tokens are kept round by round.

    `logits_at(ids [B, A] with HIDDEN, slots [B, K])` gives float32 logits; temperature 0 takes the most probable token. `noise_BU` holds
    `steps * block` numbers per sample.
    """
    rounds = rounds_of(tokens, block, steps)
    ids = torch.full((samples, tokens), HIDDEN, device=device)
    log_prob_BA = torch.zeros(ids.shape, device=device)
    numbers = iter(noise_BU.view(samples, -1, block).unbind(1))
    for start in range(0, tokens, block):
        left = block
        for index in range(rounds):
            number_BK = next(numbers)[:, :left]
            kept = block // rounds + (index < block % rounds)
            if not kept:
                continue
            in_block = torch.zeros_like(ids, dtype=torch.bool)
            in_block[:, start : start + block] = ids[:, start : start + block] == HIDDEN
            slots = first_slots(in_block, left)
            logits = logits_at(ids, slots)
            log_prob = (logits / (temperature or 1.0)).log_softmax(-1)
            token = draw(log_prob.flatten(0, 1), number_BK.flatten()).view(slots.shape) if temperature else logits.argmax(-1)
            sureness = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
            chosen = sureness.topk(kept, dim=1).indices
            places = slots.gather(1, chosen)
            ids = ids.scatter(1, places, token.gather(1, chosen))
            log_prob_BA = log_prob_BA.scatter(1, places, log_prob.gather(-1, token[..., None])[..., 0].gather(1, chosen))
            left -= kept
    return Written(ids, log_prob_BA)


def contexts(mask_BA: Tensor, estimator: Estimator, seeds: Sequence[int] | None, draws: int) -> list[tuple[Tensor, Tensor]]:
    """The contexts that an estimator averages over, each as hidden tokens and weights [B, A]; their weighted log-probs are summed.

    one_step: the whole answer hidden, weight 1. mc: `draws` contexts per sample, in each a uniform number l of the answer's n tokens
    hidden at random places, weight n / l / draws: the sum over tokens is then an unbiased estimate of LLaDA's likelihood bound. Equal
    seeds hide equal tokens, whatever the weights of the model, so that ratios compare like with like.
    """
    if estimator == "one_step":
        return [(mask_BA, mask_BA.float())]
    if estimator != "mc":
        raise UsageError(f"There is no estimator '{estimator}' of a text's log-probability in a masked model; there are one_step and mc.")
    if seeds is None or len(seeds) != len(mask_BA) or draws < 1:
        raise UsageError(f"The estimator mc needs a seed for each of the {len(mask_BA)} answers and at least one draw.")
    length, width = mask_BA.sum(1, keepdim=True), mask_BA.shape[1]
    numbers = uniforms(seeds, draws * (width + 1)).view(len(seeds), draws, width + 1).to(mask_BA.device)
    found = []
    for number in numbers.unbind(1):
        n_hidden = (number[:, :1] * length).floor().clamp(max=length - 1) + 1
        rank = number[:, 1:].masked_fill(~mask_BA, 2.0).argsort(1).argsort(1)
        hidden = (rank < n_hidden) & mask_BA
        found.append((hidden, hidden * (length / n_hidden / draws).float()))
    return found
