"""mmdet 2.x Mask2Former checkpoints as transformers models: the key map, and the identity of GenEval's official weights.

Names and layouts: mmdet 2.28.2 (backbones/swin.py, plugins/msdeformattn_pixel_decoder.py, dense_heads/mask2former_head.py), mmcv 1.7.1.
Two things are not a renaming: query, key and value are one matrix in mmdet's Swin and in its decoder's self-attention, and mmdet merges
2 x 2 patches with `unfold`, so that the inputs of a downsampling layer are ordered channel, row, column; here column, row, channel.
Checked on a small model of random weights against mmdet's own classes: class logits within 2e-6, mask logits within 2e-5 of 13.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.scorers._mask2former import MAY_LACK
from mmalign.scorers._weights import fill, read_tensors, rename
from mmalign.types import MmalignError

if TYPE_CHECKING:
    import torch

OFFICIAL_FILE = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
OFFICIAL_SHA = "743b7d99"  # mmdet publishes a file under the first 8 digits of its sha256

LEVELS, POINTS = 3, 4  # of the deformable attention; fixed in transformers
SWIN, PIXEL, DECODER = "model.pixel_level_module.encoder", "model.pixel_level_module.decoder", "model.transformer_module"
STAGE_IN, STAGE = "backbone.stages.*", f"{SWIN}.swin.encoder.layers.*"
PIXEL_IN, LAYER_IN, LAYER = "panoptic_head.pixel_decoder", "panoptic_head.transformer_decoder.layers.*", f"{DECODER}.decoder.layers.*"

RENAMES = {  # patterns of `_weights.rename`; the first that fits holds
    "backbone.patch_embed.projection.@": f"{SWIN}.swin.embeddings.patch_embeddings.projection.@",
    "backbone.patch_embed.norm.@": f"{SWIN}.swin.embeddings.norm.@",
    "backbone.norm0.@": f"{SWIN}.hidden_states_norms.stage1.@",
    "backbone.norm1.@": f"{SWIN}.hidden_states_norms.stage2.@",
    "backbone.norm2.@": f"{SWIN}.hidden_states_norms.stage3.@",
    "backbone.norm3.@": f"{SWIN}.hidden_states_norms.stage4.@",
    f"{STAGE_IN}.downsample.@": f"{STAGE}.downsample.@",
    f"{STAGE_IN}.blocks.*.norm1.@": f"{STAGE}.blocks.*.layernorm_before.@",
    f"{STAGE_IN}.blocks.*.norm2.@": f"{STAGE}.blocks.*.layernorm_after.@",
    f"{STAGE_IN}.blocks.*.attn.w_msa.qkv.@": f"{STAGE}.blocks.*.attention.?_proj.@",
    f"{STAGE_IN}.blocks.*.attn.w_msa.proj.@": f"{STAGE}.blocks.*.attention.o_proj.@",
    f"{STAGE_IN}.blocks.*.attn.w_msa.@": f"{STAGE}.blocks.*.attention.relative_position_bias.@",
    f"{STAGE_IN}.blocks.*.ffn.layers.0.0.@": f"{STAGE}.blocks.*.mlp.fc1.@",
    f"{STAGE_IN}.blocks.*.ffn.layers.1.@": f"{STAGE}.blocks.*.mlp.fc2.@",
    f"{PIXEL_IN}.input_convs.*.conv.@": f"{PIXEL}.input_projections.*.0.@",
    f"{PIXEL_IN}.input_convs.*.gn.@": f"{PIXEL}.input_projections.*.1.@",
    f"{PIXEL_IN}.lateral_convs.0.conv.@": f"{PIXEL}.adapter_1.0.@",
    f"{PIXEL_IN}.lateral_convs.0.gn.@": f"{PIXEL}.adapter_1.1.@",
    f"{PIXEL_IN}.output_convs.0.conv.@": f"{PIXEL}.layer_1.0.@",
    f"{PIXEL_IN}.output_convs.0.gn.@": f"{PIXEL}.layer_1.1.@",
    f"{PIXEL_IN}.level_encoding.weight": f"{PIXEL}.level_embed",
    f"{PIXEL_IN}.mask_feature.@": f"{PIXEL}.mask_projection.@",
    f"{PIXEL_IN}.encoder.layers.*.attentions.0.@": f"{PIXEL}.encoder.layers.*.self_attn.@",
    f"{PIXEL_IN}.encoder.layers.*.norms.0.@": f"{PIXEL}.encoder.layers.*.self_attn_layer_norm.@",
    f"{PIXEL_IN}.encoder.layers.*.norms.1.@": f"{PIXEL}.encoder.layers.*.final_layer_norm.@",
    f"{PIXEL_IN}.encoder.layers.*.ffns.0.layers.0.0.@": f"{PIXEL}.encoder.layers.*.fc1.@",
    f"{PIXEL_IN}.encoder.layers.*.ffns.0.layers.1.@": f"{PIXEL}.encoder.layers.*.fc2.@",
    f"{LAYER_IN}.attentions.0.attn.@": f"{LAYER}.cross_attn.@",
    f"{LAYER_IN}.attentions.1.attn.in_proj_@": f"{LAYER}.self_attn.?_proj.@",
    f"{LAYER_IN}.attentions.1.attn.out_proj.@": f"{LAYER}.self_attn.out_proj.@",
    f"{LAYER_IN}.norms.0.@": f"{LAYER}.cross_attn_layer_norm.@",
    f"{LAYER_IN}.norms.1.@": f"{LAYER}.self_attn_layer_norm.@",
    f"{LAYER_IN}.norms.2.@": f"{LAYER}.final_layer_norm.@",
    f"{LAYER_IN}.ffns.0.layers.0.0.@": f"{LAYER}.fc1.@",
    f"{LAYER_IN}.ffns.0.layers.1.@": f"{LAYER}.fc2.@",
    "panoptic_head.transformer_decoder.post_norm.@": f"{DECODER}.decoder.layernorm.@",
    "panoptic_head.query_embed.@": f"{DECODER}.queries_embedder.@",
    "panoptic_head.query_feat.@": f"{DECODER}.queries_features.@",
    "panoptic_head.level_embed.@": f"{DECODER}.level_embed.@",
    "panoptic_head.mask_embed.0.@": f"{DECODER}.decoder.mask_predictor.mask_embedder.0.0.@",
    "panoptic_head.mask_embed.2.@": f"{DECODER}.decoder.mask_predictor.mask_embedder.1.0.@",
    "panoptic_head.mask_embed.4.@": f"{DECODER}.decoder.mask_predictor.mask_embedder.2.0.@",
    "panoptic_head.cls_embed.@": "class_predictor.@",
}


def is_official(path: Path) -> bool:
    """Whether the file's content is the checkpoint that GenEval names, whatever the file is called."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(OFFICIAL_SHA)


