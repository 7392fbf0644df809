"""Trains `tiny-janus`: a JanusForConditionalGeneration that draws, describes and plans scenes of the shapes world.

Three parts: the VQ tokenizer of the pictures; then everything else (vision tower, aligners, language model, image head) on three tasks at
once: draw from a text (a tenth without text, for guidance), answer about a picture, plan a scene; last the vision tower and its aligner
alone, on answers, which changes what the model sees and nothing that it draws or plans.
The drawing corpus shows one thing wrong in a share of its pictures; the understanding corpus is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmalign.testbed import corpus
from mmalign.testbed.render import SIZE, render
from mmalign.testbed.tokenizer import BOI, CHAT_TEMPLATE, train_tokenizer
from mmalign.testbed.training import fit
from mmalign.testbed.world import COLORS, SHAPES, SIDE, SIZES, Scene, Thing

PATCH = 4
TOKENS = (SIZE // PATCH) ** 2
GUIDANCE = 1.25
TEMPERATURE = 0.05  # of the cosines by which the encoder names a code
THING_WEIGHT = 4.0  # of a place with a thing in the losses of pictures; an empty one weighs 1


@dataclass(frozen=True)
class Stage:
    """A stretch of the language model's training with its own warm-up and cosine. A step has `drawings`, `answers` and `plans`; `wrong`
    is the share of drawings and plans with one thing wrong, `planned` that of drawings whose text carries a plan; `arranged`: where the
    text leaves it open, the painter's habits decide where things stand, not a coin."""

    steps: int
    learning_rate: float
    drawings: int
    answers: int
    plans: int
    wrong: float
    planned: float
    arranged: bool


@dataclass(frozen=True)
class Reading:
    """A stretch of training what the model sees: a step has `answers`, and `pairs` of a true and a false caption to tell apart."""

    steps: int
    learning_rate: float
    answers: int
    pairs: int


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of the build; the shipped checkpoint is the default."""

    seed: int = 0
    codes: int = 257
    width: int = 192
    layers: int = 4
    vq_steps: int = 600
    vq_batch: int = 48
    # Which words speak of which place is learned from plans first; then drawing from prompts alone and reading get more of each step.
    stages: tuple[Stage, ...] = (
        Stage(4000, 1.5e-3, 64, 16, 4, wrong=0.25, planned=0.5, arranged=False),
        Stage(3600, 8e-4, 48, 24, 6, wrong=0.2, planned=0.3, arranged=True),
        Stage(1700, 6e-4, 48, 24, 8, wrong=0.15, planned=0.2, arranged=True),
    )
    no_text: float = 0.1
    reading: tuple[Reading, ...] = (Reading(3000, 1.5e-3, 64, 0), Reading(800, 8e-4, 48, 24))


def make_model(recipe: Recipe, tokenizer):
    """A fresh JanusForConditionalGeneration whose sizes agree with each other (specs of the family: patch, codes, tokens)."""
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    torch.manual_seed(recipe.seed)
    config = JanusConfig(
        vision_config=JanusVisionConfig(
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            mlp_ratio=2.0,
            image_size=SIZE,
            patch_size=PATCH,
            projection_dim=recipe.width,
            num_image_tokens=TOKENS,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=recipe.codes,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
            projection_dim=recipe.width,
            image_token_embed_dim=recipe.width,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=8 * recipe.width // 3,
            num_hidden_layers=recipe.layers,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    return JanusForConditionalGeneration(config)


def pixels_of(scenes: list[Scene]) -> torch.Tensor:
    """Pictures of scenes as the model sees them: [B, 3, 32, 32] in [-1, 1]."""
    return rearrange(torch.from_numpy(render(scenes)), "b h w c -> b c h w").float() / 127.5 - 1


def encode(vq, x_BCHW: torch.Tensor) -> torch.Tensor:
    """Continuous, unit-length code vectors [B, h*w, d]."""
    return F.normalize(rearrange(vq.quant_conv(vq.encoder(x_BCHW)), "b d h w -> b (h w) d"), dim=-1)


def nearest(vq, z_BND: torch.Tensor) -> torch.Tensor:
    """Codes [B, N] by cosine, as the original implementation chooses them."""
    return (z_BND @ F.normalize(vq.quantize.embedding.weight, dim=-1).T).argmax(-1)


def reconstruct(vq, vectors_BND: torch.Tensor) -> torch.Tensor:
    side = SIZE // PATCH
    return vq.decoder(vq.post_quant_conv(rearrange(vectors_BND, "b (h w) d -> b d h w", h=side, w=side)))


@cache
def _code_of_patch() -> dict[bytes, int]:
    """The number of every patch that the world can show, by its pixels; the empty one's is 0."""
    pictures = render([(), *((Thing(1, 1, *kind),) for kind in product(SHAPES, COLORS, SIZES))])
    return {patch: number for number, patch in enumerate(dict.fromkeys(_patches(pictures)))}


