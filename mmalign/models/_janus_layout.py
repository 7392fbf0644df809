"""On-disk layouts of Janus and Janus-Pro: DeepSeek's original names and sizes, and the Hugging Face ones.

The Hugging Face layout (`model_type` janus) is what `JanusForConditionalGeneration` saves. The original one (`multi_modality`;
deepseek-ai/Janus at 1daa72f) differs in parameter names, fuses the vision tower's q, k and v, and its config.json tells the vision
tower and the image tokenizer by name instead of by size. So sizes are read from the tensors themselves; only what no shape
shows (attention heads of the vision tower) comes from the config.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.types import MmalignError

if TYPE_CHECKING:
    from torch import Tensor

ORIGINAL, HUGGING_FACE = "multi_modality", "janus"

# Attention heads of the vision towers that the original configs name (deepseek-ai/Janus, siglip_vit.py).
VISION_HEADS = {"siglip_large_patch16_384": 16, "siglip_large_patch16_256": 16, "siglip_so400m_patch14_384": 16}

# Parameters of the original checkpoint that nothing reads: a pooling head and the image tokenizer's usage counter.
UNUSED = re.compile(r"vision_model\.vision_tower\.attn_pool\.|gen_vision_model\.quantize\.codebook_used$")

# original prefix or part -> Hugging Face, tried in order on every name; all that match are applied. `#` stands for a number.
RENAMES = (
    ("vision_model.vision_tower.", "model.vision_model."),
    ("model.vision_model.pos_embed", "model.vision_model.embeddings.position_embedding.weight"),
    ("model.vision_model.patch_embed.proj.", "model.vision_model.embeddings.patch_embedding."),
    ("model.vision_model.norm.", "model.vision_model.post_layernorm."),
    ("model.vision_model.blocks.#.", "model.vision_model.encoder.layers.#."),
    ("model.vision_model.encoder.layers.#.norm1.", "model.vision_model.encoder.layers.#.layer_norm1."),
    ("model.vision_model.encoder.layers.#.norm2.", "model.vision_model.encoder.layers.#.layer_norm2."),
    ("model.vision_model.encoder.layers.#.attn.", "model.vision_model.encoder.layers.#.self_attn."),
    ("model.vision_model.encoder.layers.#.self_attn.proj.", "model.vision_model.encoder.layers.#.self_attn.projection_layer."),
    ("aligner.layers.0.", "model.aligner.fc1."),
    ("aligner.layers.2.", "model.aligner.hidden_layers.0."),
    ("gen_aligner.layers.0.", "model.generation_aligner.fc1."),
    ("gen_aligner.layers.2.", "model.generation_aligner.hidden_layers.0."),
    ("gen_embed.", "model.generation_embeddings."),
    ("gen_head.output_mlp_projector.", "model.generation_head.proj_out."),
    ("gen_head.vision_head.", "model.generation_head.vision_head."),
    ("gen_vision_model.", "model.vqmodel."),
    ("model.vqmodel.encoder.conv_blocks.#.", "model.vqmodel.encoder.down.#."),
    ("model.vqmodel.decoder.conv_blocks.#.", "model.vqmodel.decoder.up.#."),
    ("model.vqmodel.encoder.down.#.res.", "model.vqmodel.encoder.down.#.block."),
    ("model.vqmodel.decoder.up.#.res.", "model.vqmodel.decoder.up.#.block."),
    ("model.vqmodel.encoder.mid.0.", "model.vqmodel.encoder.mid.block_1."),
    ("model.vqmodel.encoder.mid.1.", "model.vqmodel.encoder.mid.attn_1."),
    ("model.vqmodel.encoder.mid.2.", "model.vqmodel.encoder.mid.block_2."),
    ("model.vqmodel.decoder.mid.0.", "model.vqmodel.decoder.mid.block_1."),
    ("model.vqmodel.decoder.mid.1.", "model.vqmodel.decoder.mid.attn_1."),
    ("model.vqmodel.decoder.mid.2.", "model.vqmodel.decoder.mid.block_2."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
)
POSITIONS = "model.vision_model.embeddings.position_embedding.weight"  # stored as [1, tokens, width] in the original layout
FUSED = ".self_attn.qkv."


def model_type(folder: Path) -> str | None:
    """The `model_type` of a folder's config.json; None when there is none or it cannot be read."""
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def to_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original checkpoint's tensors under the Hugging Face names."""
    rules = [(_pattern(old), new.replace("#", r"\1")) for old, new in RENAMES]
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if UNUSED.match(name):
            continue
        for pattern, target in rules:
            name = pattern.sub(target, name)
        if name == POSITIONS:
            tensor = tensor.squeeze(0)
        if FUSED in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(FUSED, f".self_attn.{part}_proj.")] = piece.contiguous()
        else:
            renamed[name] = tensor
    return renamed


