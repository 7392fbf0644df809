"""A tiny untrained OpenUni, written in its official layout from a seed: an overlay file, InternVL3, SANA and DC-AE beside it."""

import json
import re

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from helpers.tiny_harmon import qwen_config, qwen_tokenizer
from safetensors.torch import save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from mmalign.testbed.tiny import randomise

QUERIES, SIDE, VISION = 5, 16, 28
SANA = {
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": SIDE // 2,
    "mlp_ratio": 2.0,
    "interpolation_scale": None,
}
DC_AE = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
SCHEDULE = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
}

# transformers' names -> InternVLChat's, the other way than the reader's.
NAMES = (
    (r"^model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"^model\.vision_tower\.", "vision_model."),
    (r"\.cls_token$", ".class_embedding"),
    (r"\.position_embeddings$", ".position_embedding"),
    (r"\.patch_embeddings\.projection\.", ".patch_embedding."),
    (r"(\.layers\.\d+)\.lambda_(\d)$", r"\1.ls\2"),
    (r"(\.layers\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"(\.layers\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"(\.layers\.\d+)\.attention\.projection_layer\.", r"\1.attn.proj."),
    (r"(\.layers\.\d+)\.attention\.q_proj\.", r"\1.attn.qkv."),
)


def original_names(tensors):
    """InternVLChat's names and fused projections of transformers' tensors."""
    made = {}
    for name, tensor in tensors.items():
        if re.search(r"vision_tower.*\.attention\.[kv]_proj\.", name):
            continue
        if re.search(r"vision_tower.*\.attention\.q_proj\.", name):
            tensor = torch.cat([tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        for pattern, target in NAMES:
            name = re.sub(pattern, target, name)
        made[name] = tensor.contiguous()
    return made


def make_internvl(folder, seed, width):
    folder.mkdir(parents=True)
    tokenizer = qwen_tokenizer(("<img>", "</img>", "<IMG_CONTEXT>"))
    tokenizer.save_pretrained(folder)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
    }
    more = {"image_size": VISION, "patch_size": 7, "qkv_bias": True, "qk_normalization": False}
    llm = qwen_config(len(tokenizer) + 2, width, tied=False)
    sizes = InternVLVisionConfig(**vision, image_size=[VISION] * 2, patch_size=[7] * 2, attention_bias=True, use_qk_norm=False)
    text = Qwen2Config.from_dict({name: value for name, value in llm.items() if name != "architectures"})
    net = InternVLForConditionalGeneration(InternVLConfig(vision_config=sizes, text_config=text, tie_word_embeddings=False))
    randomise(net, seed)
    save_file(original_names(net.state_dict()), folder / "model.safetensors")
    config = {"model_type": "internvl_chat", "vision_config": {**vision, **more}, "llm_config": llm}
    (folder / "config.json").write_text(json.dumps({**config, "downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v2"}))


def make_openuni(folder, seed=0, width=32, overlay_has_transformer=True):
    """wusize/openuni's overlay with the three repositories inside: 16 x 16 pixels, 8 x 8 latents of 4 channels. No config."""
    make_internvl(folder / "internvl3", seed, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer, vae = SanaTransformer2DModel(**SANA), AutoencoderDC(**DC_AE)
    randomise(transformer, seed + 1)
    randomise(vae, seed + 2)
    transformer.save_pretrained(folder / "sana" / "transformer")
    DPMSolverMultistepScheduler(**SCHEDULE).save_pretrained(folder / "sana" / "scheduler")
    vae.save_pretrained(folder / "dc-ae")
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 1}
    parts = torch.nn.ModuleDict(
        {"connector": SiglipEncoder(SiglipVisionConfig(**sizes)), "projector": torch.nn.Linear(width, SANA["caption_channels"])}
    )
    randomise(parts, seed + 3)
    tensors = {**parts.state_dict(), "meta_queries": torch.randn(QUERIES, width, generator=torch.Generator().manual_seed(seed))}
    if overlay_has_transformer:
        randomise(transformer, seed + 4)
        tensors |= {f"transformer.{name}": value for name, value in transformer.state_dict().items()}
    torch.save(tensors, folder / "openuni_b_tiny.pth")
    return folder
