"""The loaded Show-o: its two kinds of attention, drawing (with `_masked`), reading and writing text.

Suffixes: B samples, R rows of a forward, L tokens of a row, N image tokens, E model width, P prompt slots.
Source: showlab/Show-o at 45a5a2d (models/modeling_showo.py, training/prompting_utils.py). Changed: padding that no real token sees is cut
from the rows (positions stay); answers are written with a cache, which the layout of the attention allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.models._masked import MaskedImages, Pictures
from mmalign.models._showo_text import TEXT_SLOTS, ShowoText, TokenLayout
from mmalign.models._square import SquarePictures
from mmalign.models.layers.lanes import lanes, padded_lengths
from mmalign.models.layers.magvit import Magvit
from mmalign.models.layers.noise import draw, uniforms
from mmalign.models.layers.rows import pad_left, pad_right
from mmalign.trajectory import Embedding, Prompts, Supervision, TextTokens, TextTrajectory
from mmalign.types import UsageError


class Showo(SquarePictures, MaskedImages):
    """A Show-o of any size: causal over text, bidirectional over the image."""

    text_slots = TEXT_SLOTS

    def __init__(self, net: Any, text: ShowoText, layout: TokenLayout, vq: Magvit, n_image: int) -> None:
        self.net, self.text, self.layout, self.vq = net, text, layout, vq
        self.trunk, self.head = net.model, net.lm_head
        self.set_square(n_image)
        self.offset, self.mask_id, self.pad_id = layout.offset, layout.mask, layout.pad
        self.trainable = {"language": self.trunk, "text_head": self.head}

    def shard_units(self) -> list[Any]:
        """The modules that are called directly, inner ones first: what FSDP2 must gather one by one."""
        return [*self.trunk.layers, self.net.get_input_embeddings(), self.head, self.trunk]

    def encode_prompts(self, texts: Sequence[str], images: None = None) -> Prompts:
        """Prompts to draw, left-padded, with their unconditional twins (the empty text)."""
        if images is not None:
            raise UsageError("Show-o cannot draw from a picture: encode_prompts takes texts alone. Ask about pictures with generate_text.")
        ids, mask = (tensor.to(self.device) for tensor in pad_left([self.text.drawing(text, self.tokens) for text in texts], self.pad_id))
        blank, blank_mask = (
            tensor.to(self.device) for tensor in pad_left([self.text.drawing("", self.tokens)] * len(texts), self.pad_id, ids.shape[1])
        )
        return Prompts(tuple(texts), ids, mask, blank, blank_mask)

    def text_features(self, texts: Sequence[str]) -> list[TextTokens]:
        """The tokens of each text as they enter the trunk, without special ones, as far as Show-o reads a text to draw."""
        rows = [self.text.plain(text) for text in texts]
        ids, mask = (tensor.to(self.device) for tensor in pad_right(rows, self.pad_id))
        features = self.net.get_input_embeddings()(ids)
        return [TextTokens(features[row][mask[row]], self.text.words(ids)) for row, ids in enumerate(rows)]

    # Reading and writing text

    @torch.no_grad()
    def generate_text(
        self, texts: Sequence[str], images: Pictures, seeds: Sequence[int], temperature: float = 1.0, max_tokens: int = 100
    ) -> TextTrajectory:
        """Answers to questions, with ids for `text_tokens_log_prob`. Temperature 0 is greedy (its log-probs are those of temperature 1).

        Each text depends on its own question, picture and seed alone.
        """
        if temperature < 0 or max_tokens < 1:
            raise UsageError(f"Text needs a temperature >= 0 and at least one token; got {temperature} and {max_tokens}.")
        rows = self._questions(texts, images)
        noise_BL = uniforms(seeds, max_tokens).to(self.device)
        ids = torch.full((len(rows), max_tokens), self.text.eos, device=self.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        log_prob = torch.zeros(ids.shape, device=self.device)
        for lane in lanes(padded_lengths([len(row) for row in rows], self.width is not None), self.width):
            prompt, real = (tensor.to(self.device) for tensor in pad_left([rows[row] for row in lane.rows], self.pad_id, lane.key))
            for whole, part in zip((ids, mask, log_prob), self._write_text(prompt, real, noise_BL[lane.rows], temperature), strict=True):
                whole[lane.real, : part.shape[1]] = part[: lane.n_real]
        longest = int(mask.sum(-1).max()) if len(rows) else 0
        ids, mask, log_prob = ids[:, :longest], mask[:, :longest], log_prob[:, :longest]
        answers = tuple(self.text.decode(row[real].tolist()) for row, real in zip(ids, mask, strict=True))
        return TextTrajectory(answers, ids, mask, log_prob, temperature, tuple(seeds))

    def text_log_prob(self, texts: Sequence[str], images: Pictures, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log-probs [B, L] (float32, with gradients) of each answer's tokens and of its end, and the mask of real ones; 0 elsewhere.

        Exact: text is causal.
        """
        ids, mask = (tensor.to(self.device) for tensor in pad_right([self.text.answer(answer) for answer in answers], self.text.eos))
        return self.text_tokens_log_prob(texts, images, ids, mask), mask

    def text_tokens_log_prob(self, texts: Sequence[str], images: Pictures, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
        """[B, L] log-probs of given token ids after the questions, in one forward; 0 where the mask is False."""
        prompt, real = (tensor.to(self.device) for tensor in pad_left(self._questions(texts, images), self.pad_id))
        hidden = self._read(torch.cat([prompt, ids[:, :-1]], 1), torch.cat([real, mask[:, :-1]], 1))[:, prompt.shape[1] - 1 :]
        logits = self.head(hidden).float() / (temperature or 1.0)
        return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * mask

    def embed(self, texts: Sequence[str], images: Pictures = None) -> Embedding:
        """Last hidden states of question-formatted texts with their pictures, for grounding maps; picture slots are in raster order."""
        ids, mask = (tensor.to(self.device) for tensor in pad_left(self._questions(texts, images), self.pad_id))
        is_image = (ids >= self.offset) & (ids < self.mask_id)
        is_text = mask & (ids < self.layout.pad) & (ids != self.text.bos)
        return Embedding(self._read(ids, mask), mask, is_text, is_image)

    # Inside

    def question_row(self, text: str, codes: list[int] | None) -> list[int]:
        return self.text.question(text, codes)

    def _hidden(self, ids_RL: Tensor, mask_RL: Tensor) -> Tensor:
        return self._run(ids_RL, self._drawing_mask(ids_RL, mask_RL), self._drawing_position(ids_RL.shape[1]))

    def _hidden_after(self, given: Supervision, ids_RL: Tensor, mask_RL: Tensor) -> Tensor:
        """Hints stand before the row as a picture that is read does, <|mmu|> <|soi|> hints <|eoi|>, and see themselves alone; the whole row
        sees them (SeGroS, its figure 6). The row keeps its distance to its own tokens and to them whatever its text's length."""
        assert given.hints is not None
        rows, embed = len(ids_RL), self.net.get_input_embeddings()
        marks = embed(torch.tensor([self.layout.mmu, self.layout.soi, self.layout.eoi], device=ids_RL.device)).expand(rows, -1, -1)
        hints = torch.cat([marks[:, :2], given.hints.to(marks), marks[:, 2:]], 1)
        n_hints, length = hints.shape[1], ids_RL.shape[1]
        is_hinted = mask_RL.new_ones(rows) if given.hinted is None else given.hinted.to(mask_RL)
        before = mask_RL.new_ones(rows, n_hints, n_hints)
        behind = (is_hinted[:, None] & mask_RL)[:, :, None].expand(-1, -1, n_hints)
        seen = torch.cat(
            [
                torch.cat([before, mask_RL.new_zeros(rows, n_hints, length)], 2),
                torch.cat([behind, self._drawing_mask(ids_RL, mask_RL)], 2),
            ],
            1,
        )
        position = torch.cat([torch.arange(n_hints, device=ids_RL.device)[None], self._drawing_position(length) + n_hints], 1)
        embeds = torch.cat([hints, embed(ids_RL)], 1)
        found = self.trunk(inputs_embeds=embeds, attention_mask=seen[:, None], position_ids=position, use_cache=False)
        return found.last_hidden_state[:, n_hints:]

    def _drawing_mask(self, ids_RL: Tensor, mask_RL: Tensor) -> Tensor:
        """bool [R, L, L]: text sees the text before it, the image everything; no one sees padding (whose own rows mean nothing)."""
        causal = torch.ones(ids_RL.shape[1], ids_RL.shape[1], dtype=torch.bool, device=ids_RL.device).tril()
        is_image = (ids_RL == self.layout.soi).cumsum(1) > 0
        return (causal | is_image[:, :, None]) & (mask_RL[:, None, :] | ~mask_RL[:, :, None])

    def _drawing_position(self, length: int) -> Tensor:
        """[1, L] positions of the official row, whose text part is always padded to its full length."""
        return torch.arange(length, device=self.device)[None] + (self.text_slots + self.tokens + 2 - length)

    def _read(self, ids_RL: Tensor, mask_RL: Tensor) -> Tensor:
        """[R, L, E] last hidden states of question rows."""
        return self._run(ids_RL, self._reading_mask(ids_RL, mask_RL), (mask_RL.long().cumsum(-1) - 1).clamp(min=0))

    def _reading_mask(self, ids_RL: Tensor, mask_RL: Tensor) -> Tensor:
        """bool [R, L, L]: text is causal and everyone sees all of the picture; padding sees itself alone."""
        length = ids_RL.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids_RL.device).tril()
        is_prefix = (ids_RL == self.layout.eoi).flip(1).cumsum(1).flip(1) > 0
        itself = torch.eye(length, dtype=torch.bool, device=ids_RL.device)
        return (causal | is_prefix[:, None, :]) & mask_RL[:, None, :] | itself

    def _run(self, ids_RL: Tensor, seen_RLT: Tensor, position: Tensor, **cache: Any) -> Tensor:
        """The trunk on token ids; `seen` [R, L, T] is True where token L sees token T."""
        embeds = self.net.get_input_embeddings()(ids_RL)
        cache = cache or {"use_cache": False}
        return self.trunk(inputs_embeds=embeds, attention_mask=seen_RLT[:, None], position_ids=position, **cache).last_hidden_state

    def _write_text(self, ids_RP: Tensor, mask_RP: Tensor, noise_RL: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """ids, mask and log-probs of one lane's texts, until every row has ended or the noise is used up."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.trunk.config)
        position = (mask_RP.long().cumsum(-1) - 1).clamp(min=0)
        hidden = self._run(ids_RP, self._reading_mask(ids_RP, mask_RP), position, past_key_values=cache, use_cache=True)[:, -1]
        seen, next_R = mask_RP, mask_RP.sum(-1)
        is_open = torch.ones(len(ids_RP), dtype=torch.bool, device=self.device)
        ids, masks, log_probs = [], [], []
        for index in range(noise_RL.shape[1]):
            log_prob_RV = (self.head(hidden).float() / (temperature or 1.0)).log_softmax(-1)
            token = draw(log_prob_RV, noise_RL[:, index]) if temperature else log_prob_RV.argmax(-1)
            token = torch.where(is_open, token, self.text.eos)
            ids.append(token)
            masks.append(is_open)
            log_probs.append(log_prob_RV.gather(-1, token[:, None])[:, 0] * is_open)
            is_open = is_open & (token != self.text.eos)
            if not is_open.any() or index == noise_RL.shape[1] - 1:
                break
            seen = torch.nn.functional.pad(seen, (0, 1), value=True)
            hidden = self._run(token[:, None], seen[:, None], next_R[:, None], past_key_values=cache, use_cache=True)[:, -1]
            next_R = next_R + 1
        return torch.stack(ids, 1), torch.stack(masks, 1), torch.stack(log_probs, 1)
