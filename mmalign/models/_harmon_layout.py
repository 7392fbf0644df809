"""On-disk layouts of Harmon: a Hugging Face folder that has everything, or the original weight file with two further pieces.

Both have the same names (llm, mar, proj_in, proj_out; vae only in the first). Sizes are read from the tensors; what leaves no trace in a
shape comes from a config, and attention heads of a MAR, where no config says them, from its width as the paper lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmalign import hub
from mmalign.models.layers.extras import check_extras, extra_file, extra_folders
from mmalign.models.layers.kl import KlAutoencoder, kl_autoencoder
from mmalign.models.layers.mar import Mar, MarSizes
from mmalign.models.layers.weights import check_names, check_shapes, read_file, read_tensors
from mmalign.types import MmalignError, UsageError

if TYPE_CHECKING:
    from mmalign.models._harmon import HarmonNet

VAE = "vae."
VAE_SCALE = 0.2325  # fixed in the official code, whatever the checkpoint
INNER_STEPS = 100
HEADS = {"mar_base": 12, "mar_large": 16, "mar_huge": 16}
HEADS_OF_WIDTH = {768: 12, 1024: 16, 1280: 16}  # MAR, table 8: base, large, huge
KNOWN = {
    "qwen2.5": "the folder of the language model Qwen2.5-Instruct, with its config.json and tokenizer",
    "kl16": "the image coder's file kl16.ckpt",
    "weights": "the weight file, where the folder has several",
}


@dataclass(frozen=True)
class Checkpoint:
    """What was found: tensors without the image coder's, the coder's, the language model's config, the MAR's options, and where it lay."""

    tensors: dict[str, Tensor]
    coder: dict[str, Tensor]
    llm: dict[str, Any]
    mar: dict[str, Any]
    tokenizer: Path
    side: int | None  # pixels it draws by itself, where a config says so
    identity: tuple[str, ...] = field(default=())  # what the fingerprint covers


def find(path: Path, extra: Mapping[str, Path]) -> Checkpoint:
    """The checkpoint of a folder in either layout; an error says what is missing."""
    check_extras(extra, KNOWN)
    content = hub.read_config(path) if (path / "config.json").is_file() else {}
    identity: tuple[str, ...]
    if content.get("model_type") == "harmon":
        if set(extra) - {"kl16"}:
            raise UsageError(f"{path} is a whole Harmon; it takes no further part but 'kl16', and got {', '.join(sorted(extra))}.")
        tensors, tokenizer, llm, identity = read_tensors(path), path, content.get("llm"), (hub.fingerprint_weights(path),)
        if not isinstance(llm, dict) or not isinstance(content.get("mar"), dict):
            raise MmalignError(f"{path / 'config.json'} does not describe its parts 'llm' and 'mar'. Download the folder again.")
    else:
        file = _weight_file(path, extra)
        tokenizer = extra_folders(path, {name: part for name, part in extra.items() if name == "qwen2.5"}, {"qwen2.5": KNOWN["qwen2.5"]})[
            "qwen2.5"
        ]
        tensors, llm = read_file(file), hub.read_config(tokenizer)
        identity = (hub.sample_file(file), *(hub.sample_file(one) for one in sorted(tokenizer.glob("*.json"))))
    coder = {name.removeprefix(VAE): value for name, value in tensors.items() if name.startswith(VAE)}
    if not coder or "kl16" in extra:
        file = extra_file(path, extra, "kl16", "kl16.ckpt", KNOWN["kl16"])
        coder, identity = read_file(file), (*identity, hub.sample_file(file))
    kept = {name: value for name, value in tensors.items() if not name.startswith(VAE)}
    return Checkpoint(kept, coder, dict(llm), dict(content.get("mar") or {}), tokenizer, content.get("image_size"), identity)


def build(found: Checkpoint, path: Path, dtype: str) -> tuple[HarmonNet, KlAutoencoder]:
    """The network and the image coder: every parameter present, none left over."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from mmalign.models._harmon import HarmonNet

    tensors = dict(found.tensors)
    settings = Qwen2Config.from_dict({name: value for name, value in found.llm.items() if name not in ("architectures", "auto_map")})
    settings._attn_implementation = "sdpa"
    if settings.tie_word_embeddings:
        _tie(tensors)
    parts = {name: _below(tensors, name) for name in ("llm", "mar", "proj_in", "proj_out")}
    try:
        with torch.device("meta"):
            mar = Mar(MarSizes.of(parts["mar"], *_heads(found.mar, parts["mar"]["z_proj.weight"].shape[0])))
            projections = [_projection(parts[name]) for name in ("proj_in", "proj_out")]
            shell = HarmonNet(Qwen2ForCausalLM(settings), mar, *projections)
    except (KeyError, IndexError) as error:
        raise MmalignError(
            f"{path} is no Harmon: its weights lack {error}. Give wusize/Harmon-0_5B or the folder of harmon_0.5b.pth."
        ) from error
    expected = set(shell.state_dict())
    check_names(expected - set(tensors), set(tensors) - expected, path)
    check_shapes(tensors, shell, path)
    chosen = getattr(torch, dtype)
    llm = Qwen2ForCausalLM.from_pretrained(None, config=settings, state_dict=parts["llm"], dtype=chosen)
    for name, module in (("mar", mar), ("proj_in", projections[0]), ("proj_out", projections[1])):
        module.load_state_dict({key: value.to(chosen) for key, value in parts[name].items()}, assign=True)
    vae = kl_autoencoder(found.coder, path)
    if vae.channels != mar.sizes.channels:
        raise MmalignError(f"The image coder of {path} has {vae.channels} channels; its MAR was trained with {mar.sizes.channels}.")
    return HarmonNet(llm, mar, *projections), vae


def _weight_file(path: Path, extra: Mapping[str, Path]) -> Path:
    if "weights" in extra:
        return extra_file(path, extra, "weights", "harmon.pth", KNOWN["weights"])
    files = sorted(path.glob("*.pth"))
    if len(files) == 1:
        return files[0]
    named = ", ".join(file.name for file in files) or "none"
    raise UsageError(
        f"{path} is no Harmon folder with a config.json, and of the original weight files (*.pth) it has {named}; one is expected. "
        "Name it with --model-extra weights=FILE."
    )


def _tie(tensors: dict[str, Tensor]) -> None:
    """A tied model stores its embeddings once or twice; where both are there the output layer's count, which is loaded last."""
    head, embedding = "llm.lm_head.weight", "llm.model.embed_tokens.weight"
    for here, there in ((head, embedding), (embedding, head)):
        if here in tensors:
            tensors[there] = tensors[here]


def _below(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def _heads(options: Mapping[str, Any], width: int) -> tuple[int, int]:
    common = HEADS.get(str(options.get("type"))) or HEADS_OF_WIDTH.get(width)
    found = options.get("encoder_num_heads", common), options.get("decoder_num_heads", common)
    if not all(found):
        raise MmalignError(
            f"The attention heads of a MAR of width {width} are not known: no config names its type ({', '.join(HEADS)}). "
            "Give the Hugging Face layout, whose config.json does."
        )
    return int(found[0]), int(found[1])


def _projection(tensors: Mapping[str, Tensor]) -> nn.Module:
    first, last = tensors["0.weight"], tensors["2.weight"]
    return nn.Sequential(nn.Linear(*first.shape[::-1]), nn.SiLU(), nn.Linear(*last.shape[::-1]))
