"""The loaded BAGEL: latents through the generation expert step by step, pictures and text through the understanding expert.

Drawing is the common sampler of flows (`_diffusion`), with its log-probabilities and completions; this file adds the velocity, and BAGEL's
rule of guidance, which acts in an interval of times and is shortened to the plain velocity's length. Source: ByteDance-Seed/Bagel at
056b5fd (modeling/bagel/bagel.py). Changed: lengths are compared per sample, as the original does for a batch of one; both branches of the
guidance go through one forward; nothing is cached while drawing, so that the same forward draws and trains.

Suffixes: R rows, P prompt slots, N latent tokens, E width, C H W latents, h w latent tokens per side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mmalign.models._bagel_net import BagelNet
from mmalign.models._bagel_text import BagelText, Fitting
from mmalign.models._causal_text import CausalText
from mmalign.models._diffusion import UNCOND, Diffusion, Scored
from mmalign.models._diffusion_layouts import Embeds, Layout
from mmalign.models.layers.cached import CachedTrunk, Prefix
from mmalign.models.layers.kl import KlAutoencoder
from mmalign.models.layers.lanes import Lane, few, lanes
from mmalign.models.layers.mot import GEN, block_layout
from mmalign.models.layers.rows import pad_right
from mmalign.trajectory import Policy, Prompts, Trajectory, Which
from mmalign.types import MmalignError, UsageError

PICTURES = 4  # of one forward of the vision tower
SCALE, SHIFT = 0.3611, 0.1159  # of the autoencoder's latents (modeling/autoencoder.py)
TIME_SHIFT = 3.0  # of the schedule: more steps near noise


@dataclass(frozen=True)
class Guidance:
    """When guidance acts (at times t with start < t <= stop) and how far its result may be shortened to the plain velocity's length."""

    start: float = 0.4
    stop: float = 1.0
    renorm_min: float = 0.0


@dataclass(frozen=True)
class GuidedPolicy(Policy):
    """A policy with its own rule of guidance; any other policy means the model's."""

    rule: Guidance = Guidance()


