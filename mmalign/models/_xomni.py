"""The loaded X-Omni: prompts of any size, codes and their log-probabilities, questions about pictures, pixels through FLUX.

Suffixes: B samples, N image tokens, V image codes, E model width, P prompt slots, R rows of a forward, h w codes per side.
Source: X-Omni-Team/X-Omni at 2b8237b (generate.py, chat.py) and the model's remote code as carried by vladmandic/sdnext at 058a7f0.
Changed: noise comes from one stream per sample; both branches of the guidance go through one forward (the original runs two); codes that a
policy cuts off are part of its log-probabilities; nothing is cut off unless asked for (transformers' default top-k there is 50).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.models import _causal_codes
from mmalign.models._causal import Causal
from mmalign.models._xomni_flux import FluxDecoder
from mmalign.models._xomni_net import XOmniCachedTrunk, XOmniNet
from mmalign.models._xomni_text import Fitting, XOmniText
from mmalign.models.layers.cached import CachedTrunk, Prefix
from mmalign.models.layers.lanes import Lane, few, lanes
from mmalign.models.layers.linear import can_pack, fused, head_slice
from mmalign.models.layers.siglip_vq import SiglipTokenizer
from mmalign.trajectory import Policy, Prompts
from mmalign.types import MmalignError, UsageError

PICTURES = 4  # of one forward of the image tokenizer
GRID = "grid"  # name, in the embeddings of prompts, of the rows and columns that each is to draw


@dataclass(frozen=True)
class CutPolicy(Policy):
    """A policy that draws no code less probable than `min_p` times the most probable, and none outside the `top_k` most probable (0: all).

    Its log-probabilities are those of what is left. A code that was drawn counts as left even where the weights have moved since, so that
    ratios stay finite; for training a policy without cuts is the safe choice.
    """

    min_p: float = 0.0
    top_k: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_p < 1 or self.top_k < 0:
            raise UsageError(f"min_p lies in [0, 1) and top_k is not negative; got {self.min_p} and {self.top_k}.")


class CodeWriter(_causal_codes.CodeWriter):
    """Writes X-Omni's codes for lanes of so many samples."""

    def __init__(self, model: XOmni, n_samples: int, is_guided: bool) -> None:
        rows = n_samples * (2 if is_guided else 1)
        super().__init__(model, XOmniCachedTrunk(model.trunk, rows, writes_codes=True), is_guided)
        self.head = fused([model.net.mm_head], rows, can_pack(model.trunk))
        self.table, self.codes = model.trunk.mm_embed_tokens, model.codes

    def logits(self, hidden_RE: Tensor) -> Tensor:
        return self.head(hidden_RE)[:, : self.codes].float()

    def embed(self, code_R: Tensor) -> Tensor:
        return self.table(code_R)


