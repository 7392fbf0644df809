"""X-Omni's decoder: FLUX.1 that sees the semantic features of the codes, between its double and its single blocks, and the prompt.

Source: X-Omni's remote code as carried by vladmandic/sdnext at 058a7f0 (modeling_siglip_flux.py). Guidance is true: both branches go
through one forward, the negative one with an empty prompt and no features. Changed: start noise comes from one stream per sample; the
image coder stays in float32.

Suffixes: R rows, T image tokens, E width of the features, C H W latents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.models._diffusion_layouts import Embeds, Flux
from mmalign.models.layers.lanes import few
from mmalign.models.layers.noise import normals, streams
from mmalign.models.layers.weights import check_names, check_shapes, read_tensors
from mmalign.types import MmalignError, request_seed

ROWS = 4  # pictures of one forward: FLUX is large, and on the CPU a fixed number keeps results independent of the batch
TOKENS = 512  # length to which T5 pads
OWN = ("siglip_channels", "drop_token_prob")  # settings of the decoder that FLUX itself has not
PARTS = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}


class SemanticFlux(Flux):
    """FLUX whose image stream gets the embedded features after the last double block."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.features: Tensor | None = None
        self.net.transformer_blocks[-1].register_forward_hook(self._add)

    def predict(self, x_RCHW: Tensor, time_R: Tensor, embeds: Embeds, guidance: float) -> Tensor:
        self.features = embeds["features"]
        try:
            return super().predict(x_RCHW, time_R, embeds, guidance)
        finally:
            self.features = None

    def _add(self, module: nn.Module, inputs: Any, streams: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Blocks return the text's stream and the image's."""
        text, image = streams
        if self.features is not None:
            image = image + self.net.siglip_embed(self.features.to(image))
        return text, image


class FluxDecoder:
    """Features of codes to pixels. `scale` is pixels per code, `steps` and `guidance` are the checkpoint's."""

    def __init__(self, layout: SemanticFlux, scale: int, steps: int, guidance: float, tokens: int = TOKENS) -> None:
        self.layout, self.scale, self.steps, self.guidance, self.tokens = layout, scale, steps, guidance, tokens

    @torch.no_grad()
    def draw(self, features_RTE: Tensor, grid: tuple[int, int], texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """[R, 3, H, W] in [0, 1]; each row depends on its own features, text and seed alone."""
        is_fixed, parts = features_RTE.device.type == "cpu", []
        with torch.autocast(features_RTE.device.type, enabled=False):
            for lane in few(len(texts), ROWS, is_fixed):
                own = [texts[row] for row in lane.rows], [request_seed(seeds[row], "decoder", 0) for row in lane.rows]
                parts.append(self._draw(features_RTE[lane.rows], grid, *own)[: lane.n_real])
        return torch.cat(parts)

    def _draw(self, features_RTE: Tensor, grid: tuple[int, int], texts: list[str], seeds: list[int]) -> Tensor:
        shape = self.layout.shape((grid[0] * self.scale, grid[1] * self.scale))
        x = normals(streams(seeds), *shape).to(features_RTE.device)
        cond, blank = (self.layout.encode(words, self.tokens) for words in (texts, [""]))
        both = {name: torch.cat([value, blank[name].expand_as(value)]) for name, value in cond.items()}
        both["features"] = torch.cat([features_RTE, torch.zeros_like(features_RTE)])
        for before, after in self.layout.times(self.steps, shape).tolist():
            time = torch.full((2 * len(x),), before, dtype=torch.float64)
            velocity, plain = self.layout.predict(torch.cat([x, x]), time, both, 1.0).float().chunk(2)
            x = x + (after - before) * (plain + self.guidance * (velocity - plain))
        return self.layout.decode(x)


def read_decoder(folder: Path, flux: Path, settings: dict[str, Any], dtype: torch.dtype, device: str) -> FluxDecoder:
    """The decoder in `folder` with the text encoders, image coder and schedule in `flux`; MmalignError says what is missing."""
    from diffusers import FluxPipeline

    parts = {name: _read_part(flux / name, *cls, torch.float32 if name == "vae" else dtype) for name, cls in PARTS.items()}
    parts["transformer"] = read_transformer(folder, dtype)
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.to(device).eval().requires_grad_(False)
    layout = SemanticFlux(FluxPipeline(**parts))
    if settings["upscale_factor"] != layout.scale * layout.multiple:
        raise MmalignError(
            f"The decoder in {folder} makes {settings['upscale_factor']} pixels per code, and FLUX in {flux} one token of "
            f"{layout.scale * layout.multiple}: the image coder is another one than X-Omni's. Give the folder of FLUX.1-dev."
        )
    tokens = settings.get("max_sequence_length", TOKENS)
    return FluxDecoder(layout, settings["upscale_factor"], settings["num_inference_steps"], settings["cfg_scale"], tokens)


def read_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The FLUX transformer with `siglip_embed`, every parameter present and none left over."""
    from diffusers import FluxTransformer2DModel

    if not (folder / "config.json").is_file():
        raise MmalignError(f"There is no decoder in {folder}: it has no config.json. Download the checkpoint again.")
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        net = FluxTransformer2DModel.from_config({name: value for name, value in content.items() if name not in OWN})
        net.siglip_embed = nn.Linear(content["siglip_channels"], net.inner_dim, bias=False)
    tensors = {name: value.to(dtype) for name, value in read_tensors(folder).items()}
    expected = set(net.state_dict())
    check_names(expected - set(tensors), set(tensors) - expected, folder)
    check_shapes(tensors, net, folder)
    net.load_state_dict(tensors, assign=True)
    return net


def _read_part(folder: Path, library: str, cls: str, dtype: torch.dtype) -> Any:
    import importlib

    if not folder.is_dir():
        raise MmalignError(f"The FLUX folder {folder.parent} lacks its part '{folder.name}' ({cls}). Download it again.")
    kind = getattr(importlib.import_module(library), cls)
    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(folder)
    options = {"torch_dtype": dtype} if library == "diffusers" else {"dtype": dtype}
    try:
        module, found = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise MmalignError(f"The part {folder} cannot be read as {cls}: {error}. Download the folder again.") from error
    check_names(found["missing_keys"], [name for name in found["unexpected_keys"] if not name.endswith("position_ids")], folder)
    return module
