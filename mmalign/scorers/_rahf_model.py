"""The rich-feedback network: a ViT's patches and a prompt's T5 embeddings in one T5 encoder, with maps and scores read off the patches.

Described in Liang et al., "Rich Human Feedback for Text-to-Image Generation", arXiv 2312.10240, section 4; written from that description.
Shapes: B images, N = D x D patches, L text tokens, C width of T5.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange
from torch import nn

SCORES = ("plausibility", "alignment", "aesthetics", "overall")
MAPS = ("implausibility", "misalignment")


@dataclass(frozen=True)
class Sizes:
    """ViT-L/16 at 384 and T5-base; `channels`: of the heads."""

    image: int = 384
    patch: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    vision_inner: int = 4096
    vocabulary: int = 32128
    width: int = 768
    layers: int = 12
    heads: int = 12
    head_width: int = 64
    inner: int = 3072
    channels: int = 256


class Rahf(nn.Module):
    """Image and text to four scores and two maps, all through a sigmoid."""

    def __init__(self, sizes: Sizes) -> None:
        from transformers import T5Config, T5EncoderModel, ViTConfig, ViTModel

        super().__init__()
        self.sizes = sizes
        vision = ViTConfig(
            hidden_size=sizes.vision_width,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.vision_heads,
            intermediate_size=sizes.vision_inner,
            image_size=sizes.image,
            patch_size=sizes.patch,
        )
        text = T5Config(
            vocab_size=sizes.vocabulary,
            d_model=sizes.width,
            d_kv=sizes.head_width,
            d_ff=sizes.inner,
            num_layers=sizes.layers,
            num_heads=sizes.heads,
        )
        self.vision: Any = ViTModel(vision, add_pooling_layer=False)
        self.project = nn.Linear(sizes.vision_width, sizes.width)
        self.encoder: Any = T5EncoderModel(text)
        self.map_heads = nn.ModuleDict({name: _map_head(sizes.width, sizes.channels) for name in MAPS})
        self.score_heads = nn.ModuleDict({name: ScoreHead(sizes.width, sizes.channels) for name in SCORES})

    def forward(
        self, x_BCHW: torch.Tensor, ids_BL: torch.Tensor, mask_BL: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Scores {name: [B]} and maps {name: [B, D, D]}; `mask_BL` is 1 at tokens and 0 at padding."""
        patches_BNC = self.project(self.vision(x_BCHW).last_hidden_state[:, 1:])
        both = torch.cat([patches_BNC, self.encoder.get_input_embeddings()(ids_BL)], dim=1)
        mask = torch.cat([mask_BL.new_ones(patches_BNC.shape[:2]), mask_BL], dim=1)
        states = self.encoder(inputs_embeds=both, attention_mask=mask).last_hidden_state
        side = self.sizes.image // self.sizes.patch
        grid_BCDD = rearrange(states[:, : side * side], "b (h w) c -> b c h w", h=side)
        maps = {name: head(grid_BCDD)[:, 0].float().sigmoid() for name, head in self.map_heads.items()}
        return {name: head(grid_BCDD).float().sigmoid() for name, head in self.score_heads.items()}, maps

    @property
    def options(self) -> dict[str, int]:
        return asdict(self.sizes)


class ScoreHead(nn.Module):
    """Two strided convolutions over the patches, their mean, one number [B]."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(width, channels, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.ReLU()
        )
        self.line = nn.Linear(channels, 1)

    def forward(self, grid_BCDD: torch.Tensor) -> torch.Tensor:
        return self.line(self.convolutions(grid_BCDD).mean((2, 3)))[:, 0]


def _map_head(width: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 1, 1))
