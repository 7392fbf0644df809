"""BLIP-VQA: the product over a prompt's noun phrases of P(yes) that BLIP gives to "{phrase}?" (0 to 1).

Paper: Huang et al., T2I-CompBench, arXiv 2307.06350; Karine-Huang/T2I-CompBench BLIPvqa_eval at 1b70949. An image is squashed to 480 x 480
by bicubic; a question is lower-cased, loses some punctuation and all beyond 50 words and 35 tokens; P(yes) is taken against P(no) at the
decoder's first step and rounded to four decimals, as is the product; at most eight phrases count. `model` is best the original
model_base_vqa_capfilt_large.pth: the Hugging Face copy has its position embeddings at 384, which `resolution` 480 interpolates back. Three
traps of transformers are avoided: its encoder is given [CLS] where BLIP has [ENC]; its forward() gives no answer logits; its generate()
lets the decoder attend to padding. Changed: phrases come from the prompt's metadata, else from a rule (`parser`), not from spaCy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.images import CLIP_MEAN, CLIP_STD
from mmalign.scorers import _phrases, _weights
from mmalign.scorers._clip import Dtype
from mmalign.scorers._preprocess import Squash
from mmalign.scorers._rows import Row, answer, token_ids
from mmalign.scorers._samples import Item, score_in_batches
from mmalign.scorers._whole import load_whole
from mmalign.types import Sample, Score, Value, digest

if TYPE_CHECKING:
    import torch

NEEDS = ("weights: Salesforce/blip-vqa-base",)
VERSION = 1
MAX_PHRASES, MAX_WORDS, MAX_TOKENS = 8, 50, 35
PHRASE_KEYS = ("noun_phrases", "attr_nouns", "nouns")

VISION, VISION_LAYER, VISION_BLOCK = "vision_model", "vision_model.encoder.layers.*", "visual_encoder.blocks.*"
ORIGINAL = {  # BLIP's name -> transformers' (patterns of _weights.rename)
    "visual_encoder.cls_token": f"{VISION}.embeddings.class_embedding",
    "visual_encoder.pos_embed": f"{VISION}.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj.@": f"{VISION}.embeddings.patch_embedding.@",
    "visual_encoder.norm.@": f"{VISION}.post_layernorm.@",
    f"{VISION_BLOCK}.norm1.@": f"{VISION_LAYER}.layer_norm1.@",
    f"{VISION_BLOCK}.norm2.@": f"{VISION_LAYER}.layer_norm2.@",
    f"{VISION_BLOCK}.attn.qkv.@": f"{VISION_LAYER}.self_attn.qkv.@",
    f"{VISION_BLOCK}.attn.proj.@": f"{VISION_LAYER}.self_attn.projection.@",
    f"{VISION_BLOCK}.mlp.@": f"{VISION_LAYER}.mlp.@",
    "text_encoder.@": "text_encoder.@",
    "text_decoder.@": "text_decoder.@",
}


@dataclass(frozen=True)
class Config:
    """`model`: hub id, folder or the original .pth; `processor`: of the tokenizer; `resolution`: None is the weights' own side.

    `parser`: where phrases come from when a prompt's metadata has none; `is_rounded`: four decimals, as the official code writes.
    """

    model: str = "Salesforce/blip-vqa-base"
    processor: str = "Salesforce/blip-vqa-base"
    resolution: int | None = 480
    parser: _phrases.Parser = "rule"
    is_rounded: bool = True
    batch_size: int = 16
    dtype: Dtype = "float32"


def load(config: Config = Config(), device: str = "cpu") -> BlipVqa:
    from transformers import BlipForQuestionAnswering

    path = Path(config.model).expanduser()
    if path.is_file():
        model = _load_original(path, device, config.dtype)
    else:
        model = load_whole(BlipForQuestionAnswering, config.model, device, config.dtype, "blip_vqa.model").requires_grad_(False)
    return BlipVqa(config, model, _weights.tokenizer(config.processor, "blip_vqa.processor"))


class BlipVqa:
    """The loaded scorer. A value's parts are P(yes) by phrase; a prompt without phrases has an empty product, 1."""

    name = "blip_vqa"
    range = (0.0, 1.0)

    def __init__(self, config: Config, model: Any, words: Any) -> None:
        self.config, self.model, self.words = config, model, words
        text = model.config.text_config
        self.start, self.encode = text.vocab_size - 2, text.vocab_size - 1  # [DEC] and [ENC], the two tokens that BLIP adds to BERT's
        self.yes, self.no = words.convert_tokens_to_ids("yes"), words.convert_tokens_to_ids("no")
        self.side = config.resolution or model.config.vision_config.image_size
        self.preprocess = Squash((self.side, self.side), "pil-bicubic", CLIP_MEAN, CLIP_STD)
        settings = {key: value for key, value in asdict(config).items() if key in ("resolution", "parser", "is_rounded", "dtype")}
        chunks = _phrases.spacy_version() if config.parser == "spacy" else "rule"
        weights = _weights.fingerprint_tensors(model), _weights.fingerprint_tokenizer(words)
        self.fingerprint = digest("blip_vqa", VERSION, settings, chunks, weights)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, self.config.batch_size, self._measure)

    def _measure(self, items: Sequence[Item]) -> list[Score]:
        import torch

        asked = [self._phrases(item) for item in items]
        pairs = [(at, question_of(phrase)) for at, phrases in enumerate(asked) for phrase in phrases]
        questions = token_ids(self.words, [question for _, question in pairs], truncation=True, max_length=MAX_TOKENS)
        rows = [Row(at, (self.encode, *ids[1:])) for (at, _), ids in zip(pairs, questions, strict=True)]
        with torch.no_grad():
            pixels_BCHW = self.preprocess.images([item.pixels for item in items])
            weight = self.model.vision_model.embeddings.patch_embedding.weight
            interpolate = self.side != self.model.config.vision_config.image_size
            visual = self.model.vision_model(pixels_BCHW.to(weight.device, weight.dtype), interpolate_pos_encoding=interpolate)
            numbers = iter(answer(rows, self.config.batch_size, lambda group: self._yes(visual.last_hidden_state, group)))
        return [self._value(phrases, [next(numbers) for _ in phrases]) for phrases in asked]

    def _phrases(self, item: Item) -> list[str]:
        found = _phrases.phrases(item.sample.request.prompt, self.config.parser, PHRASE_KEYS)
        return [phrase for phrase in found if question_of(phrase) != "?"][:MAX_PHRASES]

    def _yes(self, image_BND: torch.Tensor, rows: Sequence[Row]) -> list[float]:
        """P(yes) against P(no) of questions of one length."""
        import torch

        device = image_BND.device
        ids = torch.tensor([row.ids for row in rows], device=device)
        images = image_BND[[row.image for row in rows]]
        question = self.model.text_encoder(ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=images).last_hidden_state
        start = torch.full((len(rows), 1), self.start, device=device)
        logits = self.model.text_decoder(start, encoder_hidden_states=question, encoder_attention_mask=torch.ones_like(ids)).logits[:, 0]
        return logits.float()[:, [self.yes, self.no]].softmax(-1)[:, 0].tolist()

    def _value(self, phrases: Sequence[str], yes: Sequence[float]) -> Value:
        yes = [round(number, 4) for number in yes] if self.config.is_rounded else yes
        product = math.prod(yes)
        note = "" if phrases else "the prompt names no thing: an empty product"
        return Value(round(product, 4) if self.config.is_rounded else product, dict(zip(phrases, yes, strict=True)), detail=note)


