"""Writes Janus' image codes: its generation head and aligner, packed for decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mmalign.models import _causal_codes
from mmalign.models.layers.cached import CachedTrunk
from mmalign.models.layers.linear import can_pack, fused

if TYPE_CHECKING:
    from mmalign.models._janus import Janus


class CodeWriter(_causal_codes.CodeWriter):
    """Writes Janus' codes for lanes of so many samples."""

    def __init__(self, janus: Janus, n_samples: int, is_guided: bool) -> None:
        rows = n_samples * (2 if is_guided else 1)
        super().__init__(janus, CachedTrunk(janus.trunk, rows), is_guided)
        head, aligner = janus.net.model.generation_head, janus.net.model.generation_aligner
        pack = can_pack(janus.trunk)
        self.head = (fused([head.proj_out], rows, pack), head.activation_fn, fused([head.vision_head], rows, pack))
        self.aligner = [fused([layer], rows, pack) for layer in (aligner.fc1, *aligner.hidden_layers)]
        self.act, self.table = aligner.activation_fn, janus.net.model.generation_embeddings

    def logits(self, hidden_RE: Tensor) -> Tensor:
        first, act, last = self.head
        return last(act(first(hidden_RE))).float()

    def embed(self, code_R: Tensor) -> Tensor:
        x = self.aligner[0](self.table(code_R))
        for layer in self.aligner[1:]:
            x = layer(self.act(x))
        return x
