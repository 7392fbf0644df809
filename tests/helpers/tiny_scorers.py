"""Tiny random checkpoints in the official layouts of the scorers, and samples to score. Only the way they are loaded is real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign.testbed.tiny import randomise
from mmalign.types import Prompt, Request, Sample

WORDS = ["a", "red", "blue", "cat", "dog", "on", "the", "mat", "that", "says", '"', "hello", "you", "idiot"]


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def image(seed: int, height: int = 48, width: int = 48) -> np.ndarray:
    """A smooth random picture: a few blurred colours, so that resizing has something to keep."""
    coarse = np.random.default_rng(seed).random((1, 3, 5, 6))
    fine = torch.nn.functional.interpolate(torch.tensor(coarse), (height, width), mode="bilinear", align_corners=False)
    return (fine[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def sample(number: int, text: str = 'a red cat that says "hello"', picture: Any = "own", **fields: Any) -> Sample:
    """Sample `number` with its own picture (or `picture`) of one of several sizes."""
    pixels = image(number, 40 + 8 * (number % 3), 48) if isinstance(picture, str) else picture
    return Sample(Request(Prompt(f"p{number}", text), 0, number), image=pixels, **fields)


def open_clip_state(width: int = 128, layers: int = 2, side: int = 32, patch: int = 8, vocabulary: int = 514, joint: int = 24) -> dict:
    """A random state dict with open_clip's names (ViT towers, heads 64 wide)."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * (0.4 if len(shape) == 1 else shape[-1] ** -0.5)

    state = {
        "logit_scale": torch.tensor(4.6),
        "positional_embedding": draw(77, width),
        "token_embedding.weight": draw(vocabulary, width),
        "text_projection": draw(width, joint),
        "ln_final.weight": draw(width),
        "ln_final.bias": draw(width),
        "visual.class_embedding": draw(width),
        "visual.positional_embedding": draw((side // patch) ** 2 + 1, width),
        "visual.proj": draw(width, joint),
        "visual.conv1.weight": draw(width, 3, patch, patch),
    }
    for name in ("visual.ln_pre", "visual.ln_post"):
        state |= {f"{name}.weight": draw(width), f"{name}.bias": draw(width)}
    shapes = {
        "ln_1": (width,),
        "ln_2": (width,),
        "attn.in_proj_": (3 * width, width),
        "attn.out_proj": (width, width),
        "mlp.c_fc": (4 * width, width),
        "mlp.c_proj": (width, 4 * width),
    }
    for tower in ("visual.transformer", "transformer"):
        for layer in range(layers):
            for name, shape in shapes.items():
                dot = "" if name.endswith("_") else "."
                prefix = f"{tower}.resblocks.{layer}.{name}{dot}"
                state |= {f"{prefix}weight": draw(*shape), f"{prefix}bias": draw(shape[0])}
    return state


def head_state(width: int, prefix: str = "layers.") -> dict[str, torch.Tensor]:
    """The five-layer head of the aesthetic predictor and of ImageReward."""
    sizes = [width, 20, 12, 10, 8, 1]
    generator = torch.Generator().manual_seed(2)
    state = {}
    for layer, (inputs, outputs) in zip((0, 2, 4, 6, 7), zip(sizes, sizes[1:], strict=False), strict=True):
        state[f"{prefix}{layer}.weight"] = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        state[f"{prefix}{layer}.bias"] = torch.randn(outputs, generator=generator)
    return state


def bert_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true, "model_max_length": 512}')
    return folder


def blip_parts(vocabulary: int = 80) -> tuple[Any, Any]:
    """BLIP's vision and text encoder with heads 64 wide, as ImageReward has them, but tiny."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=32, patch_size=8, layer_norm_eps=1e-6
    )
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        encoder_hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=96,
        max_position_embeddings=64,
        layer_norm_eps=1e-12,
    )
    models = BlipVisionModel(vision).eval(), BlipTextModel(text, add_pooling_layer=False).eval()
    for seed, model in enumerate(models):
        randomise(model, seed)
    return models


def imagereward_state() -> dict[str, torch.Tensor]:
    """ImageReward.pt's names for `blip_parts` and `head_state`."""
    vision, text = blip_parts()
    swaps = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "post_layernorm": "norm",
        "encoder.layers.": "blocks.",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
        "layer_norm": "norm",
    }
    state = {}
    for key, tensor in vision.state_dict().items():
        for new, old in swaps.items():
            key = key.replace(new, old)
        state[f"blip.visual_encoder.{key}"] = tensor
    state |= {f"blip.text_encoder.{key}": tensor for key, tensor in text.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    return state | {f"mlp.{key}": tensor for key, tensor in head_state(64).items()}


def toxic_bert(folder: Path) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    from mmalign.scorers.toxicity import LABELS

    vocabulary = len((bert_tokenizer(folder) / "vocab.txt").read_text().splitlines())
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=6,
        id2label=dict(enumerate(LABELS)),
        problem_type="multi_label_classification",
        initializer_range=0.5,
    )
    seeded(lambda: BertForSequenceClassification(config), 4).save_pretrained(folder)
    return folder


def nsfw_vit(folder: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
        initializer_range=0.5,
    )
    seeded(lambda: ViTForImageClassification(config), 5).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder
