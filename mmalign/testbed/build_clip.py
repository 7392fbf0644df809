"""Trains `tiny-clip`: a CLIPModel of the shapes world, contrastively, on prompts and full descriptions of the same scenes.

It is what CLIP-type scorers, attribution and learned preferences run on when they are tested: small, but trained, so that a map of
which part of a picture earns its score has something to show.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F

from mmalign.testbed import corpus
from mmalign.testbed.build_janus import pixels_of
from mmalign.testbed.render import SIZE
from mmalign.testbed.training import fit
from mmalign.testbed.world import KINDS, plan_of, sample_prompts, text_of

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT = 77


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    width: int = 128
    layers: int = 4
    patch: int = 4
    steps: int = 500
    batch: int = 128
    described: float = 0.6  # share of texts that describe every object


def make_tokenizer():
    """A CLIPTokenizer whose byte-level BPE, with `</w>` word ends, is trained on the world's texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[START, END], initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(sorted(set(corpus.vocabulary_texts())), trainer)
    merges: Any = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # The trainer numbers the letters that end words in an order of its own, another one in every process; here it is the alphabet's.
    known, ends = bpe.get_vocab(), [f"{letter}</w>" for letter in sorted(alphabet)]
    tokens = [START, END, *sorted(alphabet), *(end for end in ends if end in known), *("".join(pair) for pair in merges)]
    # A word may end in any byte, also in one that ends no word of the world.
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*tokens, *ends]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def make_model(recipe: Recipe, tokenizer):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(recipe.seed)
    width = recipe.width
    shape: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4, "projection_dim": width}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=recipe.layers,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    vision = CLIPVisionConfig(num_hidden_layers=recipe.layers, image_size=SIZE, patch_size=recipe.patch, **shape)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=recipe.width))


def batch(recipe: Recipe, step: int, number: int) -> tuple[list[str], torch.Tensor]:
    """Texts and pictures [B, 3, 32, 32] in [-1, 1] of `number` scenes, each true of its picture."""
    rng = Random(f"clip/{recipe.seed}/{step}")
    scenes, texts = [], []
    for _, (_, clauses, scene) in zip(range(number), sample_prompts("train", KINDS, 50_000_000 + step), strict=False):
        scenes.append(scene)
        texts.append(plan_of(scene) if rng.random() < recipe.described else text_of(clauses))
    return texts, pixels_of(scenes)


def features(model, tokenizer, texts: list[str], x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-length image and text features [B, D]."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    image = model.visual_projection(model.vision_model(pixel_values=x_BCHW).pooler_output)
    text = model.text_projection(model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output)
    return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)


def train(model, tokenizer, recipe: Recipe, work: Path) -> None:
    def loss_of(step: int):
        texts, x_BCHW = batch(recipe, step, recipe.batch)
        with torch.autocast("cpu", torch.bfloat16):
            image_BD, text_BD = features(model, tokenizer, texts, x_BCHW)
        logits_BB = model.logit_scale.exp().clamp(max=100) * image_BD @ text_BD.T
        target = torch.arange(len(texts))
        hits = (logits_BB.argmax(1) == target).float().mean()
        return (F.cross_entropy(logits_BB, target) + F.cross_entropy(logits_BB.T, target)) / 2, {"top1": round(float(hits), 3)}

    fit("clip", work, model.parameters(), {"model": model}, loss_of, recipe.steps, 1e-3, warmup=100)


def save(model, tokenizer, out: Path) -> None:
    """Writes the official layout in half precision; the processor states the world's size and a plain -1..1 range."""
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(out)
    model.float()
    CLIPProcessor(images, tokenizer).save_pretrained(out)


def build(out: Path, work: Path, recipe: Recipe = Recipe()) -> None:
    tokenizer = make_tokenizer()
    model = make_model(recipe, tokenizer)
    train(model, tokenizer, recipe, work)
    save(model.eval(), tokenizer, out)
