"""Trains `tiny-sd3`: a StableDiffusion3Pipeline that draws scenes of the shapes world by flow matching.

Two stages, as for the large ones: first the image coder (an AutoencoderKL with 8 x 8 latents), then the denoiser together with its two
text encoders, which stay as they are ever after. The third encoder, a T5, is left out, as the pipeline allows. The drawing corpus shows
one thing wrong in a share of its pictures; a tenth of the texts is empty, for guidance.

Legend: B pictures, C latent channels, H W latent sides.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmalign.models._diffusion_layouts import StableDiffusion3
from mmalign.testbed import corpus
from mmalign.testbed.build_clip import make_tokenizer
from mmalign.testbed.build_janus import boards, pixels_of
from mmalign.testbed.render import CELL, MARGIN, SIZE
from mmalign.testbed.training import fit
from mmalign.testbed.world import COLORS, SHAPES, SIDE, SIZES, Scene

LATENT = 8  # latents a side; one covers a quarter of a thing
BITS = 8
SPREAD = 0.25  # of a latent as the coder gives it, beside bits of -1 and 1
CELL_WEIGHT = 4.0  # of a latent of the board in the flow loss; one of the margin weighs 1
TEXT_TOKENS = 24
SHIFT = 3.0  # of the schedule, in training and in sampling
SETTINGS = {"num_inference_steps": 10, "guidance_scale": 2.5, "max_sequence_length": 1}


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of the build; the shipped checkpoint is the default."""

    seed: int = 0
    heads: int = 4
    head: int = 24
    layers: int = 6
    text_width: int = 48
    vae_steps: int = 700
    vae_batch: int = 32
    steps: int = 2200
    batch: int = 64
    learning_rate: float = 1e-3
    wrong: float = 0.2
    no_text: float = 0.1


def make_pipeline(recipe: Recipe) -> Any:
    """A fresh pipeline whose sizes agree: the denoiser reads both text encoders' tokens side by side, and the sum of their projections."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = TEXT_TOKENS
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=recipe.text_width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformer = SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=1,
        in_channels=BITS,
        out_channels=BITS,
        num_layers=recipe.layers,
        attention_head_dim=recipe.head,
        num_attention_heads=recipe.heads,
        caption_projection_dim=recipe.heads * recipe.head,
        joint_attention_dim=2 * recipe.text_width,
        pooled_projection_dim=2 * recipe.text_width,
        pos_embed_max_size=LATENT,
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=BITS,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,  # a latent speaks of its own patch
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


@cache
def _bits() -> dict[tuple[str, str, str], tuple[int, ...]]:
    """Six bits of every kind of thing: three say the colour, two the shape, one the size."""
    kinds = product(SHAPES, COLORS, SIZES)
    return {kind: tuple(2 * (number >> bit & 1) - 1 for bit in range(6)) for number, kind in enumerate(kinds)}


def latents_of(scenes: list[Scene]) -> torch.Tensor:
    """[B, 8, 8, 8] what the latents of scenes should be: for each quarter of a thing the bits of its kind and which quarter it is; 0
    where nothing is. So the 256 patches of the world that show something are the corners of a cube, and the empty one is its centre."""
    quarter = rearrange(torch.tensor(list(product((-1.0, 1.0), repeat=2))), "(i j) c -> c i j", i=2)
    latents_BCHW = torch.zeros(len(scenes), BITS, LATENT, LATENT)
    unit, first = CELL // 2, MARGIN // (CELL // 2)
    for latents_CHW, scene in zip(latents_BCHW, scenes, strict=True):
        for thing in scene:
            row, column = first + 2 * thing.row, first + 2 * thing.column
            kind = torch.tensor(_bits()[thing.shape, thing.color, thing.size], dtype=torch.float32)
            latents_CHW[:, row : row + 2, column : column + 2] = torch.cat([repeat(kind, "c -> c i j", i=2, j=2), quarter])
    assert unit * LATENT == SIZE
    return latents_BCHW


def train_vae(pipe: Any, recipe: Recipe, work: Path) -> None:
    """The image coder on crowded boards. A coder left alone spreads a thing's colour over the picture; the patches of this world are
    known, so the encoder learns to say which it sees, and the decoder to draw it although its bits are blurred."""
    vae = pipe.vae

    def loss_of(step: int):
        scenes = boards(60_000_000 + recipe.seed + step, recipe.vae_batch)
        x_BCHW, z_BCHW = pixels_of(scenes), latents_of(scenes)
        noise = torch.from_numpy(np.random.default_rng([recipe.seed, step]).standard_normal(z_BCHW.shape)).float()
        posterior = vae.encode(x_BCHW).latent_dist
        named = ((posterior.mean - z_BCHW) ** 2).mean() + 0.01 * ((posterior.logvar - 2 * np.log(SPREAD)) ** 2).mean()
        error = (vae.decode(z_BCHW + SPREAD * noise).sample - x_BCHW).abs()
        figures = {"error": round(float(error.detach().mean()), 5), "named": round(float(named.detach()), 5)}
        return error.mean() + 4 * (error**2).mean() + named, figures

    fit("vae", work, vae.parameters(), {"vae": vae}, loss_of, recipe.vae_steps, 2e-3)
    vae.requires_grad_(False)
    scenes = [drawing.scene for drawing in corpus.drawings(61_000_000 + recipe.seed, 512, 0.0, 0.0)]
    vae.register_to_config(scaling_factor=round(float(1 / latents_of(scenes).std()), 3))  # latents near N(0, 1), as the noise is


def flow_loss(layout: StableDiffusion3, recipe: Recipe, step: int) -> torch.Tensor:
    """Velocity error of drawings at shifted times of the logistic normal (SD3, eq. 19 and 23). The weight knows where the board is, but
    not where things are: that would teach the model to draw more of them."""
    examples = corpus.drawings(62_000_000 + recipe.seed + step, recipe.batch, recipe.wrong, 0.0, True)
    stream = np.random.default_rng([recipe.seed, step])
    blank = stream.random(len(examples)) < recipe.no_text
    texts = ["" if empty else example.text for example, empty in zip(examples, blank, strict=True)]
    x0 = latents_of([example.scene for example in examples]) * layout.pipe.vae.config.scaling_factor
    time = torch.from_numpy(stream.standard_normal(len(x0))).float().sigmoid()
    time = SHIFT * time / (1 + (SHIFT - 1) * time)
    eps = torch.from_numpy(stream.standard_normal(x0.shape)).float()
    at = time[:, None, None, None]
    velocity = layout.predict((1 - at) * x0 + at * eps, time, layout.encode(texts, 1), 1.0).float()
    weight = torch.ones(LATENT, LATENT)
    board = slice(MARGIN // (CELL // 2), MARGIN // (CELL // 2) + 2 * SIDE)
    weight[board, board] = CELL_WEIGHT
    return (weight / weight.mean() * (velocity - (eps - x0)) ** 2).mean()


def train_flow(pipe: Any, recipe: Recipe, work: Path) -> None:
    layout = StableDiffusion3(pipe)
    modules = {name: getattr(pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2")}

    def loss_of(step: int):
        # On a CPU the plain attention kernel trains twice as fast in bfloat16 as the fused one.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return flow_loss(layout, recipe, step), {}

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
