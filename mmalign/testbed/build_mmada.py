"""Trains `tiny-mmada`: an MMaDA that draws scenes of the shapes world by filling in hidden codes. It was taught no answers.

Two parts: the MAGVIT-v2 of the pictures (`magvit`), then LLaDA's trunk on drawings (`masked`), a share of which show one thing wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmalign.models._llada import renamed
from mmalign.models._mmada import Mmada, MmadaText
from mmalign.models.layers.magvit import Magvit
from mmalign.testbed import magvit, masked
from mmalign.testbed.masked import Recipe, Stage

VOCABULARY = 464
SPECIAL = ("<|startoftext|>", "<|endoftext|>", *(f"<|reserved_token_{number}|>" for number in range(11)), "<|mdm_mask|>")
TURNS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

RECIPE = Recipe(
    stages=(
        Stage(3000, 1.5e-3, 32, wrong=0.2, planned=0.3, thing_weight=4.0, by_cell=0.0),
        Stage(4000, 1e-3, 32, wrong=0.1, planned=0.1, thing_weight=1.0, by_cell=0.5),
    )
)


def make_config(recipe: Recipe, tokenizer: Any) -> dict[str, Any]:
    """config.json under LLaDA's own field names. Rows are short, so the rotary base is small."""
    rows = len(tokenizer) + magvit.CODES
    return {
        "model_type": "mmada",
        "d_model": recipe.width,
        "n_heads": recipe.heads,
        "n_kv_heads": recipe.heads,
        "n_layers": recipe.layers,
        "mlp_hidden_size": 8 * recipe.width // 3,
        "rope_theta": 1000.0,
        "rms_norm_eps": 1e-5,
        "activation_type": "silu",
        "block_type": "llama",
        "include_bias": False,
        "weight_tying": False,
        "max_sequence_length": 1024,
        "vocab_size": rows,
        "embedding_size": rows,
        "mask_token_id": tokenizer.convert_tokens_to_ids("<|mdm_mask|>"),
        "num_vq_tokens": magvit.TOKENS,
        "codebook_size": magvit.CODES,
    }


def make_net(recipe: Recipe, config: dict[str, Any]) -> Any:
    """LLaDA's trunk as a fresh LlamaForCausalLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    settings = LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config["n_kv_heads"],
        rms_norm_eps=config["rms_norm_eps"],
        max_position_embeddings=config["max_sequence_length"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(settings)


def make_model(recipe: Recipe, folder: Path, vq: Magvit) -> tuple[Mmada, dict[str, Any]]:
    """A fresh model and its config.json; the folder gets the tokenizer."""
    roles = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[1]}
    tokenizer = masked.train_tokenizer((*SPECIAL, *TURNS), VOCABULARY, **roles)
    tokenizer.save_pretrained(folder)
    config = make_config(recipe, tokenizer)
    text = MmadaText(folder, config)
    return Mmada(make_net(recipe, config), text, text.layout, vq, magvit.TOKENS), config


def save(model: Mmada, config: dict[str, Any], folder: Path) -> None:
    """Writes Gen-Verse/MMaDA's layout in half precision."""
    from safetensors.torch import save_file

    tensors = {name: value.half().contiguous() for name, value in renamed(model.net.state_dict(), to_llama=False).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def build(out: Path, work: Path, recipe: Recipe = RECIPE) -> None:
    """Trains both parts (each resumes where it was stopped) and writes the checkpoint."""
    masked.build("mmada", recipe, make_model, save, out, work)
