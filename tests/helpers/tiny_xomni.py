"""A tiny untrained X-Omni in its official layout, FLUX's folder inside: 16 pixels per code, 32 codes, pictures of 32 x 32 to 64 x 64."""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from helpers.tiny_diffusion import clip_encoder, clip_tokenizer, image_coder, t5_encoder, t5_tokenizer
from helpers.tiny_masked import byte_tokenizer
from safetensors.torch import save_file
from transformers import AddedToken, CLIPTextModel, Qwen2Config

from mmalign.models._xomni_net import XOmniNet
from mmalign.models.layers.siglip_vq import Projector, SiglipVit
from mmalign.testbed.tiny import randomise

CODES, PATCH, WIDTH = 32, 16, 32
SPECIALS = ["<SOM>", "<EOM>", "<IMAGE>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vit_shapes(width=WIDTH, depth=2, side=4):
    """Meta tensors from which the tokenizer's ViT reads its sizes."""
    empty = {f"blocks.{index}.mlp.fc1.weight": torch.empty(2 * width, width, device="meta") for index in range(depth)}
    patch = torch.empty(width, 3, PATCH, PATCH, device="meta")
    return {**empty, "patch_embed.proj.weight": patch, "pos_embed": torch.empty(1, side * side, width, device="meta")}


def projector_shapes(width=WIDTH, depth=16):
    empty = {f"post_conv.{index}.conv1.weight": torch.empty(0, device="meta") for index in range(2)}
    codebook = torch.empty(CODES, depth, device="meta")
    return {**empty, "quant_conv.weight": torch.empty(depth, width, 1, 1, device="meta"), "quantize.embedding.weight": codebook}


def make_xomni(folder: Path, seed: int = 0, width: int = 48) -> Path:
    tokenizer = byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 300, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    text, image = len(tokenizer), CODES + 8
    tokens = [*(f"<MM-Token-{code}>" for code in range(CODES)), *SPECIALS]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    language = {
        "vocab_size": text,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
    }
    net = XOmniNet(Qwen2Config(**language, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}), 1, 1, image)
    randomise(net, seed)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, folder / "model.safetensors")
    (folder / "vision").mkdir()
    vit, projector = SiglipVit(vit_shapes(), heads=4), Projector(projector_shapes())
    for part, (file, more) in {
        vit: ("vision/siglip.pt", {"norm.weight": torch.ones(WIDTH)}),
        projector: ("vision/projector.pt", {}),
    }.items():
        randomise(part, seed + 1)
        torch.save({**part.state_dict(), **more}, folder / file)
    vision = {
        "dtype": "float32",
        "transform": {"short_size": 32, "long_size": 64, "patch_size": PATCH, "min_short_size": 8, "max_aspect_ratio": 3.0},
        "encoder": {
            "siglip_name": "tiny",
            "heads": 4,
            "siglip_path": "vision/siglip.pt",
            "projector_path": "vision/projector.pt",
            "z_channels": WIDTH,
            "codebook_size": CODES,
            "codebook_dim": 16,
        },
        "decoder": {
            "model_path": "decoder",
            "upscale_factor": PATCH,
            "num_inference_steps": 2,
            "cfg_scale": 1.5,
            "cfg_scale_2": 1.5,
            "max_sequence_length": 16,
        },
    }
    config = {
        **language,
        "model_type": "x-omni",
        "architectures": ["XOmniForCausalLM"],
        "rope_theta": 10000.0,
        "num_mm_adap_layers": 1,
        "num_mm_head_layers": 1,
        "mm_vocab_size": image,
        "image_vocab_size": CODES,
        "mm_special_tokens": SPECIALS,
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(config))
    make_decoder(folder / "decoder", seed + 2)
    make_flux_parts(folder / "flux", seed + 3)
    return folder


def make_decoder(folder: Path, seed: int) -> None:
    settings = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": [4, 4, 8],
        "guidance_embeds": False,
    }
    net = FluxTransformer2DModel(**settings)
    net.siglip_embed = torch.nn.Linear(WIDTH, net.inner_dim, bias=False)
    randomise(net, seed)
    folder.mkdir()
    save_file(net.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    config = {**settings, "_class_name": "FluxTransformer2DModelWithSigLIP", "siglip_channels": WIDTH, "drop_token_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))


def make_flux_parts(folder: Path, seed: int) -> None:
    """What of FLUX.1-dev the decoder uses."""
    tokenizer, other = clip_tokenizer(folder / "tokenizer"), t5_tokenizer()
    parts = {
        "text_encoder": clip_encoder(CLIPTextModel, tokenizer, 32),
        "text_encoder_2": t5_encoder(other),
        "vae": image_coder(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
    }
    for name, part in parts.items():
        randomise(part, seed)
        part.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    other.save_pretrained(folder / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0).save_pretrained(
        folder / "scheduler"
    )
