"""A tiny untrained BAGEL in its official layout: 16 pixels per latent token, pictures up to 64 x 64, a vision tower of up to 56 x 56."""

import json
from pathlib import Path

import torch
from helpers.tiny_masked import byte_tokenizer
from safetensors.torch import save_file
from transformers import Qwen2Config

from mmalign.models._bagel_net import BagelNet
from mmalign.models.layers.kl import KlAutoencoder
from mmalign.models.layers.ldm import Decoder, Encoder
from mmalign.testbed.tiny import randomise

CHANNELS, PATCH, SIDE = 4, 2, 4
FRAMES = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]


def make_bagel(folder: Path, seed: int = 0, width: int = 48) -> Path:
    tokenizer = byte_tokenizer(["<|endoftext|>", *FRAMES], 300, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.save_pretrained(folder)
    language = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer) + 5,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
    }
    (folder / "llm_config.json").write_text(json.dumps(language))
    (folder / "vit_config.json").write_text(json.dumps(vision))
    known = {name: language[name] for name in language if name not in ("model_type", "rope_theta")}
    config = Qwen2Config(**known, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    shapes = {
        "vit_pos_embed.pos_embed": torch.empty(16, width, device="meta"),
        "latent_pos_embed.pos_embed": torch.empty(SIDE**2, width, device="meta"),
        "vae2llm.weight": torch.empty(width, CHANNELS * PATCH**2, device="meta"),
    }
    net = BagelNet(config, vision, shapes)
    randomise(net, seed)
    # The layer that a checkpoint may have and the model leaves out.
    spare = {name.replace("layers.1.", "layers.2."): value for name, value in net.vit_model.state_dict().items() if "layers.1." in name}
    spare = {f"vit_model.{name}": value.clone() for name, value in spare.items()}
    save_file({**net.state_dict(), **spare}, folder / "ema.safetensors")
    widths = [32] * 4
    encoder, decoder = Encoder(32, widths, [1] * 4, 2 * CHANNELS, projects=False), Decoder(CHANNELS, 32, widths, [2] * 4, projects=False)
    vae = KlAutoencoder(encoder, decoder, CHANNELS, 8)
    randomise(vae, seed + 1)
    save_file(vae.state_dict(), folder / "ae.safetensors")
    return folder
