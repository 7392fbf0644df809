"""Trains `tiny-showo`: a Show-o that draws scenes of the shapes world by filling in hidden codes, and describes them.

Two parts: the MAGVIT-v2 of the pictures (`magvit`), then the trunk on two tasks at once (`masked`): drawings, a share of which show one
thing wrong, and right answers about pictures. The trunk, phi-1_5's, is made anew at this size and trained from nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmalign.models._showo import Showo
from mmalign.models._showo_serve import PREFIX
from mmalign.models._showo_text import SPECIAL, ShowoText, token_layout
from mmalign.models.layers.magvit import Magvit
from mmalign.testbed import magvit, masked
from mmalign.testbed.masked import Recipe, Stage

VOCABULARY = 448
END = "<|endoftext|>"

RECIPE = Recipe(
    stages=(
        Stage(3000, 1.5e-3, 32, wrong=0.2, planned=0.3, thing_weight=4.0, by_cell=0.0, answers=12),
        Stage(4000, 1e-3, 32, wrong=0.1, planned=0.1, thing_weight=1.0, by_cell=0.5, answers=16),
    )
)


def language_config(recipe: Recipe, tokens: int) -> dict[str, Any]:
    """config.json of the language model beside the checkpoint. Rows are short, so the rotary base is small."""
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": tokens,
        "hidden_size": recipe.width,
        "intermediate_size": 4 * recipe.width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "max_position_embeddings": 1024,
        "partial_rotary_factor": 0.5,
        "rope_theta": 1000.0,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def make_config(tokens: int) -> dict[str, Any]:
    """config.json of the checkpoint: text tokens, special ones, codes, the mask."""
    whole = tokens + len(SPECIAL) + magvit.CODES + 1
    return {
        "_class_name": "Showo",
        "vocab_size": whole,
        "llm_vocab_size": tokens,
        "llm_model_path": "microsoft/phi-1_5",
        "codebook_size": magvit.CODES,
        "num_vq_tokens": magvit.TOKENS,
        "w_clip_vit": False,
        "load_from_showo": True,
        "mask_token_id": whole - 1,
    }


def make_model(recipe: Recipe, folder: Path, vq: Magvit) -> tuple[Showo, dict[str, Any]]:
    """A fresh model and its config.json; the folder gets the language model's config and tokenizer."""
    from transformers import PhiConfig, PhiForCausalLM

    tokenizer = masked.train_tokenizer((END,), VOCABULARY, bos_token=END, eos_token=END, unk_token=END)
    language = folder / "phi-1_5"
    tokenizer.save_pretrained(language)
    sizes = language_config(recipe, len(tokenizer))
    (language / "config.json").write_text(json.dumps(sizes, indent=2) + "\n")
    config = make_config(len(tokenizer))
    layout = token_layout(config, folder)
    torch.manual_seed(recipe.seed)
    own = {name: value for name, value in sizes.items() if name not in ("architectures", "model_type", "vocab_size")}
    net = PhiForCausalLM(PhiConfig(**own, vocab_size=config["vocab_size"], qk_layernorm=True))
    return Showo(net, ShowoText(language, layout), layout, vq, magvit.TOKENS), config


def save(model: Showo, config: dict[str, Any], folder: Path) -> None:
    """Writes showlab/show-o's layout in half precision."""
    from safetensors.torch import save_file

    tensors = {PREFIX + name: value.half().contiguous() for name, value in model.net.state_dict().items()}
    save_file(tensors, folder / "pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def build(out: Path, work: Path, recipe: Recipe = RECIPE) -> None:
    """Trains both parts (each resumes where it was stopped) and writes the checkpoint."""
    masked.build("showo", recipe, make_model, save, out, work)
