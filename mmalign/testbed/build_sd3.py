"""Trains `tiny-sd3`: a StableDiffusion3Pipeline that draws scenes of the shapes world by flow matching.

Two stages, as for the large ones: first the image coder (an AutoencoderKL with 8 x 8 latents, its scale and shift measured), then the
denoiser together with its three text encoders, which stay as they are ever after. A T5 reads the whole prompt; the two CLIP encoders,
whose windows are short, give the pooled vector. The drawing corpus shows one thing wrong in a share of its pictures; a tenth of the texts
is empty, for guidance.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign.models._diffusion_layouts import StableDiffusion3
from mmalign.testbed import corpus
from mmalign.testbed.build_clip import make_tokenizer as make_clip_tokenizer
from mmalign.testbed.build_janus import boards, codes_of, pixels_of
from mmalign.testbed.render import SIZE
from mmalign.testbed.training import fit

LATENT = 8  # latents a side
THING_WEIGHT = 4.0  # of a latent with a thing in the flow loss; an empty one weighs 1
CLIP_TOKENS, T5_TOKENS = 16, 48
SETTINGS = {"num_inference_steps": 20, "guidance_scale": 2.0, "max_sequence_length": T5_TOKENS}


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of the build; the shipped checkpoint is the default."""

    seed: int = 0
    heads: int = 4
    head: int = 28
    layers: int = 4
    channels: int = 8
    vae_steps: int = 800
    vae_batch: int = 48
    steps: int = 6000
    batch: int = 64
    learning_rate: float = 1e-3
    wrong: float = 0.2
    no_text: float = 0.1


def make_t5_tokenizer() -> Any:
    """A Unigram tokenizer of the world's texts that ends each with `</s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import T5TokenizerFast

    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    unigram.train_from_iterator(sorted(set(corpus.vocabulary_texts())), trainer)
    return T5TokenizerFast(
        tokenizer_object=unigram, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", extra_ids=0, model_max_length=T5_TOKENS
    )


def make_pipeline(recipe: Recipe) -> Any:
    """A fresh pipeline whose sizes agree: the pooled width is the sum of the CLIP projections, the T5 at least as wide as both CLIPs."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(recipe.seed)
    clip_tokenizer, t5_tokenizer = make_clip_tokenizer(), make_t5_tokenizer()
    clip_tokenizer.model_max_length = CLIP_TOKENS
    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(clip_tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=CLIP_TOKENS,
                projection_dim=32,
                bos_token_id=clip_tokenizer.bos_token_id,
                eos_token_id=clip_tokenizer.eos_token_id,
                pad_token_id=clip_tokenizer.pad_token_id,
            )
        )
        for _ in range(2)
    ]
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=96,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=64,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    width = recipe.heads * recipe.head
    transformer = SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=1,
        in_channels=recipe.channels,
        out_channels=recipe.channels,
        num_layers=recipe.layers,
        attention_head_dim=recipe.head,
        num_attention_heads=recipe.heads,
        caption_projection_dim=width,
        joint_attention_dim=96,
        pooled_projection_dim=64,
        pos_embed_max_size=LATENT,
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=recipe.channels,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,  # a latent speaks of its own patch
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=clip_tokenizer,
        text_encoder_2=clips[1],
        tokenizer_2=clip_tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def train_vae(pipe: Any, recipe: Recipe, work: Path) -> None:
    """The image coder on crowded boards; then its latents' own mean and spread become shift and scale, so that they are near N(0, 1)."""
    vae = pipe.vae

    def loss_of(step: int):
        x_BCHW = pixels_of(boards(60_000_000 + recipe.seed + step, recipe.vae_batch))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x_BCHW).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = (decoded - x_BCHW).abs()
        figures = {"error": round(float(error.mean().detach()), 5)}
        return error.mean() + 4 * (error**2).mean() + 1e-5 * posterior.kl().mean(), figures

    fit("vae", work, vae.parameters(), {"vae": vae}, loss_of, recipe.vae_steps, 2e-3)
    vae.requires_grad_(False)
    with torch.no_grad():
        scenes = [drawing.scene for drawing in corpus.drawings(61_000_000 + recipe.seed, 512, 0.0, 0.0)]
        latents = vae.encode(pixels_of(scenes)).latent_dist.mean
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))


def flow_loss(layout: StableDiffusion3, recipe: Recipe, step: int) -> torch.Tensor:
    """Velocity error of drawings at times from the logistic normal; the few latents that show a thing weigh more than the empty ones."""
    examples = corpus.drawings(62_000_000 + recipe.seed + step, recipe.batch, recipe.wrong, 0.0, True)
    stream = np.random.default_rng([recipe.seed, step])
    blank = stream.random(len(examples)) < recipe.no_text
    embeds = layout.encode(["" if empty else example.text for example, empty in zip(examples, blank, strict=True)], T5_TOKENS)
    scenes = [example.scene for example in examples]
    with torch.no_grad():
        x0 = layout.encode_image(pixels_of(scenes) / 2 + 0.5)
    time = torch.from_numpy(stream.standard_normal(len(x0))).float().sigmoid()
    eps = torch.from_numpy(stream.standard_normal(x0.shape)).float()
    at = time[:, None, None, None]
    velocity = layout.predict((1 - at) * x0 + at * eps, time, embeds, 1.0).float()
    weight = 1 + (THING_WEIGHT - 1) * (codes_of(scenes) != 0).float().view(-1, 1, LATENT, LATENT)
    return (weight * (velocity - (eps - x0)) ** 2).sum() / (weight.sum() * x0.shape[1])


def train_flow(pipe: Any, recipe: Recipe, work: Path) -> None:
    layout = StableDiffusion3(pipe)
    names = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    modules = {name: getattr(pipe, name) for name in names}

    def loss_of(step: int):
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow_loss(layout, recipe, step)
        return loss, {}

    parameters = [parameter for module in modules.values() for parameter in module.parameters() if parameter.requires_grad]
    fit("flow", work, parameters, modules, loss_of, recipe.steps, recipe.learning_rate, warmup=200)


def save(pipe: Any, out: Path) -> None:
    """Writes the diffusers layout in half precision, and the settings that suit the size."""
    pipe.to(torch.float16).save_pretrained(out)
    pipe.to(torch.float32)
    (out / "generation_config.json").write_text(json.dumps(SETTINGS, indent=1) + "\n")


def build(out: Path, work: Path, recipe: Recipe = Recipe()) -> None:
    """Trains both stages (each resumes where it was stopped) and writes the checkpoint."""
    pipe = make_pipeline(recipe)
    train_vae(pipe, recipe, work)
    train_flow(pipe, recipe, work)
    save(pipe, out)