class BagelLayout(Layout):
    """BAGEL as one of the pipelines that the common sampler draws with: embeddings of a prompt are its token ids and their mask."""

    def __init__(self, net: BagelNet, text: BagelText, vae: KlAutoencoder) -> None:
        self.net, self.text, self.vae = net, text, vae
        numbers = net.vae2llm.in_features // vae.channels
        self.multiple = round(numbers**0.5)  # latents per side of a token

    @property
    def scale(self) -> int:
        return self.vae.stride

    @property
    def channels(self) -> int:
        return self.vae.channels

    @property
    def size(self) -> tuple[int, int]:
        side = self.net.latent_pos_embed.side * self.multiple * self.scale
        return side, side

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        if max(size) > self.size[0]:
            raise UsageError(f"BAGEL draws sides of at most {self.size[0]} pixels; got {size[0]} x {size[1]}.")
        return super().shape(size)

    def encode(self, texts: Sequence[str], tokens: int) -> dict[str, Tensor]:
        """ids and mask [R, tokens]; an empty text leaves no real token."""
        rows = [self.text.row(text, tokens) for text in texts]
        ids, mask = pad_right([*rows, [self.text.pad] * tokens], self.text.pad)
        device = self.net.lm_head.weight.device
        return {"ids": ids[:-1].to(device), "mask": mask[:-1].to(device)}

    def predict(self, x_RCHW: Tensor, time_R: Tensor, embeds: Embeds, guidance: float) -> Tensor:
        """The velocity, from data to noise. A row is prompt, begin and end of the picture, then the latents, which are seen by no text."""
        net, ids, mask = self.net, embeds["ids"], embeds["mask"]
        p, (height, width) = self.multiple, x_RCHW.shape[-2:]
        cells = torch.arange(height // p)[:, None] * net.latent_pos_embed.side + torch.arange(width // p)
        dtype = net.vae2llm.weight.dtype
        tokens_RNE = net.vae2llm(rearrange(x_RCHW, "r c (h p) (w q) -> r (h w) (p q c)", p=p, q=p).to(dtype))
        time = net.time_embedder(time_R.to(x_RCHW.device))[:, None]
        latents = tokens_RNE + time + net.latent_pos_embed(cells.flatten().to(ids.device))
        ends = torch.tensor([self.text.start, self.text.end], device=ids.device).expand(len(ids), 2)
        und = net.get_input_embeddings()(torch.cat([ids, ends], 1))
        number = latents.shape[1] + 2
        is_block = torch.cat([torch.zeros_like(mask), torch.ones(len(ids), number, dtype=torch.bool, device=ids.device)], 1)
        layout = block_layout(is_block, torch.cat([mask, is_block[:, -number:]], 1))
        _, gen = net.language_model.model(und, latents, *layout)
        return rearrange(net.llm2vae(gen), "r (h w) (p q c) -> r c (h p) (w q)", h=height // p, p=p, q=p)

    def times(self, steps: int, shape: tuple[int, int, int]) -> Tensor:
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        shifted = TIME_SHIFT * even / (1 + (TIME_SHIFT - 1) * even)
        return torch.stack([shifted[:-1], shifted[1:]], 1)

    def decode(self, x_RCHW: Tensor) -> Tensor:
        return self.vae.decode(x_RCHW.float() / SCALE + SHIFT).clamp(0, 1)

    def encode_image(self, pixels_RCHW: Tensor) -> Tensor:
        return (self.vae.encode(pixels_RCHW) - SHIFT) * SCALE


class Bagel(Diffusion, CausalText):
    """A BAGEL of any size."""

    def __init__(self, net: BagelNet, text: BagelText, vae: KlAutoencoder, fitting: Fitting, tokens: int, rule: Guidance) -> None:
        Diffusion.__init__(self, BagelLayout(net, text, vae), tokens)
        CausalText.__init__(self, net, net.language_model.model, text)
        self.vae, self.fitting, self.rule = vae, fitting, rule
        layers = self.trunk.layers
        experts: dict[str, list[nn.Module]] = {"": [], GEN: []}
        for twin, modules in experts.items():
            for layer in layers:
                modules += [getattr(layer.self_attn, f"{name}_proj{twin}") for name in "qkvo"]
        rest = [getattr(layer, f"mlp{GEN}") for layer in layers]
        norms = [getattr(layer, name + GEN) for layer in layers for name in ("input_layernorm", "post_attention_layernorm")]
        self.trainable = {
            "attention": nn.ModuleList(experts[GEN]),
            "denoiser": nn.ModuleList([*experts[GEN], *rest, *norms, net.vae2llm, net.llm2vae, net.time_embedder]),
            "language": nn.ModuleList([*experts[""], *(layer.mlp for layer in layers), net.get_input_embeddings()]),
            "text_head": net.lm_head,
            "vision": nn.ModuleList([net.vit_model, net.connector]),
        }

    def shard_units(self) -> list[nn.Module]:
        """The modules that are called directly, inner ones first: what FSDP2 must gather one by one."""
        net = self.net
        ways = [net.vae2llm, net.llm2vae, net.time_embedder, net.latent_pos_embed, net.vit_pos_embed, net.connector, net.vit_model]
        return [*self.trunk.layers, self.trunk.embed_tokens, net.lm_head, *ways, self.trunk]

    # Drawing

    def pictures(self, latents_BCHW: Tensor) -> list[Any]:
        """uint8 [H, W, 3] of each latent. Fractions are cut off, not rounded, as the official scripts do."""
        bytes_BHWC = (self.decode(latents_BCHW) * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [picture.copy() for picture in bytes_BHWC]

    def score(self, prompts: Prompts, trajectory: Trajectory, rows: Sequence[int], steps: Sequence[int], which: Which) -> Scored:
        with self._ruled(trajectory.policy):
            return super().score(prompts, trajectory, rows, steps, which)

    def complete(self, prompts: Prompts, trajectory: Trajectory, n: int = 0) -> Tensor:
        with self._ruled(trajectory.policy):
            return super().complete(prompts, trajectory, n)

    def _run(self, prompts: Prompts, lane: Lane, policy: Policy, *more: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        with self._ruled(policy):
            return super()._run(prompts, lane, policy, *more, **options)

    @contextmanager
    def _ruled(self, policy: Policy) -> Iterator[None]:
        """Inside, guidance follows the policy's rule."""
        own, self.rule = self.rule, policy.rule if isinstance(policy, GuidedPolicy) else self.rule
        try:
            yield
        finally:
            self.rule = own

    def _predict(self, x: Tensor, time_R: Tensor, prompts: Prompts, guidance: float, which: Which) -> Tensor:
        """The guided velocity, float32. Where no row's time lies in the interval, one branch is all there is."""
        is_guided = (time_R > self.rule.start) & (time_R <= self.rule.stop)
        if which == "cond" or guidance == 1 or not is_guided.any():
            return super()._predict(x, time_R, prompts, 1.0, "cond")
        names = [name for name in prompts.embeds if not name.startswith(UNCOND)]
        cond, uncond = ({name: prompts.embeds[prefix + name] for name in names} for prefix in ("", UNCOND))
        if which == "guided":
            both = {name: torch.cat([uncond[name], cond[name]]) for name in names}
            low, high = self.layout.predict(torch.cat([x, x]), torch.cat([time_R, time_R]), both, guidance).float().chunk(2)
        else:
            with torch.no_grad():
                low = self.layout.predict(x, time_R, uncond, guidance).float()
            high = self.layout.predict(x, time_R, cond, guidance).float()
        aimed = self.layout.guide(low, high, guidance)
        lengths = [tensor.flatten(1).norm(dim=1) for tensor in (high, aimed)]
        short = (lengths[0] / (lengths[1] + 1e-8)).clamp(self.rule.renorm_min, 1.0)
        return torch.where(is_guided.to(x.device)[:, None, None, None], aimed * short[:, None, None, None], high)

    # Reading

    def image_features(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, T, E] what the trunk reads of pictures of one size in [0, 1]. Differentiable in the pixels."""
        net, patch = self.net, self.net.vit_model.patch
        if any(side % patch or side > patch * net.vit_model.side for side in pixels_BCHW.shape[-2:]):
            raise MmalignError(
                f"The vision tower reads sides of multiples of {patch} pixels, at most {patch * net.vit_model.side}; got "
                f"{list(pixels_BCHW.shape)}. Give uint8 arrays, which are fitted, or resize the tensor."
            )
        x = pixels_BCHW.to(self.device, net.connector.fc1.weight.dtype) * 2 - 1
        cells = net.vit_model.cells(*x.shape[-2:]).to(self.device)
        parts = [net.vit_model(x[lane.rows])[: lane.n_real] for lane in few(len(x), PICTURES, self.width is not None)]
        return net.connector(torch.cat(parts)) + net.vit_pos_embed(cells)

    def fit(self, images: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] pixels in [0, 1] of uint8 pictures, each fitted as for a question; UsageError when their sizes then differ."""
        fitted = [self.fitting.fit(image) for image in images]
        if len({picture.shape for picture in fitted}) > 1:
            raise UsageError("Pictures of different shapes keep them, and so do not fit into one tensor. Give pictures of one shape.")
        return torch.stack(fitted)

    def questions(self, texts: Sequence[str], images: Sequence[Any]) -> tuple[list[list[int]], list[Tensor | None]]:
        pixels = [image if image is None or isinstance(image, Tensor) else self.fitting.fit(image) for image in images]
        patch = self.net.vit_model.patch
        sizes = [0 if picture is None else picture.shape[-2] // patch * (picture.shape[-1] // patch) for picture in pixels]
        return [self.chat.question(text, size) for text, size in zip(texts, sizes, strict=True)], pixels

    def prefill(self, trunk: CachedTrunk, ids_RP: Tensor, mask_RP: Tensor, pictures: Sequence[Tensor | None]) -> Prefix:
        return trunk.prefill(self._embed(ids_RP, pictures), mask_RP, block_layout(self._is_block(ids_RP), mask_RP))

    def states(self, ids_RP: Tensor, mask: Tensor, pictures: Sequence[Tensor | None], tail_RL: Tensor) -> Tensor:
        embeds = torch.cat([self._embed(ids_RP, pictures), self.net.get_input_embeddings()(tail_RL)], 1)
        is_block = torch.cat([self._is_block(ids_RP), torch.zeros_like(tail_RL, dtype=torch.bool)], 1)
        return self.trunk(embeds, None, *block_layout(is_block, mask))[0]

    def is_picture(self, ids: Tensor) -> Tensor:
        return ids == self.chat.patch

    def _is_block(self, ids_RP: Tensor) -> Tensor:
        return (ids_RP == self.chat.patch) | (ids_RP == self.chat.start) | (ids_RP == self.chat.end)

    def _embed(self, ids_RP: Tensor, pictures: Sequence[Tensor | None]) -> Tensor:
        """Input embeddings; placeholders are replaced by the features of their row's picture. Those of one shape are read together."""
        embeds = self.net.get_input_embeddings()(torch.where(self.is_picture(ids_RP), self.chat.pad, ids_RP))
        features: dict[int, Tensor] = {}
        for lane in lanes([None if picture is None else tuple(picture.shape) for picture in pictures], None):
            if lane.key is not None:
                found = self.image_features(torch.stack([pictures[row].to(self.device) for row in lane.rows]))  # type: ignore[union-attr]
                features.update(zip(lane.rows, found, strict=True))
        if not features:
            return embeds
        flat = torch.cat([features[row] for row in sorted(features)]).to(embeds.dtype)
        return embeds.masked_scatter(self.is_picture(ids_RP)[..., None], flat)


def rule_of(settings: Mapping[str, Any]) -> Guidance:
    """The rule of guidance that sampling settings mean."""
    return Guidance(settings["guided_from"], settings["guided_to"], settings["renorm_min"])
