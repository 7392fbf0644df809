"""Trains `tiny-janus`: a JanusForConditionalGeneration that draws, describes and plans scenes of the shapes world.

Two stages, as for the large ones: first the VQ tokenizer of the pictures, then everything else (vision tower, aligners, language
model, image head) on three tasks at once: draw from a text (a tenth without text, for guidance), answer about a picture, plan a scene.
The drawing corpus shows one thing wrong in a share of its pictures; the understanding corpus is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmalign.testbed import corpus
from mmalign.testbed.render import SIZE, render
from mmalign.testbed.tokenizer import BOI, CHAT_TEMPLATE, train_tokenizer
from mmalign.testbed.training import fit
from mmalign.testbed.world import Scene

PATCH = 4
TOKENS = (SIZE // PATCH) ** 2
GUIDANCE = 1.5
UNSERVED = 0.1  # 1 - cosine to the nearest code
THING_WEIGHT = 4.0  # of a place with a thing in the drawing loss; an empty one weighs 1


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of the build; the shipped checkpoint is the default."""

    seed: int = 0
    codes: int = 256
    width: int = 192
    layers: int = 4
    vq_steps: int = 1500
    vq_batch: int = 32
    steps: int = 3000
    batch: int = 64
    wrong: float = 0.25
    planned: float = 0.5
    no_text: float = 0.1


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


def pixels_of(scenes: list[Scene], seed: int) -> torch.Tensor:
    """Pictures of scenes as the model sees them: [B, 3, 32, 32] in [-1, 1]."""
    return _to_model(render(scenes, seed))


def _to_model(pictures_BHWC: np.ndarray) -> torch.Tensor:
    return rearrange(torch.from_numpy(pictures_BHWC), "b h w c -> b c h w").float() / 127.5 - 1


def encode(vq, x_BCHW: torch.Tensor) -> torch.Tensor:
    """Continuous, unit-length code vectors [B, h*w, d]."""
    return F.normalize(rearrange(vq.quant_conv(vq.encoder(x_BCHW)), "b d h w -> b (h w) d"), dim=-1)


def nearest(vq, z_BND: torch.Tensor) -> torch.Tensor:
    """Codes [B, N] by cosine, as the original implementation chooses them."""
    return (z_BND @ F.normalize(vq.quantize.embedding.weight, dim=-1).T).argmax(-1)


def reconstruct(vq, vectors_BND: torch.Tensor) -> torch.Tensor:
    side = SIZE // PATCH
    return vq.decoder(vq.post_quant_conv(rearrange(vectors_BND, "b (h w) d -> b d h w", h=side, w=side)))


