"""Attribution: which part of a picture earned its score. Image + prompt + scorer -> one weight for each image token.

`attribute(config, scorer, pixels, prompts)` runs any tool on any scorer and returns `Maps`; `token_weights` turns maps into the weights of
a policy gradient. Tools: `fast_shap` (the default for training), `shap`, `lime`, `gradcam`, `rahf` and `oracle` (a scorer's own heat
map), the controls `random`, `constant` and `permuted`, and `amortised`, which needs a head that its caller keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.attribution.amortised import Amortised, AmortisedHead
from mmalign.attribution.controls import permuted_maps, random_maps
from mmalign.attribution.fast_shap import VARIANTS, FastShap, fast_shap
from mmalign.attribution.game import BlurGame, DropGame, Game, Masking
from mmalign.attribution.gradcam import gradcam
from mmalign.attribution.lime import Lime, lime
from mmalign.attribution.maps import Maps, Rule, entropy, normalise, overlay, resize_area, resize_bilinear, token_weights, top_mass
from mmalign.attribution.protocol import ActivationScorer, BlackBox, FeatureScorer, GatedScorer, PixelScorer
from mmalign.attribution.shap import Shap, expanded, shap
from mmalign.types import Prompt, UsageError

__all__ = [
    "VARIANTS",
    "ActivationScorer",
    "Amortised",
    "AmortisedHead",
    "Attribution",
    "BlackBox",
    "BlurGame",
    "DropGame",
    "FastShap",
    "FeatureScorer",
    "GatedScorer",
    "Lime",
    "Maps",
    "PixelScorer",
    "Shap",
    "attribute",
    "entropy",
    "normalise",
    "overlay",
    "resize_area",
    "token_weights",
    "top_mass",
]

Tool = Literal["fast_shap", "shap", "lime", "gradcam", "rahf", "oracle", "random", "constant", "permuted", "amortised"]


@dataclass(frozen=True)
class Attribution:
    """Which tool, on which grid, in which game.

    `grid`: side of the map (24 in the paper). `size`: pixels that pictures are resampled to first; None takes the least multiple of the
    grid that loses none. `masking`: absent cells are blurred, or dropped from the scorer's tower (then the players are its patches).
    `blur`: width of the blur as a share of the picture; the paper's 24 pixels of 384 are 0.0625, which hides no large thing.
    `of`: the tool whose maps `permuted` shuffles. `chunk`: masked copies per call of the scorer. `autocast`: the scorer's passes run in
    mixed precision; a map is a difference of scores, so look at its fidelity first (docs/attribution.md).
    """

    tool: Tool = "fast_shap"
    grid: int = 24
    size: int | None = None
    masking: Masking = "blur"
    blur: float = 0.5
    chunk: int = 256
    seed: int = 0
    of: Tool = "fast_shap"
    autocast: Literal["none", "bfloat16", "float16"] = "none"
    fast_shap: FastShap = field(default_factory=FastShap)
    shap: Shap = field(default_factory=Shap)
    lime: Lime = field(default_factory=Lime)

    def __post_init__(self) -> None:
        if self.grid < 2 or self.chunk < 1 or not self.blur > 0 or (self.size is not None and self.size % self.grid):
            raise ValueError("grid is at least 2, chunk at least 1, blur above 0, and size a multiple of grid")
        if self.of in ("permuted", "amortised"):
            raise ValueError(f"`of` names the tool whose maps are shuffled; {self.of} is none of its own")


def attribute(
    config: Attribution, scorer: Any, pixels_BCHW: Tensor, prompts: Sequence[Prompt | str], head: AmortisedHead | None = None
) -> Maps:
    """Maps [B, D, D] of pictures (floats in [0, 1]) and their prompts; a whole group in one call.

    `scorer` is a PixelScorer, or any Scorer (then without gradients). A picture's map depends on that picture, its prompt and the
    config alone. UsageError when the scorer lacks what the tool needs; MmalignError when it fails on a masked picture.
    """
    if config.autocast != "none":
        with torch.autocast(pixels_BCHW.device.type, getattr(torch, config.autocast)):
            return attribute(replace(config, autocast="none"), scorer, pixels_BCHW, prompts, head)
    if not (pixels_BCHW.ndim == 4 and pixels_BCHW.is_floating_point()):
        got = f"{tuple(pixels_BCHW.shape)} {pixels_BCHW.dtype}"
        raise UsageError(f"Attribution takes pictures [B, C, H, W] of floats in [0, 1] and got {got}.")
    texts = [prompt if isinstance(prompt, str) else prompt.text for prompt in prompts]
    pixels = _resampled(pixels_BCHW, config)
    black_box = BlackBox(scorer, tuple(prompt for prompt in prompts if isinstance(prompt, Prompt)))
    pixel_scorer: PixelScorer = scorer if isinstance(scorer, PixelScorer) else black_box
    grid = (config.grid, config.grid)
    match config.tool:
        case "constant":
            return _maps(config.tool, torch.ones(len(pixels), *grid, dtype=torch.float64, device=pixels.device), 0)
        case "random":
            return _maps(config.tool, random_maps(pixels, texts, grid, config.seed), 0)
        case "permuted":
            found = attribute(replace(config, tool=config.of), scorer, pixels_BCHW, prompts)
            shuffle = [permuted_maps(maps, pixels, texts, config.seed) for maps in (found.credit, found.weights)]
            return replace(found, tool=f"permuted {found.tool}", credit=shuffle[0], weights=shuffle[1])
        case "rahf" | "oracle":
            heat = resize_bilinear(black_box.heatmaps(pixels_BCHW, texts).double(), *grid).to(pixels.device)
            return Maps(config.tool, heat, heat.clamp(0, 1), 1, sign=-1 if config.tool == "rahf" else 1)
        case "gradcam":
            heat = gradcam(_needs(scorer, ActivationScorer, "gradcam"), pixels, texts, config.chunk)
            return _maps(config.tool, resize_area(resize_bilinear(heat, *pixels.shape[-2:]), *grid), 3, "positive")
        case "lime":
            game = BlurGame(pixel_scorer, pixels, texts, (pixels.shape[-2], pixels.shape[-1]), config.blur, config.chunk)
            painted = lime(game, config.lime)
            sizes = resize_area(painted.abs(), *grid)  # equation (24): absolute values before the patch mean
            return Maps(config.tool, resize_area(painted, *grid), normalise(sizes, "positive"), game.evaluations)
        case "shap" if config.shap.unit == "pixel" and config.masking == "blur":
            game = BlurGame(pixel_scorer, pixels, texts, (pixels.shape[-2], pixels.shape[-1]), config.blur, config.chunk)
            return _maps(config.tool, expanded(shap(game, config.shap, pixels.shape[1]), grid), game.evaluations)
    played: Game
    if config.masking == "drop":
        played = DropGame(_needs(scorer, GatedScorer, 'masking "drop"'), pixels_BCHW, texts, config.chunk)
    else:
        played = BlurGame(pixel_scorer, pixels, texts, grid, config.blur, config.chunk)
    tool, credit = _play(config, played, head)
    h, w = credit.shape[-2:]
    spread = resize_area(credit, *grid) * (h * w / (grid[0] * grid[1]))  # the sum of the credit survives the change of grid
    return _maps(tool if played.name == "blur" else f"{tool}/{played.name}", spread, played.evaluations)


def _play(config: Attribution, game: Game, head: AmortisedHead | None) -> tuple[str, Tensor]:
    if config.tool == "shap":
        return "shap", shap(game, config.shap)
    if config.tool == "amortised":
        if head is None:
            raise UsageError("The tool 'amortised' needs a head: an AmortisedHead, kept by the caller between calls.")
        head.step(game)
        if head.fidelity >= head.config.floor:
            return "amortised", head.explain(game)
    return "fast_shap", fast_shap(game, config.fast_shap)


def _maps(tool: str, credit: Tensor, evaluations: float, rule: Rule = "signed") -> Maps:
    return Maps(tool, credit, normalise(credit, rule), evaluations)


def _needs(scorer: Any, protocol: Any, what: str) -> Any:
    if not isinstance(scorer, protocol):
        names = sorted(name for name in vars(protocol) if not name.startswith("_"))
        name = getattr(scorer, "name", type(scorer).__name__)
        raise UsageError(f"The scorer '{name}' cannot serve {what}: it offers no {' and '.join(names)}. Use another scorer or tool.")
    return scorer


def _resampled(pixels_BCHW: Tensor, config: Attribution) -> Tensor:
    """Pictures at `size`, square, by bicubic resampling; unchanged where they have that size or their sides are multiples of the grid."""
    height, width = pixels_BCHW.shape[-2:]
    if config.size is None and height % config.grid == 0 == width % config.grid:
        return pixels_BCHW
    size = config.size or -(-max(height, width) // config.grid) * config.grid
    if (height, width) == (size, size):
        return pixels_BCHW
    return F.interpolate(pixels_BCHW, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
