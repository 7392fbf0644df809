"""X-Omni's network: Qwen2's layers with two vocabularies, of which the first and last few layers change image positions alone.

Ids from `vocab_size` on are the image side's. A text position passes the outer layers unchanged, but image positions see its keys and
values there. Names are the checkpoint's. Source of the rule: X-Omni's remote code as carried by vladmandic/sdnext at 058a7f0.

Suffixes: R rows, P slots, E width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2PreTrainedModel, Qwen2RMSNorm, Qwen2RotaryEmbedding

from mmalign.models.layers.cached import CachedTrunk, Prefix


class XOmniTrunk(nn.Module):
    """Ids to last hidden states."""

    def __init__(self, config: Qwen2Config, adapter_layers: int, head_layers: int, image_rows: int) -> None:
        super().__init__()
        self.config = config
        self.lm_embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mm_embed_tokens = nn.Embedding(image_rows, config.hidden_size)
        self.layers = nn.ModuleList(Qwen2DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.lm_norm, self.mm_norm = (Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(2))
        self.rotary_emb = Qwen2RotaryEmbedding(config)
        self.shared = range(adapter_layers, config.num_hidden_layers - head_layers)

    def is_code(self, ids: Tensor) -> Tensor:
        return ids >= self.config.vocab_size

    def embed(self, ids_RP: Tensor) -> Tensor:
        """[R, P, E] of text and image-side ids."""
        size = self.config.vocab_size
        text, code = self.lm_embed_tokens(ids_RP.clamp(max=size - 1)), self.mm_embed_tokens((ids_RP - size).clamp(min=0))
        return torch.where(self.is_code(ids_RP)[..., None], code, text)

    def forward(self, ids_RP: Tensor, mask_RP: Tensor) -> Tensor:
        """[R, P, E] of whole sequences. Padding is masked out and takes no position; its own rows attend to themselves alone."""
        hidden, is_code = self.embed(ids_RP), self.is_code(ids_RP)[..., None]
        position_RP = (mask_RP.long().cumsum(-1) - 1).clamp(min=0)
        tables = self.rotary_emb(hidden, position_RP)
        allowed = None  # plainly causal, for which there are faster kernels
        if not bool(mask_RP.all()):
            slots = ids_RP.shape[1]
            causal = torch.ones(slots, slots, dtype=torch.bool, device=ids_RP.device).tril()
            itself = torch.eye(slots, dtype=torch.bool, device=ids_RP.device)
            allowed = ((causal & mask_RP[:, None, :]) | itself)[:, None]
        for index, layer in enumerate(self.layers):
            made = layer(hidden, attention_mask=allowed, position_embeddings=tables, position_ids=position_RP)
            hidden = made if index in self.shared else torch.where(is_code, made, hidden)
        return torch.where(is_code, self.mm_norm(hidden), self.lm_norm(hidden))


class XOmniNet(Qwen2PreTrainedModel):
    """The trunk with a head for each vocabulary."""

    def __init__(self, config: Qwen2Config, adapter_layers: int, head_layers: int, image_rows: int) -> None:
        super().__init__(config)
        self.model = XOmniTrunk(config, adapter_layers, head_layers, image_rows)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mm_head = nn.Linear(config.hidden_size, image_rows, bias=False)

    def get_input_embeddings(self) -> Any:
        return self.model.lm_embed_tokens


class XOmniCachedTrunk(CachedTrunk):
    """The trunk for decoding: after the prompt it reads codes alone, or text alone."""

    def __init__(self, trunk: XOmniTrunk, rows: int, writes_codes: bool) -> None:
        super().__init__(trunk, rows)
        self.writes_codes = writes_codes
        self.kind: Tensor | bool = writes_codes  # of what is being read: [R, P], or one for all

    def read(self, ids_RP: Tensor, mask_RP: Tensor) -> Prefix:
        """Read prompts of both kinds of ids."""
        self.kind = self.trunk.is_code(ids_RP)
        prefix = self.prefill(self.trunk.embed(ids_RP), mask_RP)
        self.kind = self.writes_codes
        return prefix

    def finish(self, index: int, hidden_RPE: Tensor, mixed_RHPD: Tensor) -> Tensor:
        if index in self.trunk.shared or self.kind is True:
            return super().finish(index, hidden_RPE, mixed_RHPD)
        if self.kind is False:
            return hidden_RPE
        assert isinstance(self.kind, Tensor)
        return torch.where(self.kind[..., None], super().finish(index, hidden_RPE, mixed_RHPD), hidden_RPE)

    def norm(self, hidden_RE: Tensor) -> Tensor:
        if isinstance(self.kind, bool):
            return (self.trunk.mm_norm if self.kind else self.trunk.lm_norm)(hidden_RE)
        return torch.where(self.kind[:, -1:], self.trunk.mm_norm(hidden_RE), self.trunk.lm_norm(hidden_RE))
