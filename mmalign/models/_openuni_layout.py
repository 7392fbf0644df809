"""On-disk layout of OpenUni: an overlay file over InternVL3 (OpenGVLab's names), SANA and DC-AE (diffusers' names).

The overlay may hold any of its parts (meta_queries, connector, projector, transformer, lmm, vae); what it lacks comes from the repository
below it. Sizes come from the tensors and those repositories' configs. Heads of the connector are 64 wide, as in both released sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign import hub
from mmalign.models.layers.extras import check_extras, extra_file, extra_folders
from mmalign.models.layers.weights import check_names, check_shapes, read_file, read_tensors
from mmalign.types import MmalignError, UsageError

BASES = {
    "internvl3": "the folder of OpenGVLab/InternVL3-1B or -2B, with the tokenizer",
    "sana": "the folder of the SANA pipeline it was trained with (transformer and scheduler)",
    "dc-ae": "the folder of mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
}
KNOWN = {**BASES, "weights": "the overlay file, where the folder has several"}
PARTS = ("lmm", "vae", "transformer", "connector", "projector", "meta_queries")
HEAD_WIDTH = 64

# InternVLChat's names -> transformers', all that match are applied in order. The fused q, k, v are split.
RENAMES = (
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vision_model\.encoder\.layers\.", "model.vision_tower.encoder.layer."),
    (r"^vision_model\.", "model.vision_tower."),
    (r"\.class_embedding$", ".cls_token"),
    (r"\.position_embedding$", ".position_embeddings"),
    (r"\.patch_embedding\.", ".patch_embeddings.projection."),
    (r"(\.layer\.\d+)\.ls(\d)$", r"\1.lambda_\2"),
    (r"(\.layer\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(\.layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"(\.layer\.\d+)\.attn\.proj\.", r"\1.attention.projection_layer."),
    (r"(\.layer\.\d+)\.attn\.", r"\1.attention."),
)


class Queries(nn.Module):
    """The learned tokens [Q, E] that follow a prompt."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class OpenUniNet(nn.Module):
    """All networks but the image coder."""

    def __init__(self, lmm: Any, queries: Queries, connector: Any, projector: nn.Linear, transformer: Any) -> None:
        super().__init__()
        self.lmm, self.queries, self.connector, self.projector, self.transformer = lmm, queries, connector, projector, transformer

    @property
    def lm_head(self) -> nn.Module:
        return self.lmm.lm_head

    def get_input_embeddings(self) -> nn.Module:
        return self.lmm.get_input_embeddings()

    def enable_gradient_checkpointing(self) -> None:
        self.transformer.enable_gradient_checkpointing()


@dataclass(frozen=True)
class Checkpoint:
    """The overlay's tensors by part, the folders below it, the options of a saved config, and what the fingerprint covers."""

    overlay: dict[str, dict[str, Tensor]]
    bases: dict[str, Path]
    options: dict[str, Any]
    identity: tuple[str, ...]


def find(path: Path, extra: Mapping[str, Path]) -> Checkpoint:
    """The checkpoint of a folder; an error says which piece is missing."""
    check_extras(extra, KNOWN)
    options = hub.read_config(path) if (path / "config.json").is_file() else {}
    file = _overlay_file(path, extra)
    tensors = read_file(file)
    bases = extra_folders(path, {name: folder for name, folder in extra.items() if name in BASES}, BASES)
    alien = [name for name in tensors if name.split(".")[0] not in PARTS]
    check_names([], alien, file)
    overlay = {part: {n.removeprefix(f"{part}."): tensor for n, tensor in tensors.items() if n.split(".")[0] == part} for part in PARTS}
    return Checkpoint(overlay, bases, options, (hub.sample_file(file), *(hub.fingerprint_weights(folder) for folder in bases.values())))


