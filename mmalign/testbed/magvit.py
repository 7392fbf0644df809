"""The image tokenizer of the tiny masked models: a MAGVIT-v2 of nine bits, which say what a patch of the shapes world shows.

A patch holds a quarter of one thing or nothing, so its code is fixed from the beginning, as for `tiny-janus`: code 0 is the empty patch;
of the others the first bit says that there is a thing, two say its shape, three its colour, one its size, two which quarter of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.models.layers.ldm import Decoder, Encoder
from mmalign.models.layers.magvit import Magvit
from mmalign.testbed.build_janus import PATCH, boards, pixels_of
from mmalign.testbed.render import CELL, MARGIN, SIZE
from mmalign.testbed.training import fit
from mmalign.testbed.world import COLORS, SHAPES, SIZES, Scene, Thing

BITS = 9
CODES = 2**BITS
SIDE = SIZE // PATCH
TOKENS = SIDE**2
WIDTHS = (32, 32, 32)  # of the levels; the normalisation needs multiples of 32
QUARTERS = (CELL // PATCH) ** 2
FIRST = CODES // 2  # code of the first quarter of a thing


@dataclass(frozen=True)
class Recipe:
    """Length of the tokenizer's training: stages of so many steps at a learning rate."""

    seed: int = 0
    stages: tuple[tuple[int, float], ...] = ((500, 2e-3),)
    batch: int = 24


def code_of(thing: Thing, quarter: int) -> int:
    """The code of a thing's quarter, 0 to 3 in reading order."""
    kind = (SHAPES.index(thing.shape) * len(COLORS) + COLORS.index(thing.color)) * len(SIZES) + SIZES.index(thing.size)
    return FIRST + kind * QUARTERS + quarter


def codes_of(scenes: list[Scene]) -> Tensor:
    """Codes [B, 64] of the pictures of scenes, in reading order."""
    codes_BHW = torch.zeros(len(scenes), SIDE, SIDE, dtype=torch.long)
    for codes_HW, scene in zip(codes_BHW, scenes, strict=True):
        for thing in scene:
            top, left = ((MARGIN + CELL * place) // PATCH for place in (thing.row, thing.column))
            for quarter in range(QUARTERS):
                codes_HW[top + quarter // 2, left + quarter % 2] = code_of(thing, quarter)
    return codes_BHW.flatten(1)


def make_magvit(seed: int) -> Magvit:
    """A fresh tokenizer of 32 x 32 pixels, 4 x 4 to a code."""
    blocks = [1] * len(WIDTHS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Magvit(Encoder(WIDTHS[0], WIDTHS, blocks, BITS), Decoder(BITS, WIDTHS[-1], WIDTHS, blocks), BITS, PATCH)


def train_magvit(vq: Magvit, recipe: Recipe, work: Path) -> None:
    """The encoder learns to name the patches, bit by bit, and the decoder to draw them; then both are frozen."""

    def loss_of(step: int, before: int) -> tuple[Tensor, dict[str, float]]:
        scenes = boards(10_000_000 + recipe.seed + before + step, recipe.batch)
        codes_BN, x_BCHW = codes_of(scenes), pixels_of(scenes)
        bits_BNC = ((codes_BN[..., None] & vq.powers) > 0).float()
        with torch.autocast("cpu", torch.bfloat16):
            named_BNC = vq.encoder(x_BCHW).float().flatten(2).mT
            decoded = vq.decoder((bits_BNC * 2 - 1).mT.unflatten(2, (SIDE, SIDE))).float()
        error = (decoded - x_BCHW).abs()
        right = ((named_BNC > 0) == (bits_BNC > 0)).all(-1).float().mean()
        naming = F.binary_cross_entropy_with_logits(named_BNC, bits_BNC)
        return error.mean() + 4 * (error**2).mean() + naming, {
            "error": round(float(error.mean().detach()), 5),
            "named": round(float(right), 5),
        }

    before = 0
    for number, (steps, rate) in enumerate(recipe.stages, 1):
        fit(f"magvit-{number}", work, vq.parameters(), {"vq": vq}, partial(loss_of, before=before), steps, rate)
        before += steps
    vq.eval().requires_grad_(False)


def save_magvit(vq: Magvit, folder: Path) -> None:
    """Writes showlab/magvitv2's layout in half precision; what its config.json says is a name and no sizes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in vq.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": "MAGVITv2"}) + "\n")
