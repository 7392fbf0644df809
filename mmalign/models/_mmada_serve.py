"""MMaDA as a model that serves requests: reading the checkpoint and its image tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign import hub
from mmalign.models._llada import read_llada
from mmalign.models._llada_serve import LladaServing
from mmalign.models._mmada import Mmada, MmadaText
from mmalign.models._serving import DTYPES
from mmalign.models.layers.extras import extra_folders
from mmalign.models.layers.magvit import read_magvit
from mmalign.trajectory import Prompts
from mmalign.types import MmalignError, Request, UsageError

NEEDED = {"magvitv2": "the folder of the image tokenizer showlab/magvitv2"}
IMAGE_TOKENS = 1024  # where config.json does not say: 512 x 512 pixels, configs/mmada_demo.yaml


class MmadaModel(LladaServing, Mmada):
    """An MMaDA with a name, a fingerprint and `generate`."""

    family = "mmada"
    piece = "magvitv2"
    kept = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*")

    def __init__(self, path: Path, parts: Mapping[str, Path], sampling: Any, device: str, dtype: str) -> None:
        content = hub.read_config(path)
        text, vq = MmadaText(path, content), read_magvit(parts["magvitv2"]).to(device)
        net = read_llada(path, content, dtype).to(device).eval()
        if text.layout.offset + vq.codes > net.config.vocab_size:
            raise MmalignError(
                f"{path} has {net.config.vocab_size} embeddings, too few for its {text.layout.offset} text tokens and the {vq.codes} codes "
                f"of {parts['magvitv2']}. The folders do not belong together."
            )
        super().__init__(net, text, text.layout, vq, content.get("num_vq_tokens") or IMAGE_TOKENS)
        self.identify(path, parts, sampling, dtype)

    def prepare(self, requests: Sequence[Request], settings: Any, size: tuple[int, int]) -> tuple[Prompts, list[dict[str, Any]]]:
        texts = [request.prompt.text for request in requests]
        return self.encode_prompts(texts), [{"is_cut": True} if self.is_cut(text) else {} for text in texts]


def open_model(path: Path, sampling: Any, device: str, dtype: str, extra: Mapping[str, Path]) -> MmadaModel:
    """Read a checkpoint; an error says which folder, file, parameter or size is wrong."""
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'; MMaDA runs in {', '.join(DTYPES)}.")
    return MmadaModel(path, extra_folders(path, extra, NEEDED), sampling, device, dtype)
