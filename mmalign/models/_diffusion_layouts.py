"""What differs between diffusers pipelines: text to embeddings, the denoiser's call, the times of a schedule, latents to pixels.

A layout never samples. Its one primitive is `predict`: the model's output (a velocity, or noise) at states x and times t, each row with
its own time. Source of each call: the pipeline of the same name in diffusers 0.42; equality with it is tested. Changed: times are per
row, and guidance is left to the caller where the network has none inside.

Suffixes: R rows, C latent channels, H W latent sides, L text tokens, E width, T image tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mmalign import sde
from mmalign.types import UsageError

Embeds = Mapping[str, Tensor]


class Layout:
    """A loaded pipeline seen through the few calls that sampling needs; subclasses say what is theirs."""

    denoiser = "transformer"
    rules: tuple[sde.Noise, ...] = ("flow", "constant", "coefficient")
    has_negative = True  # guidance needs an unconditional branch; else it is an input of the network, or there is none
    multiple = 1  # latent sides must be a multiple of this

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.net = getattr(pipe, self.denoiser)

    def encode(self, texts: Sequence[str], tokens: int) -> dict[str, Tensor]:
        """What the denoiser reads of texts, each [R, ...]; rows never depend on one another."""
        raise NotImplementedError

    def encode_negative(self, text: str, tokens: int) -> dict[str, Tensor]:
        """The unconditional branch's, [1, ...]."""
        return self.encode([text], tokens)

    def predict(self, x_RCHW: Tensor, time_R: Tensor, embeds: Embeds, guidance: float) -> Tensor:
        """The denoiser's prediction [R, C, H, W] at times (sigmas or alpha-bars)."""
        raise NotImplementedError

    def guide(self, uncond: Tensor, cond: Tensor, weight: float) -> Tensor:
        return uncond + weight * (cond - uncond)

    def times(self, steps: int, shape: tuple[int, int, int]) -> Tensor:
        """[K, 2] float64: the time before and after each step."""
        raise NotImplementedError

    @property
    def scale(self) -> int:
        """Pixels per side of a latent."""
        return int(self.pipe.vae_scale_factor)

    @property
    def channels(self) -> int:
        return int(self.net.config.in_channels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of a picture whose size nobody named."""
        side = self.pipe.default_sample_size * self.scale
        return side, side

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """C, H, W of the latents of a picture; UsageError when the size cannot be drawn."""
        unit = self.scale * self.multiple
        if any(side < unit or side % unit for side in size):
            raise UsageError(f"This pipeline draws sizes that are multiples of {unit}; got {size[0]} x {size[1]} pixels.")
        return self.channels, size[0] // self.scale, size[1] // self.scale

    def decode(self, x_RCHW: Tensor) -> Tensor:
        """[R, 3, H, W] pixels in [0, 1], as float32."""
        settings = self.pipe.vae.config
        z = x_RCHW / settings.scaling_factor + (getattr(settings, "shift_factor", None) or 0.0)
        return self._pixels(self.pipe.vae.decode(z, return_dict=False)[0])

    def encode_image(self, pixels_RCHW: Tensor) -> Tensor:
        """[R, C, H, W] latents of pictures in [0, 1]: the posterior's mean."""
        settings = self.pipe.vae.config
        mean = self.pipe.vae.encode(pixels_RCHW * 2 - 1).latent_dist.mean
        return (mean - (getattr(settings, "shift_factor", None) or 0.0)) * settings.scaling_factor

    @staticmethod
    def _pixels(x: Tensor) -> Tensor:
        return (x.float() / 2 + 0.5).clamp(0, 1)

    def _of_net(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self.net.dtype) for tensor in tensors]

    def _flow_times(self, steps: int, tokens: int, linear: bool) -> Tensor:
        """Sigmas of the checkpoint's own schedule. `linear`: the pipeline hands in 1 .. 1/K rather than the scheduler's grid."""
        scheduler = self.pipe.scheduler
        options: dict[str, Any] = {"sigmas": torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()} if linear else {}
        if scheduler.config.use_dynamic_shifting:
            options["mu"] = shift_of(tokens, scheduler.config)
        scheduler.set_timesteps(steps, **options)
        sigmas = scheduler.sigmas.double().cpu()
        return torch.stack([sigmas[:-1], sigmas[1:]], 1)


def shift_of(tokens: int, settings: Mapping[str, Any]) -> float:
    """The schedule's shift for a picture of that many tokens: linear between the shortest and the longest."""
    low, high = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
    base, most = settings.get("base_shift", 0.5), settings.get("max_shift", 1.15)
    return base + (most - base) * (tokens - low) / (high - low)


