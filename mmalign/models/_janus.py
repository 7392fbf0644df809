"""The loaded Janus: prompts, pixels, and how its ids become hidden states and codes (shapes and rules: docs of `mmalign.trajectory`).

Suffixes: B samples, N image tokens, V image codes, E model width, P prompt slots, R rows of a forward.
Source: deepseek-ai/Janus at 1daa72f (generation_inference.py, modeling_vlm.py). Changed: padding is masked out and takes no positions;
noise comes from one stream per sample; the image tokenizer's codes are chosen by cosine as the original does and transformers does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.models._causal import Causal
from mmalign.models._janus_codes import CodeWriter
from mmalign.models._janus_text import ChatFormat, Pixels
from mmalign.models.layers.cached import CachedTrunk, Prefix
from mmalign.models.layers.rows import pad_left
from mmalign.trajectory import Prompts
from mmalign.types import MmalignError, UsageError


class Janus(Causal):
    """A Janus or Janus-Pro of any size: a causal trunk that reads text and pictures and writes text and image codes."""

    def __init__(self, net: Any, chat: ChatFormat, pixels: Pixels) -> None:
        super().__init__(net, net.model.language_model, chat)
        self.pixels = pixels
        grid = net.config.vision_config.image_size // net.config.vision_config.patch_size
        self.grid = (grid, grid)
        self.tokens = grid * grid
        self.codes = net.config.vq_config.num_embeddings
        self.size = (net.config.vision_config.image_size,) * 2
        self.trainable = {
            "language": self.trunk,
            "text_head": net.lm_head,
            "image_head": net.model.generation_head,
            "image_input": nn.ModuleList([net.model.generation_embeddings, net.model.generation_aligner]),
            "vision": nn.ModuleList([net.model.vision_model, net.model.aligner]),
        }

    def shard_units(self) -> list[nn.Module]:
        """The modules that are called directly, inner ones first: what FSDP2 must gather one by one. Vision and VQ stay whole."""
        heads = [self.net.lm_head, self.net.model.generation_head, self.net.model.generation_embeddings, self.net.model.generation_aligner]
        return [*self.trunk.layers, self.net.get_input_embeddings(), *heads, self.trunk]

    def encode_prompts(self, texts: Sequence[str], images: None = None, reasoning: Sequence[str] | None = None) -> Prompts:
        """Prompts to draw, left-padded, with their unconditional twins. `reasoning` gives T2I-R1's second stage, "{text}. {reasoning}"."""
        if images is not None:
            raise UsageError("Janus cannot draw from a picture: encode_prompts takes texts alone. Ask about pictures with generate_text.")
        thoughts = [None] * len(texts) if reasoning is None else reasoning
        rows = [self.chat.drawing(text, thought) for text, thought in zip(texts, thoughts, strict=True)]
        ids, mask = (tensor.to(self.device) for tensor in pad_left(rows, self.chat.pad))
        return Prompts(tuple(texts), ids, mask, self.chat.blank(ids), mask)

    # Pixels, always in [0, 1]

    def image_features(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N, E] what the trunk reads of pictures: the vision tower's tokens after the aligner. Differentiable in the pixels."""
        if pixels_BCHW.shape[-2:] != self.size:
            raise MmalignError(
                f"The vision tower reads {self.size[0]} x {self.size[1]} pixels; got {list(pixels_BCHW.shape)}. "
                "Give uint8 arrays, which are fitted, or resize the tensor."
            )
        x = self.pixels.normalise(pixels_BCHW.to(self.device)).to(self.net.lm_head.weight.dtype)
        return self.net.model.get_image_features(x).pooler_output

    @torch.no_grad()
    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N] codes of pictures: the nearest code by cosine. (transformers' own encode leaves out the normalisation and differs.)"""
        vq = self.net.model.vqmodel
        x = pixels_BCHW.to(self.device, vq.quant_conv.weight.dtype) * 2 - 1
        z_BNC = vq.quant_conv(vq.encoder(x)).flatten(2).mT
        return (F.normalize(z_BNC, dim=-1) @ F.normalize(vq.quantize.embedding.weight, dim=-1).T).argmax(-1)

    def decode(self, codes_BN: Tensor) -> Tensor:
        """[B, 3, H, W] float32 pixels in [0, 1] of codes."""
        return ((self.net.model.vqmodel.decode(codes_BN).float() + 1) / 2).clamp(0, 1)

    def fit(self, images: Sequence[Any]) -> Tensor:
        """[B, 3, S, S] pixels in [0, 1] of uint8 pictures of any size: the long side fitted, the rest padded with the mean colour."""
        return torch.stack([self.pixels.fit(image) for image in images])

    # Inside

    def n_codes(self, prompts: Prompts) -> int:
        return self.tokens

    def code_writer(self, n_samples: int, is_guided: bool) -> CodeWriter:
        return CodeWriter(self, n_samples, is_guided)

    def code_logits(self, ids_RP: Tensor, mask_RP: Tensor, codes_RN: Tensor) -> Tensor:
        embeds = self.net.get_input_embeddings()(ids_RP)
        embeds = torch.cat([embeds, self.net.prepare_embeddings_for_image_generation(codes_RN[:, :-1])], 1)
        mask = F.pad(mask_RP, (0, codes_RN.shape[1] - 1), value=True)
        return self.net.model.generation_head(self._hidden(embeds, mask)[:, ids_RP.shape[1] - 1 :]).float()

    def prefill(self, trunk: CachedTrunk, ids_RP: Tensor, mask_RP: Tensor, pictures: Sequence[Tensor | None]) -> Prefix:
        return trunk.prefill(self._embed(ids_RP, pictures), mask_RP)

    def states(self, ids_RP: Tensor, mask: Tensor, pictures: Sequence[Tensor | None], tail_RL: Tensor) -> Tensor:
        return self._hidden(torch.cat([self._embed(ids_RP, pictures), self.net.get_input_embeddings()(tail_RL)], 1), mask)

    def questions(self, texts: Sequence[str], images: Sequence[Any]) -> tuple[list[list[int]], list[Tensor | None]]:
        pixels = [image if image is None or isinstance(image, Tensor) else self.pixels.fit(image) for image in images]
        rows = [self.chat.question(text, picture is not None) for text, picture in zip(texts, pixels, strict=True)]
        return rows, pixels

    def is_picture(self, ids: Tensor) -> Tensor:
        return ids == self.chat.image

    def _hidden(self, embeds_RPE: Tensor, mask_RP: Tensor) -> Tensor:
        """Last hidden states of a whole sequence. Padding takes no position."""
        position = (mask_RP.long().cumsum(-1) - 1).clamp(min=0)
        return self.trunk(inputs_embeds=embeds_RPE, attention_mask=mask_RP.long(), position_ids=position, use_cache=False).last_hidden_state

    def _embed(self, ids_RP: Tensor, pixels: Sequence[Tensor | None]) -> Tensor:
        """Input embeddings; placeholders are replaced by the features of their row's picture."""
        embeds = self.net.get_input_embeddings()(ids_RP)
        present = [picture.to(self.device) for picture in pixels if picture is not None]
        if not present:
            return embeds
        features = self.image_features(torch.stack(present)).to(embeds.dtype)
        return embeds.masked_scatter((ids_RP == self.chat.image)[..., None], features)