def load_checkpoint(path: Path, device: str, dtype: str) -> Any:
    """The transformers model of an mmdet 2.x Mask2Former (Swin) checkpoint file; nothing but tensors is unpickled."""
    import torch
    from transformers import Mask2FormerForUniversalSegmentation

    state = read_tensors(path)
    try:
        config = config_of(state)
    except KeyError as error:
        raise MmalignError(
            f"{path} is no mmdet 2.x Mask2Former checkpoint with a Swin backbone: it lacks the tensor {error}. Expected {OFFICIAL_FILE}."
        ) from error
    model: Any = Mask2FormerForUniversalSegmentation(config)
    unused = {key: tensor for key, tensor in model.state_dict().items() if any(part in key for part in MAY_LACK)}
    fill(model, unused | convert(state, str(path)), str(path))
    return model.eval().to(device=device, dtype=getattr(torch, dtype))


def convert(state: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """mmdet's tensors under transformers' names; MmalignError names a tensor that has no place."""
    constants = "relative_position_index"  # both compute it
    renamed = rename({key: tensor for key, tensor in state.items() if not key.endswith(constants)}, RENAMES, source)
    return {key: _reorder(tensor) if ".downsample." in key else tensor for key, tensor in renamed.items()}


def config_of(state: Mapping[str, torch.Tensor]) -> Any:
    """The architecture read from the tensors' names and shapes, as mmdet's own config file is not in the checkpoint's tensors."""
    import transformers

    Mask2FormerConfig: Any = transformers.Mask2FormerConfig  # its signature is made at run time
    SwinConfig: Any = transformers.SwinConfig

    def count(pattern: str) -> int:
        return len({match[1] for key in state if (match := re.match(pattern, key))})

    n_stages = count(r"backbone\.stages\.(\d+)\.")
    tables = [state[f"backbone.stages.{stage}.blocks.0.attn.w_msa.relative_position_bias_table"] for stage in range(n_stages)]
    pixel, decoder = "panoptic_head.pixel_decoder", "panoptic_head.transformer_decoder"
    n_classes = state["panoptic_head.cls_embed.weight"].shape[0] - 1
    return Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=state["backbone.patch_embed.projection.weight"].shape[0],
            depths=[count(rf"backbone\.stages\.{stage}\.blocks\.(\d+)\.") for stage in range(n_stages)],
            num_heads=[table.shape[1] for table in tables],
            window_size=(int(tables[0].shape[0] ** 0.5) + 1) // 2,
            out_features=[f"stage{stage + 1}" for stage in range(n_stages)],
        ),
        feature_size=state[f"{pixel}.mask_feature.weight"].shape[1],
        mask_feature_size=state[f"{pixel}.mask_feature.weight"].shape[0],
        hidden_dim=state["panoptic_head.query_feat.weight"].shape[1],
        num_queries=state["panoptic_head.query_feat.weight"].shape[0],
        encoder_layers=count(rf"{pixel}\.encoder\.layers\.(\d+)\."),
        encoder_feedforward_dim=state[f"{pixel}.encoder.layers.0.ffns.0.layers.0.0.weight"].shape[0],
        decoder_layers=count(rf"{decoder}\.layers\.(\d+)\.") + 1,
        dim_feedforward=state[f"{decoder}.layers.0.ffns.0.layers.0.0.weight"].shape[0],
        num_attention_heads=state[f"{pixel}.encoder.layers.0.attentions.0.sampling_offsets.weight"].shape[0] // (LEVELS * POINTS * 2),
        num_labels=n_classes,
    )


def _reorder(tensor: torch.Tensor) -> torch.Tensor:
    """The last axis from (channel, row, column) to (column, row, channel)."""
    from einops import rearrange

    return rearrange(tensor, "... (c row column) -> ... (column row c)", row=2, column=2).contiguous()