def question_of(phrase: str) -> str:
    """The question BLIP is asked of a phrase: lower case, without . ! " ( ) * # : ; ~, at most 50 words."""
    words = re.sub(r"[.!\"()*#:;~]", "", f"{phrase}?".lower()).rstrip(" ").split(" ")
    return " ".join(words[:MAX_WORDS])


def _load_original(path: Path, device: str, dtype: Dtype) -> Any:
    """The authors' checkpoint; its sizes are read from its tensors, a head is 64 wide as in both BLIP sizes."""
    import torch
    from transformers import BlipConfig, BlipForQuestionAnswering

    state = _weights.read_tensors(path)
    renamed = _weights.rename({key: tensor.float() for key, tensor in state.items()}, ORIGINAL, str(path))
    model: Any = BlipForQuestionAnswering(BlipConfig(**_sizes(renamed)))
    _weights.fill(model, renamed, str(path))
    return model.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)


def _sizes(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    def layers(prefix: str, last: str) -> int:
        return len([key for key in state if key.startswith(prefix) and key.endswith(last)])

    width, _, patch, _ = state[f"{VISION}.embeddings.patch_embedding.weight"].shape
    grid = math.isqrt(state[f"{VISION}.embeddings.position_embedding"].shape[1] - 1)
    vocabulary, text_width = state["text_encoder.embeddings.word_embeddings.weight"].shape
    vision = {
        "hidden_size": width,
        "intermediate_size": state[f"{VISION}.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": layers(f"{VISION}.encoder.layers.", "layer_norm1.weight"),
        "num_attention_heads": max(1, width // 64),
        "image_size": grid * patch,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }
    text = {
        "hidden_size": text_width,
        "encoder_hidden_size": width,
        "intermediate_size": state["text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": layers("text_encoder.encoder.layer.", ".intermediate.dense.weight"),
        "num_attention_heads": max(1, text_width // 64),
        "vocab_size": vocabulary,
        "max_position_embeddings": state["text_encoder.embeddings.position_embeddings.weight"].shape[0],
        "layer_norm_eps": 1e-12,
        "bos_token_id": vocabulary - 2,
    }
    return {"vision_config": vision, "text_config": text}