class StableDiffusion3(Layout):
    """SD3 and SD3.5: MMDiT on latents, two CLIP encoders and a T5 (which may be left out)."""

    @property
    def multiple(self) -> int:  # type: ignore[override]
        return int(self.net.config.patch_size)

    def encode(self, texts: Sequence[str], tokens: int) -> dict[str, Tensor]:
        prompt, _, pooled, _ = self.pipe.encode_prompt(
            list(texts), None, None, do_classifier_free_guidance=False, max_sequence_length=tokens
        )
        return {"prompt": prompt, "pooled": pooled}

    def predict(self, x_RCHW: Tensor, time_R: Tensor, embeds: Embeds, guidance: float) -> Tensor:
        x, prompt, pooled = self._of_net(x_RCHW, embeds["prompt"], embeds["pooled"])
        time = time_R.to(x.device, torch.float32) * 1000
        return self.net(x, timestep=time, encoder_hidden_states=prompt, pooled_projections=pooled, return_dict=False)[0]

    def times(self, steps: int, shape: tuple[int, int, int]) -> Tensor:
        return self._flow_times(steps, shape[1] * shape[2] // self.multiple**2, linear=False)


class Flux(Layout):
    """FLUX.1: latents travel packed, two by two; guidance is an input of the distilled network."""

    has_negative = False
    multiple = 2

    @property
    def channels(self) -> int:
        return int(self.net.config.in_channels) // 4

    def encode(self, texts: Sequence[str], tokens: int) -> dict[str, Tensor]:
        prompt, pooled, _ = self.pipe.encode_prompt(list(texts), None, max_sequence_length=tokens)
        return {"prompt": prompt, "pooled": pooled}

    def predict(self, x_RCHW: Tensor, time_R: Tensor, embeds: Embeds, guidance: float) -> Tensor:
        packed, prompt, pooled = self._of_net(pack(x_RCHW), embeds["prompt"], embeds["pooled"])
        rows, columns = x_RCHW.shape[-2] // 2, x_RCHW.shape[-1] // 2
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(packed)
        weight = torch.full((len(packed),), guidance, device=packed.device) if self.net.config.guidance_embeds else None
        velocity = self.net(
            packed,
            timestep=time_R.to(packed),
            guidance=weight,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            txt_ids=torch.zeros(prompt.shape[1], 3).to(packed),
            img_ids=torch.cat([torch.zeros_like(grid[:, :1]), grid], 1),
            return_dict=False,
        )[0]
        return unpack(velocity, rows)

    def times(self, steps: int, shape: tuple[int, int, int]) -> Tensor:
        return self._flow_times(steps, shape[1] * shape[2] // 4, linear=True)


class StableDiffusion(Layout):
    """Stable Diffusion 1.x and 2.x: a UNet that predicts noise (or v), sampled by DDIM; times are alpha-bars."""

    denoiser = "unet"
    rules = ("ddim",)

    @property
    def size(self) -> tuple[int, int]:
        side = self.net.config.sample_size * self.scale
        return side, side

    def encode(self, texts: Sequence[str], tokens: int) -> dict[str, Tensor]:
        return {"prompt": self.pipe.encode_prompt(list(texts), self.pipe.device, 1, False)[0]}

    def predict(self, x_RCHW: Tensor, time_R: Tensor, embeds: Embeds, guidance: float) -> Tensor:
        x, prompt = self._of_net(x_RCHW, embeds["prompt"])
        bars = self.pipe.scheduler.alphas_cumprod.double()
        index = (bars[None] - time_R.cpu()[:, None]).abs().argmin(-1).to(x.device)
        made = self.net(x, index, encoder_hidden_states=prompt, return_dict=False)[0].float()
        if self.pipe.scheduler.config.prediction_type == "epsilon":
            return made
        bar = time_R.to(x.device, torch.float32)[:, None, None, None]
        return bar.sqrt() * made + (1 - bar).sqrt() * x_RCHW  # v = sqrt(a) eps - sqrt(1 - a) x0

    def times(self, steps: int, shape: tuple[int, int, int]) -> Tensor:
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(steps)
        former = scheduler.timesteps - scheduler.config.num_train_timesteps // steps
        bars, last = scheduler.alphas_cumprod.double(), scheduler.final_alpha_cumprod.double()
        return torch.stack([bars[scheduler.timesteps], torch.where(former >= 0, bars[former.clamp(min=0)], last)], 1)


class Sana(Layout):
    """SANA: a linear transformer on 32-fold compressed latents, read by Gemma after an instruction that asks it to enhance the prompt."""

    @property
    def size(self) -> tuple[int, int]:
        side = self.net.config.sample_size * self.scale
        return side, side

    def encode(self, texts: Sequence[str], tokens: int) -> dict[str, Tensor]:
        from inspect import signature

        return self._encode(texts, tokens, signature(type(self.pipe).__call__).parameters["complex_human_instruction"].default)

    def encode_negative(self, text: str, tokens: int) -> dict[str, Tensor]:
        return self._encode([text], tokens, None)

    def _encode(self, texts: Sequence[str], tokens: int, instruction: Any) -> dict[str, Tensor]:
        prompt, mask, _, _ = self.pipe.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=tokens, complex_human_instruction=instruction
        )
        return {"prompt": prompt, "mask": mask}

    def predict(self, x_RCHW: Tensor, time_R: Tensor, embeds: Embeds, guidance: float) -> Tensor:
        x, prompt = self._of_net(x_RCHW, embeds["prompt"])
        time = time_R.to(x.device, torch.float32) * 1000 * self.net.config.timestep_scale
        made = self.net(x, prompt, timestep=time, encoder_attention_mask=embeds["mask"], return_dict=False)[0]
        return made.chunk(2, 1)[0] if made.shape[1] == 2 * x.shape[1] else made  # a learned variance is not used

    def times(self, steps: int, shape: tuple[int, int, int]) -> Tensor:
        return self._flow_times(steps, shape[1] * shape[2], linear=False)

    def encode_image(self, pixels_RCHW: Tensor) -> Tensor:
        return self.pipe.vae.encode(pixels_RCHW * 2 - 1, return_dict=False)[0] * self.pipe.vae.config.scaling_factor


class QwenImage(Layout):
    """Qwen-Image: packed latents, Qwen2.5-VL as reader, guidance whose result keeps the conditional prediction's length token by token."""

    multiple = 2

    @property
    def channels(self) -> int:
        return int(self.net.config.in_channels) // 4

    def encode(self, texts: Sequence[str], tokens: int) -> dict[str, Tensor]:
        prompt, mask = self.pipe.encode_prompt(list(texts), max_sequence_length=tokens)
        if mask is None:
            mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
        missing = tokens - prompt.shape[1]  # one length for all, so that no row's shape depends on another
        return {"prompt": F.pad(prompt, (0, 0, 0, missing)), "mask": F.pad(mask, (0, missing))}

    def predict(self, x_RCHW: Tensor, time_R: Tensor, embeds: Embeds, guidance: float) -> Tensor:
        packed, prompt = self._of_net(pack(x_RCHW), embeds["prompt"])
        rows, columns = x_RCHW.shape[-2] // 2, x_RCHW.shape[-1] // 2
        velocity = self.net(
            packed,
            timestep=time_R.to(packed),
            encoder_hidden_states_mask=embeds["mask"],
            encoder_hidden_states=prompt,
            img_shapes=[[(1, rows, columns)]] * len(packed),
            return_dict=False,
        )[0]
        return unpack(velocity, rows)

    def guide(self, uncond: Tensor, cond: Tensor, weight: float) -> Tensor:
        aimed, plain = pack(super().guide(uncond, cond, weight)), pack(cond)
        aimed = aimed * (plain.norm(dim=-1, keepdim=True) / aimed.norm(dim=-1, keepdim=True))
        return unpack(aimed, cond.shape[-2] // 2)

    def times(self, steps: int, shape: tuple[int, int, int]) -> Tensor:
        return self._flow_times(steps, shape[1] * shape[2] // 4, linear=True)

    def decode(self, x_RCHW: Tensor) -> Tensor:
        mean, std = self._statistics(x_RCHW)
        return self._pixels(self.pipe.vae.decode((x_RCHW * std + mean)[:, :, None], return_dict=False)[0][:, :, 0])

    def encode_image(self, pixels_RCHW: Tensor) -> Tensor:
        z = self.pipe.vae.encode((pixels_RCHW * 2 - 1)[:, :, None]).latent_dist.mean[:, :, 0]
        mean, std = self._statistics(z)
        return (z - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.pipe.vae.config
        mean, std = (torch.tensor(values).to(like)[:, None, None] for values in (settings.latents_mean, settings.latents_std))
        return mean, std


def pack(x_RCHW: Tensor) -> Tensor:
    """Two by two latents as one token."""
    return rearrange(x_RCHW, "r c (h p) (w q) -> r (h w) (c p q)", p=2, q=2)


def unpack(x_RTE: Tensor, rows: int) -> Tensor:
    return rearrange(x_RTE, "r (h w) (c p q) -> r c (h p) (w q)", h=rows, p=2, q=2)


LAYOUTS: dict[str, type[Layout]] = {
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "StableDiffusionPipeline": StableDiffusion,
    "SanaPipeline": Sana,
    "QwenImagePipeline": QwenImage,
}