def _patches(pictures_BHWC: np.ndarray) -> list[bytes]:
    patches = rearrange(pictures_BHWC, "b (h i) (w j) c -> (b h w) (i j c)", i=PATCH, j=PATCH)
    return [patch.tobytes() for patch in patches]


def codes_of(scenes: list[Scene]) -> torch.Tensor:
    """Codes [B, 64] of the pictures of scenes: a patch holds a quarter of one thing or nothing, so its pixels name its code."""
    known = _code_of_patch()
    return torch.tensor([known[patch] for patch in _patches(render(scenes))]).view(len(scenes), TOKENS)


def boards(seed: int, number: int) -> list[Scene]:
    """Random scenes with every cell filled or not, so that a picture shows many patches."""
    rng = Random(f"boards/{seed}")
    cells = list(product(range(SIDE), range(SIDE)))
    return [
        tuple(Thing(*cell, rng.choice(SHAPES), rng.choice(COLORS), rng.choice(SIZES)) for cell in cells if rng.random() < 0.7)
        for _ in range(number)
    ]


def train_vq(model, recipe: Recipe, work: Path) -> None:
    """Vector-quantised autoencoder with unit-length codes, one for every patch of the world.

    Attention and group norms let a code carry anything about the whole picture, and a tokenizer that is free to do so spreads a thing's
    colour over the background: codes that look the same differ, and a language model cannot predict them. Here the patches are
    known, so each has its code from the beginning: the encoder learns to name it, the decoder to draw it.
    """
    vq = model.model.vqmodel

    def loss_of(step: int):
        scenes = boards(10_000_000 + recipe.seed + step, recipe.vq_batch)
        codes_BN, x_BCHW = codes_of(scenes), pixels_of(scenes)
        book = F.normalize(vq.quantize.embedding.weight, dim=-1)
        with torch.autocast("cpu", torch.bfloat16):
            z_BND = encode(vq, x_BCHW)
            decoded = reconstruct(vq, book[codes_BN]).float()
        cosine_BNK = z_BND.float() @ book.T
        naming = F.cross_entropy(cosine_BNK.flatten(0, 1) / TEMPERATURE, codes_BN.flatten())
        error = (decoded - x_BCHW).abs()
        figures = {"error": float(error.mean().detach()), "named": float((cosine_BNK.argmax(-1) == codes_BN).float().mean())}
        return error.mean() + 4 * (error**2).mean() + 0.1 * naming, {name: round(value, 5) for name, value in figures.items()}

    fit("vq", work, vq.parameters(), {"vq": vq}, loss_of, recipe.vq_steps, 2e-3)
    vq.requires_grad_(False)


def chat(tokenizer, text: str, image: bool) -> str:
    parts = [{"type": "image"}] if image else []
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, tokenize=False)