def to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hugging_face`, without the unused parameters: for checkpoints handed back to the original code."""
    import torch

    rules = [(_pattern(new), old.replace("#", r"\1")) for old, new in reversed(RENAMES)]
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".self_attn.q_proj." in name and name.startswith("model.vision_model."):
            tensor = torch.cat([tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace(".q_proj.", ".qkv.")
        elif re.search(r"^model\.vision_model\..*\.[kv]_proj\.", name):
            continue
        if name == POSITIONS:
            tensor = tensor[None]
        for pattern, target in rules:
            name = pattern.sub(target, name)
        renamed[name] = tensor
    return renamed


def original_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of JanusVisionConfig, JanusVQVAEConfig and LlamaConfig for an original checkpoint, as three dictionaries.

    `tensors` have Hugging Face names (see `to_hugging_face`); MmalignError when a needed one or the vision tower's heads are missing.
    """
    try:
        return {"vision": _vision_sizes(config, tensors), "vq": _vq_sizes(tensors), "text": _text_sizes(config["language_config"])}
    except KeyError as error:
        raise MmalignError(f"The original Janus checkpoint lacks {error}; it cannot be sized. Download the whole folder again.") from error


def _text_sizes(language: Mapping[str, Any]) -> dict[str, Any]:
    """LlamaConfig's arguments: what the file states, the rotary settings in the one place where transformers 5 looks for them."""
    sizes = {name: value for name, value in language.items() if name not in ("model_type", "torch_dtype", "architectures", "auto_map")}
    theta, scaling = sizes.pop("rope_theta", 10000.0), dict(sizes.pop("rope_scaling", None) or {})
    kind = scaling.pop("type", "default")
    return {**sizes, "rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


def _vision_sizes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    parameters = config["vision_config"]["params"]
    name, layer = parameters.get("model_name"), "model.vision_model.encoder.layers.0."
    heads = parameters.get("heads", VISION_HEADS.get(name))
    if heads is None:
        raise MmalignError(
            f"The vision tower '{name}' of the original Janus config is unknown, and no tensor shows how many heads it has. "
            f"Known: {', '.join(sorted(VISION_HEADS))}. Add `heads` to vision_config.params in config.json."
        )
    patch_embedding = tensors["model.vision_model.embeddings.patch_embedding.weight"]
    width, patch = patch_embedding.shape[0], patch_embedding.shape[-1]
    tokens = tensors[POSITIONS].shape[0]
    return {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": parameters.get("image_size", patch * round(tokens**0.5)),
        "num_image_tokens": tokens,
        "num_attention_heads": heads,
        "num_hidden_layers": _count(tensors, r"model\.vision_model\.encoder\.layers\.(\d+)\."),
        "mlp_ratio": tensors[f"{layer}mlp.fc1.weight"].shape[0] / width,
        "projection_dim": tensors["model.aligner.fc1.weight"].shape[0],
        "depth": 1 + _count(tensors, r"model\.aligner\.hidden_layers\.(\d+)\."),
    }


def _vq_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    encoder, head = "model.vqmodel.encoder", "model.generation_head"
    codes, depth = tensors["model.vqmodel.quantize.embedding.weight"].shape
    base = tensors[f"{encoder}.conv_in.weight"].shape[0]
    levels = _count(tensors, r"model\.vqmodel\.encoder\.down\.(\d+)\.")
    return {
        "num_embeddings": codes,
        "embed_dim": depth,
        "base_channels": base,
        "latent_channels": tensors[f"{encoder}.conv_out.weight"].shape[0],
        "channel_multiplier": [tensors[f"{encoder}.down.{level}.block.0.conv1.weight"].shape[0] // base for level in range(levels)],
        "num_res_blocks": _count(tensors, r"model\.vqmodel\.encoder\.down\.0\.block\.(\d+)\."),
        "image_token_embed_dim": tensors[f"{head}.proj_out.weight"].shape[1],
        "projection_dim": tensors[f"{head}.proj_out.weight"].shape[0],
        "num_hidden_layers": 1 + _count(tensors, r"model\.generation_aligner\.hidden_layers\.(\d+)\."),
    }


def _pattern(part: str) -> re.Pattern[str]:
    return re.compile("^" + re.escape(part).replace(r"\#", r"(\d+)"))


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})
