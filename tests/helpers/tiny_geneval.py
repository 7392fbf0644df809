"""A tiny random Mask2Former and CLIP in the Hugging Face layout, for tests that run the GenEval scorer without its weights."""

from __future__ import annotations

import json
from pathlib import Path


def make_detector(folder: Path, seed: int = 0) -> Path:
    """A random Mask2Former for COCO's 80 things whose classes are sharp enough that some pass GenEval's thresholds."""
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=7, out_features=["stage1", "stage2", "stage3", "stage4"]
        ),
        feature_size=32,
        mask_feature_size=16,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=12,
        num_labels=80,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Mask2FormerForUniversalSegmentation(config)
        with torch.no_grad():
            model.class_predictor.weight.normal_(0, 2.0)
            model.model.transformer_module.queries_features.weight.normal_(0, 1.0)
    model.save_pretrained(folder)
    return folder


def make_clip(folder: Path, seed: int = 0) -> Path:
    """A random CLIP of 32-pixel images with a byte-level tokenizer."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    vocabulary = _byte_vocabulary()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": vocabulary["<|startoftext|>"], "eos_token_id": vocabulary["<|endoftext|>"]}
    config = CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 77},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}))
    return folder


def _byte_vocabulary() -> dict[str, int]:
    characters = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    characters += [chr(256 + extra) for extra in range(256 - len(characters))]
    words = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}