def _pad(rows: list[list[int]], fill: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def hidden_states(model, embeds: torch.Tensor) -> torch.Tensor:
    """Rows are padded at their right end, where causal attention never looks, so they need no mask. On a CPU the plain attention
    kernel trains twice as fast in bfloat16 as the fused one."""
    with sdpa_kernel(SDPBackend.MATH):
        return model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state


def drawing_loss(model, tokenizer, recipe: Recipe, stage: Stage, step: int) -> torch.Tensor:
    """Cross-entropy of the picture's codes after the chat-formatted text; a tenth of the texts is blanked as guidance will blank them."""
    examples = corpus.drawings(20_000_000 + recipe.seed + step, stage.drawings, stage.wrong, stage.planned, stage.arranged)
    rows = [tokenizer(chat(tokenizer, example.text, False) + BOI).input_ids for example in examples]
    kept = (tokenizer.bos_token_id, tokenizer.boi_token_id)
    blank = np.random.default_rng([recipe.seed, step]).random(len(rows)) < recipe.no_text
    rows = [[t if t in kept else tokenizer.pad_token_id for t in row] if empty else row for row, empty in zip(rows, blank, strict=True)]
    codes = codes_of([example.scene for example in examples])
    ids = _pad([row + [tokenizer.image_token_id] * (TOKENS - 1) for row in rows], tokenizer.pad_token_id)
    places = ids == tokenizer.image_token_id
    drawn = model.prepare_embeddings_for_image_generation(codes[:, :-1])
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter(places[..., None], drawn.to(embeds.dtype))
    predicts = places.clone()
    predicts[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])] = True  # the last text token predicts the first code
    logits = model.model.generation_head(hidden_states(model, embeds)[predicts])
    losses = F.cross_entropy(logits.float(), codes.flatten(), reduction="none")
    # Most places are empty and soon predicted; what a text decides are the few places where a thing stands.
    weight = 1 + (THING_WEIGHT - 1) * (codes != 0).flatten().float()
    return (losses * weight).sum() / weight.sum()


def answering_loss(model, tokenizer, recipe: Recipe, answers: int, step: int) -> torch.Tensor:
    """Cross-entropy of right answers about pictures; half of the pictures pass through the VQ model, as the model's own will have."""
    examples = corpus.questions(30_000_000 + recipe.seed + step, answers)
    x_BCHW = pixels_of([example.scene for example in examples])
    with torch.no_grad():
        vq = model.model.vqmodel
        half = answers // 2
        x_BCHW[:half] = reconstruct(vq, F.normalize(vq.quantize.embedding(nearest(vq, encode(vq, x_BCHW[:half]))), dim=-1)).clamp(-1, 1)
    texts = [chat(tokenizer, example.question, True) for example in examples]
    ids, targets = _with_answers(tokenizer, texts, [example.answer for example in examples])
    return _answer_loss(model, _seen(model, tokenizer, ids, x_BCHW), targets)


def telling_loss(model, tokenizer, recipe: Recipe, pairs: int, step: int) -> torch.Tensor:
    """-log sigmoid(log P(true caption) - log P(false one)) of right pictures."""
    examples = corpus.pairs(50_000_000 + recipe.seed + step, pairs)
    asked = [chat(tokenizer, corpus.DESCRIBE, True)] * (2 * pairs)
    ids, targets = _with_answers(tokenizer, asked, [pair.true for pair in examples] + [pair.false for pair in examples])
    hidden = hidden_states(model, _seen(model, tokenizer, ids, pixels_of([pair.scene for pair in examples] * 2)))[:, :-1]
    wanted = targets[:, 1:]
    losses = torch.zeros(wanted.shape)
    losses[wanted != -100] = F.cross_entropy(model.lm_head(hidden[wanted != -100]).float(), wanted[wanted != -100], reduction="none")
    true, false = losses.sum(1).split(pairs)
    return -F.logsigmoid(false - true).mean()


def _seen(model, tokenizer, ids: torch.Tensor, x_BCHW: torch.Tensor) -> torch.Tensor:
    """Input embeddings of texts with their pictures in place."""
    features = model.model.get_image_features(x_BCHW).pooler_output
    embeds = model.get_input_embeddings()(ids)
    return embeds.masked_scatter((ids == tokenizer.image_token_id)[..., None], features.to(embeds.dtype))


def planning_loss(model, tokenizer, recipe: Recipe, stage: Stage, step: int) -> torch.Tensor:
    examples = corpus.plans(40_000_000 + recipe.seed + step, stage.plans, stage.wrong, stage.arranged)
    texts = [chat(tokenizer, example.question, False) for example in examples]
    ids, targets = _with_answers(tokenizer, texts, [example.answer for example in examples])
    return _answer_loss(model, model.get_input_embeddings()(ids), targets)