def local_vectors(vq, scenes: list[Scene], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code vectors that each depend on what stands in their own place alone, those of the whole pictures, and the pictures.

    Attention and group norms let a code carry anything about the whole picture, and a tokenizer that is free to do so spreads a thing's
    colour over the background: codes that look the same differ, and a language model cannot predict them. So a place that one
    thing touches takes its vector from a picture of that thing alone, an empty place from the empty board; only where two things meet
    in one patch does the whole picture decide.
    """
    owners = [number for number, scene in enumerate(scenes) for _ in scene]
    alone = [(thing,) for scene in scenes for thing in scene]
    x_BCHW = pixels_of(scenes, seed)
    solo_TCHW = _to_model(render(alone, seed, owners))
    blank_1CHW = pixels_of([()], seed)
    whole_BND, solo_TND, blank_1ND = encode(vq, torch.cat([x_BCHW, solo_TCHW, blank_1CHW])).float().split([len(scenes), len(alone), 1])
    touched_TN = rearrange((solo_TCHW != blank_1CHW).any(1), "t (h i) (w j) -> t (h w) (i j)", i=PATCH, j=PATCH).any(-1)
    owner_T = torch.tensor(owners)
    count_BN = torch.zeros(whole_BND.shape[:2]).index_add(0, owner_T, touched_TN.float())
    sum_BND = torch.zeros_like(whole_BND).index_add(0, owner_T, solo_TND * touched_TN[..., None])
    local_BND = torch.where((count_BN == 0)[..., None], blank_1ND, torch.where((count_BN == 1)[..., None], sum_BND, whole_BND))
    return local_BND, whole_BND, x_BCHW


def train_vq(model, recipe: Recipe, work: Path) -> None:
    """Vector-quantised autoencoder with unit-length codes and straight-through gradients, on local vectors; the vectors of whole pictures
    learn to choose the same codes. Unused codes move to places that no code serves."""
    vq = model.model.vqmodel
    usage = torch.zeros(recipe.codes)

    def loss_of(step: int):
        scenes = [drawing.scene for drawing in corpus.drawings(10_000_000 + step, recipe.vq_batch, recipe.wrong, 0.0)]
        with torch.autocast("cpu", torch.bfloat16):
            z_BND, whole_BND, x_BCHW = local_vectors(vq, scenes, step)
            codes_BN = nearest(vq, z_BND)
            q_BND = F.normalize(vq.quantize.embedding(codes_BN), dim=-1)
            decoded = reconstruct(vq, z_BND + (q_BND - z_BND).detach()).float()
        usage.mul_(0.98).scatter_add_(0, codes_BN.flatten(), torch.ones(codes_BN.numel()))
        if step % 20 == 19 and step < recipe.vq_steps // 2:
            _revive(vq, usage, z_BND.detach(), step)
        error = (decoded - x_BCHW).abs()
        fit_loss = error.mean() + (error**2).mean() * 4
        code_loss = (q_BND - z_BND.detach()).pow(2).sum(-1).mean() + 0.25 * (q_BND.detach() - z_BND).pow(2).sum(-1).mean()
        same_loss = (whole_BND - q_BND.detach()).pow(2).sum(-1).mean()
        agree = float((codes_BN == nearest(vq, whole_BND.detach())).float().mean())
        figures = {"error": round(float(error.mean().detach()), 5), "agree": round(agree, 3), "codes_used": int((usage > 0.5).sum())}
        return fit_loss + 0.5 * code_loss + 0.5 * same_loss, figures

    fit("vq", work, vq.parameters(), {"vq": vq}, loss_of, recipe.vq_steps, 2e-3)
    vq.requires_grad_(False)


@torch.no_grad()
def _revive(vq, usage: torch.Tensor, z_BND: torch.Tensor, step: int) -> None:
    dead = (usage < 0.1).nonzero().flatten()
    flat = rearrange(z_BND, "b n d -> (b n) d")
    # Only vectors that no code serves: a second code for what has one already would make the choice between them noise.
    distance = 1 - (flat @ F.normalize(vq.quantize.embedding.weight, dim=-1).T).max(-1).values
    unserved = (distance > UNSERVED).nonzero().flatten()
    chosen = unserved[torch.randperm(len(unserved), generator=torch.Generator().manual_seed(step))[: max(1, len(dead) // 4)]]
    vq.quantize.embedding.weight[dead[: len(chosen)]] = flat[chosen][: len(dead)]
    usage[dead[: len(chosen)]] = 1.0


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


def drawing_loss(model, tokenizer, recipe: Recipe, step: int) -> torch.Tensor:
    """Cross-entropy of the picture's codes after the chat-formatted text; a tenth of the texts is blanked as guidance will blank them."""
    examples = corpus.drawings(20_000_000 + recipe.seed + step, recipe.batch, recipe.wrong, recipe.planned)
    rows = [tokenizer(chat(tokenizer, example.text, False) + BOI).input_ids for example in examples]
    kept = (tokenizer.bos_token_id, tokenizer.boi_token_id)
    blank = np.random.default_rng([recipe.seed, step]).random(len(rows)) < recipe.no_text
    rows = [[t if t in kept else tokenizer.pad_token_id for t in row] if empty else row for row, empty in zip(rows, blank, strict=True)]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):  # in half precision the nearest code is another one now and then
        codes = nearest(model.model.vqmodel, local_vectors(model.model.vqmodel, [e.scene for e in examples], step)[0])
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
    weight = 1 + (THING_WEIGHT - 1) * (codes != _empty_board(model.model.vqmodel)).flatten().float()
    return (losses * weight).sum() / weight.sum()


@torch.no_grad()
def _empty_board(vq) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return nearest(vq, encode(vq, pixels_of([()], 0)))


def answering_loss(model, tokenizer, recipe: Recipe, step: int, number: int) -> torch.Tensor:
    """Cross-entropy of right answers about pictures; half of the pictures pass through the VQ model, as the model's own will have."""
    examples = corpus.questions(30_000_000 + recipe.seed + step, number)
    x_BCHW = pixels_of([example.scene for example in examples], step)
    with torch.no_grad():
        vq = model.model.vqmodel
        half = number // 2
        x_BCHW[:half] = reconstruct(vq, F.normalize(vq.quantize.embedding(nearest(vq, encode(vq, x_BCHW[:half]))), dim=-1)).clamp(-1, 1)
    texts = [chat(tokenizer, example.question, True) for example in examples]
    ids, targets = _with_answers(tokenizer, texts, [example.answer for example in examples])
    features = model.model.get_image_features(x_BCHW).pooler_output
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == tokenizer.image_token_id)[..., None], features.to(embeds.dtype))
    return _answer_loss(model, embeds, targets)


def planning_loss(model, tokenizer, recipe: Recipe, step: int, number: int) -> torch.Tensor:
    examples = corpus.plans(40_000_000 + recipe.seed + step, number, recipe.wrong)
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

    def loss_of(step: int):
        with torch.autocast("cpu", torch.bfloat16):
            draw = drawing_loss(model, tokenizer, recipe, step)
            answer = answering_loss(model, tokenizer, recipe, step, recipe.batch // 8)
            plan = planning_loss(model, tokenizer, recipe, step, recipe.batch // 16)
        figures = {"draw": draw, "answer": answer, "plan": plan}
        return draw + answer + 0.5 * plan, {name: round(float(value.detach()), 4) for name, value in figures.items()}

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fit("janus", work, parameters, {"model": model}, loss_of, recipe.steps, 1.5e-3, warmup=200)


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
    """Trains both stages (each resumes where it was stopped) and writes the checkpoint."""
    tokenizer = train_tokenizer(corpus.vocabulary_texts())
    model = make_model(recipe, tokenizer)
    train_vq(model, recipe, work)
    train_language(model, tokenizer, recipe, work)
    save(model.eval(), tokenizer, out)
