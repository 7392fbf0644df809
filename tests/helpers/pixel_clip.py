"""The smallest scorer that attribution can explain in every way: the cosine of a transformers CLIPModel, times its logit scale."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from mmalign.attribution.dropping import pooled_with_gates


class PixelClip:
    def __init__(self, model, tokenizer) -> None:
        self.model, self.tokenizer, self.texts = model.eval().requires_grad_(False), tokenizer, {}
        self.side = model.config.vision_config.image_size

    @classmethod
    def open(cls, path: Path) -> PixelClip:
        from transformers import AutoTokenizer, CLIPModel

        return cls(CLIPModel.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path))

    @cached_property
    def scale(self) -> torch.Tensor:
        return self.model.logit_scale.exp()

    def patch_grid(self) -> tuple[int, int]:
        side = self.side // self.model.config.vision_config.patch_size
        return side, side

    def prepared(self, pixels_BCHW):
        small = F.interpolate(pixels_BCHW, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        return small * 2 - 1

    def text_features(self, prompts):
        for text in set(prompts) - set(self.texts):
            tokens = self.tokenizer([text], return_tensors="pt")
            with torch.no_grad():
                self.texts[text] = F.normalize(self.model.text_projection(self.model.text_model(**tokens).pooler_output), dim=-1)[0]
        return torch.stack([self.texts[text] for text in prompts])

    def scored(self, pooled, prompts):
        image = F.normalize(self.model.visual_projection(pooled), dim=-1)
        return self.scale * (image * self.text_features(prompts)).sum(1)

    def score_pixels(self, pixels_BCHW, prompts):
        return self.scored(self.model.vision_model(pixel_values=self.prepared(pixels_BCHW)).pooler_output, prompts)

    def score_patches(self, pixels_BCHW, prompts, gates_RN, index_R):
        pooled = pooled_with_gates(self.model.vision_model, self.prepared(pixels_BCHW), gates_RN, index_R)
        return self.scored(pooled, [prompts[i] for i in index_R.tolist()])

    @property
    def patch_embedding(self):
        return self.model.vision_model.embeddings.patch_embedding

    def patch_tokens(self, pixels_BCHW):
        tower = self.model.vision_model
        hidden = tower.post_layernorm(tower(pixel_values=self.prepared(pixels_BCHW)).last_hidden_state[:, 1:])
        return F.normalize(self.model.visual_projection(hidden), dim=-1).mT.unflatten(2, self.patch_grid())