def _with_answers(tokenizer, texts: list[str], answers: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of questions with their answers, and the targets (-100 where nothing is asked of the model)."""
    rows, targets = [], []
    for text, answer in zip(texts, answers, strict=True):
        question = tokenizer(text).input_ids
        image = tokenizer.image_token_id
        picture = [tokenizer.boi_token_id, *[image] * TOKENS, tokenizer.eoi_token_id]  # as the processor writes it
        question = [token for t in question for token in (picture if t == image else [t])]
        reply = tokenizer(" " + answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        rows.append(question + reply)
        targets.append([-100] * len(question) + reply)
    return _pad(rows, tokenizer.pad_token_id), _pad(targets, -100)


def _answer_loss(model, embeds: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    hidden = hidden_states(model, embeds)[:, :-1]
    wanted = targets[:, 1:]
    logits = model.lm_head(hidden[wanted != -100])
    return F.cross_entropy(logits.float(), wanted[wanted != -100])


def train_language(model, tokenizer, recipe: Recipe, work: Path) -> None:
    model.model.vqmodel.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = 0
    for number, stage in enumerate(recipe.stages, 1):

        def loss_of(step: int, stage: Stage = stage, before: int = before):
            with torch.autocast("cpu", torch.bfloat16):
                draw = drawing_loss(model, tokenizer, recipe, stage, before + step)
                answer = answering_loss(model, tokenizer, recipe, stage.answers, before + step)
                plan = planning_loss(model, tokenizer, recipe, stage, before + step)
            figures = {"draw": draw, "answer": answer, "plan": plan}
            return draw + answer + 0.5 * plan, {name: round(float(value.detach()), 4) for name, value in figures.items()}

        fit(f"janus-{number}", work, parameters, {"model": model}, loss_of, stage.steps, stage.learning_rate, warmup=200)
        before += stage.steps


def train_reading(model, tokenizer, recipe: Recipe, work: Path) -> None:
    """The language model stays as it is, so drawings and plans stay bit for bit; what it is shown becomes easier to read."""
    model.requires_grad_(False)
    reading = torch.nn.ModuleDict({"vision": model.model.vision_model, "aligner": model.model.aligner}).requires_grad_(True)
    before = sum(stage.steps for stage in recipe.stages)
    for number, stage in enumerate(recipe.reading, 1):

        def loss_of(step: int, stage: Reading = stage, before: int = before):
            with torch.autocast("cpu", torch.bfloat16):
                answer = answering_loss(model, tokenizer, recipe, stage.answers, before + step)
                telling = telling_loss(model, tokenizer, recipe, stage.pairs, before + step) if stage.pairs else torch.zeros(())
            return answer + telling, {"answer": round(float(answer.detach()), 4), "telling": round(float(telling.detach()), 4)}

        name = f"reading-{number}"
        fit(name, work, reading.parameters(), {"reading": reading}, loss_of, stage.steps, stage.learning_rate, warmup=200)
        before += stage.steps


def save(model, tokenizer, out: Path) -> None:
    """Writes the official Hugging Face layout in half precision."""
    from transformers import JanusImageProcessorPil, JanusProcessor

    generation = model.generation_config
    generation._from_model_config = False  # otherwise reloading drops generation_kwargs
    generation.guidance_scale, generation.do_sample = GUIDANCE, True
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    generation.generation_kwargs = {"boi_token_id": tokenizer.boi_token_id}
    images = JanusImageProcessorPil(size={"height": SIZE, "width": SIZE}, min_size=PATCH, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(out)
    model.float()
    JanusProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE, num_image_tokens=TOKENS).save_pretrained(out)


def build(out: Path, work: Path, recipe: Recipe = Recipe()) -> None:
    """Trains all parts (each resumes where it was stopped) and writes the checkpoint."""
    tokenizer = train_tokenizer(corpus.vocabulary_texts())
    model = make_model(recipe, tokenizer)
    train_vq(model, recipe, work)
    train_language(model, tokenizer, recipe, work)
    train_reading(model, tokenizer, recipe, work)
    save(model.eval(), tokenizer, out)