class XOmni(Causal):
    """An X-Omni of any size. `size` is what it draws when nobody names one; any multiple of the patch will do."""

    def __init__(self, net: XOmniNet, text: XOmniText, vq: SiglipTokenizer, fitting: Fitting, decoder: FluxDecoder | None) -> None:
        super().__init__(net, net.model, text)
        self.vq, self.fitting, self.decoder = vq, fitting, decoder
        self.codes, self.first = vq.codes, net.config.vocab_size
        self.grid = (fitting.long_size // vq.patch,) * 2
        self.tokens = self.grid[0] * self.grid[1]
        language = [net.model.lm_embed_tokens, net.model.layers, net.model.lm_norm, net.model.mm_norm]
        self.trainable = {
            "language": nn.ModuleList(language),
            "text_head": net.lm_head,
            "image_head": net.mm_head,
            "image_input": net.model.mm_embed_tokens,
        }

    def shard_units(self) -> list[nn.Module]:
        """The modules that are called directly, inner ones first: what FSDP2 must gather one by one. Tokenizer and decoder stay whole."""
        trunk = self.trunk
        return [*trunk.layers, trunk.lm_embed_tokens, trunk.mm_embed_tokens, self.net.lm_head, self.net.mm_head, trunk]

    @property
    def size(self) -> tuple[int, int]:
        return self.grid[0] * self.vq.patch, self.grid[1] * self.vq.patch

    def grid_of(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Rows and columns of codes for a size in pixels (None: the default)."""
        if size is None:
            return self.grid
        if any(side % self.vq.patch or side < self.vq.patch for side in size):
            raise UsageError(f"X-Omni draws sides that are multiples of {self.vq.patch} pixels; got {size[0]} x {size[1]}.")
        return size[0] // self.vq.patch, size[1] // self.vq.patch

    def encode_prompts(
        self, texts: Sequence[str], images: None = None, reasoning: Sequence[str] | None = None, size: tuple[int, int] | None = None
    ) -> Prompts:
        """Prompts to draw at a size in pixels, left-padded, with their unconditional twins (the picture's frame alone)."""
        if images is not None:
            raise UsageError("X-Omni cannot draw from a picture: encode_prompts takes texts alone. Ask about pictures with generate_text.")
        grid = self.grid_of(size)
        thoughts = [None] * len(texts) if reasoning is None else reasoning
        rows = [self.chat.drawing(text, grid, thought) for text, thought in zip(texts, thoughts, strict=True)]
        ids, mask = self._padded(rows)
        blank, blank_mask = self._padded([self.chat.blank(grid)] * len(texts))
        return Prompts(tuple(texts), ids, mask, blank, blank_mask, {GRID: torch.tensor([grid] * len(texts), device=self.device)})

    def n_codes(self, prompts: Prompts) -> int:
        grid = self.grid_of_prompts(prompts)
        return grid[0] * grid[1]

    # Pixels, always in [0, 1]

    @torch.no_grad()
    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N] codes, in raster order, of pictures of one size: the nearest code by cosine."""
        return self._codes(pixels_BCHW).flatten(1)

    def image_features(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N, E] what the trunk reads of pictures: the embeddings of their codes. Not differentiable in the pixels."""
        return self.trunk.mm_embed_tokens(self.encode_image(pixels_BCHW))

    def decode(
        self,
        codes_BN: Tensor,
        size: tuple[int, int] | None = None,
        texts: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """[B, 3, H, W] float32 pixels of codes. FLUX reads the prompt too and starts from noise: without texts the prompt is empty,
        without seeds the noise is that of seed 0."""
        if self.decoder is None:
            raise UsageError("This X-Omni was put together without its FLUX decoder, so codes have no pixels.")
        grid, count = self.grid_of(size), len(codes_BN)
        if codes_BN.shape[1] != grid[0] * grid[1]:
            raise UsageError(f"Pictures of {grid[0]} x {grid[1]} codes have {grid[0] * grid[1]}; got {codes_BN.shape[1]}. Say their size.")
        features = torch.cat([self.vq.features(codes_BN[lane.rows].view(-1, *grid))[: lane.n_real] for lane in self._few(count)])
        return self.decoder.draw(features, grid, list(texts or [""] * count), list(seeds or [0] * count))

    def fit(self, images: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] pixels in [0, 1] of uint8 pictures, each fitted as for a question; UsageError when their sizes then differ."""
        fitted = [self.fitting.fit(image) for image in images]
        if len({picture.shape for picture in fitted}) > 1:
            raise UsageError("Pictures of different shapes keep them, and so do not fit into one tensor. Give pictures of one shape.")
        return torch.stack(fitted)

    # Inside

    def code_writer(self, n_samples: int, is_guided: bool) -> CodeWriter:
        return CodeWriter(self, n_samples, is_guided)

    def text_trunk(self, rows: int) -> CachedTrunk:
        return XOmniCachedTrunk(self.trunk, rows, writes_codes=False)

    def log_probs(self, logits: Tensor, policy: Policy, taken: Tensor | None = None) -> Tensor:
        log_prob = super().log_probs(logits, policy)
        if not isinstance(policy, CutPolicy) or not (policy.min_p or policy.top_k):
            return log_prob
        least = log_prob.exp().amax(-1, keepdim=True) * policy.min_p
        is_left = log_prob.exp() >= least
        if 0 < policy.top_k < log_prob.shape[-1]:
            is_left &= log_prob >= log_prob.topk(policy.top_k, -1).values[..., -1:]
        if taken is not None:
            is_left = is_left.scatter(-1, taken[..., None], True)
        return log_prob.masked_fill(~is_left, float("-inf")).log_softmax(-1)

    def code_logits(self, ids_RP: Tensor, mask_RP: Tensor, codes_RN: Tensor) -> Tensor:
        ids = torch.cat([ids_RP, codes_RN[:, :-1] + self.first], 1)
        mask = torch.cat([mask_RP, torch.ones_like(codes_RN[:, :-1], dtype=torch.bool)], 1)
        hidden = self.trunk(ids, mask)[:, ids_RP.shape[1] - 1 :]
        return head_slice(self.net.mm_head, 0, self.codes)(hidden).float()

    def prefill(self, trunk: CachedTrunk, ids_RP: Tensor, mask_RP: Tensor, pictures: Sequence[Tensor | None]) -> Prefix:
        assert isinstance(trunk, XOmniCachedTrunk)
        return trunk.read(ids_RP, mask_RP)

    def states(self, ids_RP: Tensor, mask: Tensor, pictures: Sequence[Tensor | None], tail_RL: Tensor) -> Tensor:
        return self.trunk(torch.cat([ids_RP, tail_RL], 1), mask)

    def questions(self, texts: Sequence[str], images: Sequence[Any]) -> tuple[list[list[int]], list[Tensor | None]]:
        """Pictures are uint8 arrays, pixels [3, H, W] in [0, 1], or codes: int [h, w], or [N] of the default size."""
        return [self.chat.question(text, codes) for text, codes in zip(texts, self._picture_codes(images), strict=True)], [None] * len(
            texts
        )

    def is_picture(self, ids: Tensor) -> Tensor:
        return (ids >= self.first) & (ids < self.first + self.codes)

    def _picture_codes(self, images: Sequence[Any]) -> list[list[list[int]] | None]:
        """Rows of codes of each picture; those of one shape are read together."""
        given: list[Any] = [image if image is None or isinstance(image, Tensor) else self.fitting.fit(image) for image in images]
        found: list[list[list[int]] | None] = [None] * len(given)
        for lane in lanes([None if image is None else (image.is_floating_point(), tuple(image.shape)) for image in given], None):
            if lane.key is None:
                continue
            whole = torch.stack([given[row] for row in lane.rows])
            codes = self._codes(whole) if lane.key[0] else whole.view(len(whole), *(self.grid if whole.ndim == 2 else whole.shape[1:]))
            for row, picture in zip(lane.rows, codes.tolist(), strict=True):
                found[row] = picture
        return found

    def _codes(self, pixels_BCHW: Tensor) -> Tensor:
        """int [B, h, w]."""
        if any(side % self.vq.patch for side in pixels_BCHW.shape[-2:]):
            raise MmalignError(
                f"The image tokenizer reads sides that are multiples of {self.vq.patch} pixels; got {list(pixels_BCHW.shape)}. "
                "Give uint8 arrays, which are fitted, or resize the tensor."
            )
        return torch.cat([self.vq.encode(pixels_BCHW[lane.rows])[: lane.n_real] for lane in self._few(len(pixels_BCHW))])

    def _few(self, count: int) -> Iterator[Lane]:
        """Lanes of pictures: filled up on the CPU, where a fixed shape keeps results independent of the batch."""
        return few(count, PICTURES, self.width is not None)

    def grid_of_prompts(self, prompts: Prompts) -> tuple[int, int]:
        """Rows and columns of the pictures of prompts, which must agree."""
        grids = prompts.embeds[GRID]
        if not bool((grids == grids[:1]).all()):
            raise UsageError("Pictures of one call have one size. Draw those of another size in a call of their own.")
        rows, columns = grids[0].tolist()
        return rows, columns
