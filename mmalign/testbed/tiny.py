"""Tiny untrained members of the model families, written in their official layouts from a seed: what the tests run on.

Same classes, same files as the released checkpoints; only the sizes and the random weights differ.
"""

from __future__ import annotations

import json
from pathlib import Path

SENTENCES = (
    "a photo of a red circle and two small blue squares",
    "a green triangle to the left of a yellow star",
    "what colour is the circle? red yes no how many",
    "describe the image: the large purple square is above the circle",
)


def make_janus(folder: Path, seed: int = 0, side: int = 16, width: int = 48, layers: int = 2, vocabulary: int = 320) -> Path:
    """A Janus of about 0.4 million parameters in the Hugging Face layout. Weights are scaled so that attention is far from uniform."""
    import torch
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusImageProcessorPil,
        JanusProcessor,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    from mmalign.testbed.tokenizer import CHAT_TEMPLATE, train_tokenizer

    tokenizer = train_tokenizer(SENTENCES * 3, vocabulary)
    patch = 4
    tokens = (side // patch) ** 2
    settings = JanusConfig(
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            mlp_ratio=2.0,
            image_size=side,
            patch_size=patch,
            projection_dim=width,
            num_image_tokens=tokens,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=64,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
            projection_dim=width,
            image_token_embed_dim=width,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(settings).eval()
    randomise(model, seed)
    generation = model.generation_config
    generation._from_model_config = False  # otherwise reloading drops generation_kwargs
    generation.guidance_scale, generation.do_sample = 5.0, True
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    generation.generation_kwargs = {"boi_token_id": tokenizer.boi_token_id}
    pictures = JanusImageProcessorPil(size={"height": side, "width": side}, min_size=patch, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model.save_pretrained(folder)
    JanusProcessor(pictures, tokenizer, chat_template=CHAT_TEMPLATE, num_image_tokens=tokens).save_pretrained(folder)
    return folder


def make_original_janus(source: Path, folder: Path, pickled: bool = True) -> Path:
    """The Janus in `source` (Hugging Face layout) as DeepSeek's original layout, unused parameters and fused attention included."""
    import torch
    from safetensors.torch import load_file, save_file

    from mmalign.models._janus_layout import to_original

    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((source / "config.json").read_text())
    vision, text = content["vision_config"], content["text_config"]
    kept = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "vocab_size")
    original = {
        "model_type": "multi_modality",
        "vision_config": {"params": {"image_size": vision["image_size"], "model_name": "tiny", "heads": vision["num_attention_heads"]}},
        "language_config": {
            "model_type": "llama",
            "num_key_value_heads": text["num_key_value_heads"],
            **{name: text[name] for name in kept},
        },
    }
    (folder / "config.json").write_text(json.dumps(original))
    tensors = to_original(load_file(source / "model.safetensors"))
    tensors["vision_model.vision_tower.attn_pool.latent"] = torch.zeros(1, 1, vision["hidden_size"])
    tensors["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    processor = json.loads((source / "processor_config.json").read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "VLChatProcessor"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def randomise(model, seed: int) -> None:
    """Redraw every parameter: norms near 1, small biases, other weights of deviation 1.5 / sqrt(fan-in).

    Small weights make attention uniform, and then a wrong rotary table or mask goes unseen.
    """
    import torch

    stream = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=stream)
            if weight.ndim == 1:
                weight.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.2 * noise)
            elif id(weight) in embeddings:
                weight.copy_(noise)
            else:
                weight.copy_(noise * 1.5 / weight[0].numel() ** 0.5)
