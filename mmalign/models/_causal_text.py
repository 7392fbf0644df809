"""Text of causal language models that read pictures: written with a cache, scored in one forward. Families mix it in.

Suffixes: B samples, L text tokens, E model width, P prompt slots, R rows of a forward, V vocabulary. A family says how its ids become
hidden states (`states`, `prefill`) and how questions and pictures become ids. Rows are padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.models.layers.cached import Cache, CachedTrunk, Prefix
from mmalign.models.layers.lanes import ROWS, lanes, padded_lengths
from mmalign.models.layers.noise import draw, uniforms
from mmalign.models.layers.rows import pad_left, pad_right
from mmalign.trajectory import Embedding, TextTrajectory
from mmalign.types import UsageError

GROWTH = 64  # slots by which a text's cache grows
Pictures = Tensor | Sequence[Any] | None  # [B, 3, H, W] in [0, 1], or uint8 arrays [H, W, 3] (None where a row has no picture)


class CausalText:
    """A causal trunk (`net.lm_head` on top) that reads text and pictures and writes text. `chat` is its tokenizer's format."""

    def __init__(self, net: Any, trunk: Any, chat: Any) -> None:
        self.net, self.trunk, self.chat = net, trunk, chat

    # What a family adds

    def prefill(self, trunk: CachedTrunk, ids_RP: Tensor, mask_RP: Tensor, pictures: Sequence[Tensor | None]) -> Prefix:
        """Read rows of ids, with the picture of each row that has one, into a cache."""
        raise NotImplementedError

    def states(self, ids_RP: Tensor, mask: Tensor, pictures: Sequence[Tensor | None], tail_RL: Tensor) -> Tensor:
        """[R, P + L, E] last hidden states of rows of ids followed by text ids, in one forward; the mask covers both."""
        raise NotImplementedError

    def questions(self, texts: Sequence[str], images: Sequence[Any]) -> tuple[list[list[int]], list[Tensor | None]]:
        """Token ids of questions up to where the answer begins, and what `states` needs beside them of each one's picture."""
        raise NotImplementedError

    def is_picture(self, ids: Tensor) -> Tensor:
        """Where ids stand for pictures."""
        raise NotImplementedError

    def text_trunk(self, rows: int) -> CachedTrunk:
        """The trunk, ready to write text."""
        return CachedTrunk(self.trunk, rows)

    # What every family has

    @property
    def device(self) -> torch.device:
        return self.net.lm_head.weight.device

    @property
    def width(self) -> int | None:
        """Rows of a lane: fixed on the CPU, where results are bitwise independent of the batch; elsewhere the whole batch is one lane."""
        return ROWS if self.device.type == "cpu" else None

    @torch.no_grad()
    def generate_text(
        self, texts: Sequence[str], images: Pictures, seeds: Sequence[int], temperature: float = 1.0, max_tokens: int = 512
    ) -> TextTrajectory:
        """Answers to questions, or reasoning about prompts (images=None), with ids for `text_tokens_log_prob`. Temperature 0 is greedy.

        Each text depends on its own question, picture and seed alone. Greedy log-probs are those of temperature 1.
        """
        if temperature < 0 or max_tokens < 1:
            raise UsageError(f"Text needs a temperature >= 0 and at least one token; got {temperature} and {max_tokens}.")
        rows, pictures = self.questions(texts, given_pictures(texts, images))
        noise_BL = uniforms(seeds, max_tokens).to(self.device)
        slots = padded_lengths([len(row) for row in rows], self.width is not None)
        keys = [(slot, picture is not None) for slot, picture in zip(slots, pictures, strict=True)]
        ids = torch.full((len(rows), max_tokens), self.chat.pad, device=self.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        log_prob = torch.zeros(ids.shape, dtype=torch.float32, device=self.device)
        trunk = self.text_trunk(self.width or len(rows))
        for lane in lanes(keys, self.width):
            prompt, real = self._padded([rows[row] for row in lane.rows], lane.key[0])
            prefix = self.prefill(trunk, prompt, real, [pictures[row] for row in lane.rows])
            written = self._write_text(trunk, prefix, noise_BL[lane.rows], temperature)
            for whole, part in zip((ids, mask, log_prob), written, strict=True):
                whole[lane.real, : part.shape[1]] = part[: lane.n_real]
        longest = int(mask.sum(-1).max()) if len(rows) else 0
        ids, mask, log_prob = ids[:, :longest], mask[:, :longest], log_prob[:, :longest]
        answers = tuple(self.chat.decode(row[real].tolist()) for row, real in zip(ids, mask, strict=True))
        return TextTrajectory(answers, ids, mask, log_prob, temperature, tuple(seeds))

    def text_log_prob(self, texts: Sequence[str], images: Pictures, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log-probs [B, L] (float32, with gradients) of each answer's tokens and of its end, and the mask of real ones; 0 elsewhere."""
        rows = [self.chat.answer(answer) for answer in answers]
        ids, mask = (tensor.to(self.device) for tensor in pad_right(rows, self.chat.pad))
        return self.text_tokens_log_prob(texts, images, ids, mask), mask

    def text_tokens_log_prob(self, texts: Sequence[str], images: Pictures, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
        """[B, L] log-probs of given token ids after the questions, in one forward; 0 where the mask is False."""
        rows, pictures = self.questions(texts, given_pictures(texts, images))
        prompt, real = self._padded(rows)
        hidden = self.states(prompt, torch.cat([real, mask[:, :-1]], 1), pictures, ids[:, :-1])[:, prompt.shape[1] - 1 :]
        return pick(self.net.lm_head(hidden).float() / (temperature or 1.0), ids) * mask

    def embed(self, texts: Sequence[str], images: Pictures = None) -> Embedding:
        """Last hidden states of question-formatted texts with their pictures, for grounding maps; picture slots are in raster order."""
        rows, pictures = self.questions(texts, given_pictures(texts, images))
        ids, mask = self._padded(rows)
        is_image = self.is_picture(ids)
        special = torch.tensor(self.chat.tokenizer.all_special_ids, device=self.device)
        is_text = mask & ~is_image & ~torch.isin(ids, special)
        return Embedding(self.states(ids, mask, pictures, ids[:, :0]), mask, is_text, is_image)

    def _padded(self, rows: Sequence[Sequence[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
        ids, mask = pad_left(rows, self.chat.pad, width)
        return ids.to(self.device), mask.to(self.device)

    def _write_text(self, trunk: CachedTrunk, prefix: Prefix, noise_RL: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """ids, mask and log-probs of one lane's texts, until every row has ended or the noise is used up."""
        rows, limit = noise_RL.shape
        cache = Cache(prefix, rows, min(GROWTH, limit), block=GROWTH)
        hidden = cache.begin(prefix, torch.arange(rows, device=self.device))
        is_open = torch.ones(rows, dtype=torch.bool, device=self.device)
        ids, masks, log_probs = [], [], []
        for index in range(limit):
            log_prob_RV = (self.net.lm_head(hidden).float() / (temperature or 1.0)).log_softmax(-1)
            token = draw(log_prob_RV, noise_RL[:, index]) if temperature else log_prob_RV.argmax(-1)
            token = torch.where(is_open, token, self.chat.pad)
            ids.append(token)
            masks.append(is_open)
            log_probs.append(log_prob_RV.gather(-1, token[:, None])[:, 0] * is_open)
            is_open = is_open & (token != self.chat.eos)
            if not is_open.any() or index == limit - 1:
                break
            if cache.is_full:
                cache.widen(GROWTH)
            hidden = trunk.step(self.net.get_input_embeddings()(token), cache)
        return torch.stack(ids, 1), torch.stack(masks, 1), torch.stack(log_probs, 1)


def given_pictures(texts: Sequence[str], images: Pictures) -> list[Any]:
    """One picture or None for each text; UsageError when the numbers differ."""
    given: list[Any] = [None] * len(texts) if images is None else list(images)
    if len(given) != len(texts):
        raise UsageError(f"Each of the {len(texts)} questions needs its own picture or None; got {len(given)} pictures.")
    return given


def pick(logits: Tensor, index: Tensor) -> Tensor:
    """Log-softmax at the index along the last axis."""
    return logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]