def build(found: Checkpoint, path: Path, dtype: str) -> tuple[OpenUniNet, Any]:
    """The network and the image coder: every parameter present, none left over."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    chosen, overlay = getattr(torch, dtype), found.overlay
    if "meta_queries" not in overlay["meta_queries"] or not overlay["connector"] or "weight" not in overlay["projector"]:
        raise MmalignError(f"{path} is no OpenUni: its file lacks queries, connector or projector. Give the overlay of wusize/openuni.")
    lmm = _internvl(found.bases["internvl3"], overlay["lmm"], chosen)
    transformer = _diffusers(SanaTransformer2DModel, found.bases["sana"] / "transformer", overlay["transformer"], chosen)
    vae = _diffusers(AutoencoderDC, found.bases["dc-ae"], overlay["vae"], torch.float32)
    weight = overlay["projector"]["weight"]
    projector = nn.Linear(weight.shape[1], weight.shape[0], dtype=chosen)
    check_shapes(overlay["projector"], projector, path)
    projector.load_state_dict({name: value.to(chosen) for name, value in overlay["projector"].items()})
    heads = (found.options.get("connector") or {}).get("num_attention_heads")
    connector = _connector(overlay["connector"], heads, path).to(chosen)
    net = OpenUniNet(lmm, Queries(overlay["meta_queries"]["meta_queries"].to(chosen)), connector, projector, transformer)
    widths = (net.queries.weight.shape[1], lmm.config.text_config.hidden_size, weight.shape[1])
    if len(set(widths)) > 1 or weight.shape[0] != transformer.config.caption_channels:
        raise MmalignError(
            f"The parts of {path} do not fit: queries, InternVL3 and connector are {widths} wide, the projector gives {weight.shape[0]} "
            f"channels and SANA reads {transformer.config.caption_channels}. Give the InternVL3 and the SANA that it was trained with."
        )
    return net, vae


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """InternVLChat's tensors under the names of transformers' InternVL."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, target in RENAMES:
            name = re.sub(pattern, target, name)
        if ".attention.qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("qkv", f"{part}_proj")] = piece
        else:
            renamed[name] = tensor
    return renamed


def _overlay_file(path: Path, extra: Mapping[str, Path]) -> Path:
    if "weights" in extra:
        return extra_file(path, extra, "weights", "openuni.pth", KNOWN["weights"])
    files = sorted([*path.glob("*.pth"), *path.glob("model.safetensors")])
    if len(files) == 1:
        return files[0]
    named = ", ".join(file.name for file in files) or "none"
    raise UsageError(f"Of OpenUni's overlay files (*.pth) {path} has {named}; one is expected. Name it with --model-extra weights=FILE.")


def _internvl(folder: Path, overlay: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    content, tensors = hub.read_config(folder), to_transformers({**read_tensors(folder), **overlay})
    try:
        vision, text = content["vision_config"], content["llm_config"]
    except KeyError as error:
        raise MmalignError(f"{folder} is no InternVL3 in OpenGVLab's layout: its config.json has no {error}.") from error
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "norm_type", "layer_norm_eps")
    sizes = InternVLVisionConfig(
        **{name: vision[name] for name in kept if name in vision},
        image_size=[vision["image_size"]] * 2,
        patch_size=[vision["patch_size"]] * 2,
        attention_bias=vision.get("qkv_bias", True),
        use_qk_norm=vision.get("qk_normalization", False),
    )
    # The composite config ties by default, and tying overwrites the input embeddings with the head: only the file knows.
    tied = "lm_head.weight" not in tensors
    words = Qwen2Config.from_dict({name: value for name, value in text.items() if name not in ("architectures", "auto_map")})
    words.tie_word_embeddings = tied
    settings = InternVLConfig(
        vision_config=sizes,
        text_config=words,
        downsample_ratio=content.get("downsample_ratio", 0.5),
        vision_feature_layer=content.get("select_layer", -1),
        tie_word_embeddings=tied,
    )
    settings._attn_implementation = "sdpa"
    with torch.device("meta"):
        shell = InternVLForConditionalGeneration(settings)
    expected = set(shell.state_dict()) - ({"lm_head.weight"} if tied else set())
    check_names(expected - set(tensors), set(tensors) - expected, folder)
    check_shapes(tensors, shell, folder)
    return InternVLForConditionalGeneration.from_pretrained(None, config=settings, state_dict=tensors, dtype=dtype)


def _connector(tensors: Mapping[str, Tensor], heads: int | None, where: Path) -> Any:
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipEncoder

    try:
        hidden, width = tensors["layers.0.mlp.fc1.weight"].shape
    except KeyError as error:
        raise MmalignError(f"{where} is no OpenUni: its connector lacks {error}. Give the overlay of wusize/openuni.") from error
    settings = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=len({name.split(".")[1] for name in tensors}),
        num_attention_heads=heads or width // HEAD_WIDTH,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )
    settings._attn_implementation = "sdpa"
    made = SiglipEncoder(settings)  # type: ignore[arg-type]
    check_names(set(made.state_dict()) - set(tensors), set(tensors) - set(made.state_dict()), where)
    check_shapes(dict(tensors), made, where)
    made.load_state_dict(dict(tensors))
    return made


def _diffusers(cls: Any, folder: Path, overlay: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    if not (folder / "config.json").is_file():
        raise UsageError(f"There is no {folder / 'config.json'}, which OpenUni needs for {cls.__name__}. Download that repository again.")
    made = cls.from_config(cls.load_config(folder))
    tensors = {**read_tensors(folder), **overlay}
    expected = set(made.state_dict())
    check_names(expected - set(tensors), set(tensors) - expected, folder)
    check_shapes(tensors, made, folder)
    made.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return made
