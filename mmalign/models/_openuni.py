"""The loaded OpenUni: prompts to SANA's condition, drawing, learning from pictures, reading and writing.

Suffixes: B samples, L prompt tokens, Q queries, E width, H W latent sides, C latent channels, K hints, R rows of a forward.
Source: wusize/OpenUni at d1703fc (src/models/openuni/internvl3_sana_hf.py, written anew). InternVL3 reads the prompt and the queries behind
it; the queries' last states go through a connector and a projection to SANA, which is sampled by flow matching. Changed: padding takes no
position and is never seen; noise comes from one stream per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign import images
from mmalign.models._causal_text import CausalText
from mmalign.models._diffusion import UNCOND, Diffusion, Scored
from mmalign.models._diffusion_layouts import Embeds, Layout
from mmalign.models._harmon_text import fit_drawing
from mmalign.models._openuni_layout import OpenUniNet
from mmalign.models.layers.cached import CachedTrunk, Prefix
from mmalign.models.layers.hints import behind_hints, causal, with_hints
from mmalign.models.layers.lanes import lanes, padded_lengths
from mmalign.models.layers.noise import normals, numbers, streams
from mmalign.models.layers.qwen_chat import QwenChat
from mmalign.models.layers.rows import pad_left, pad_right
from mmalign.trajectory import Policy, Prompts, Supervision, TextTokens, TokenLosses, Trajectory, Which
from mmalign.types import UsageError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TIMES = 1000
# InternVL3's own system turn, which it speaks when it answers and OpenUni leaves out when it draws.
SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"


class OpenUniText(QwenChat):
    """InternVL3's tokenizer with OpenUni's turns."""

    frames = ("<img>", "</img>", "<IMG_CONTEXT>")

    def __init__(self, folder: Path, slots: int) -> None:
        super().__init__(folder)
        self.slots = slots
        self.begin, self.end, self.image = (self.id_of(token) for token in self.frames)

    def drawing(self, text: str) -> list[int]:
        """Token ids of a prompt to draw."""
        return [*self.encode(self.turn(f"Generate an image: {self.clean(text)}")), self.begin]

    def blank(self) -> list[int]:
        """Token ids of the unconditional twin."""
        return [*self.encode(self.turn("Generate an image.")), self.begin]

    def question(self, text: str, pictured: bool) -> list[int]:
        """Token ids of a question up to where the answer begins; one picture comes before the text."""
        if not pictured:
            return self.encode(self.turn(self.clean(text), SYSTEM))
        before, after = self.turn(f"<img>\n{self.clean(text)}", SYSTEM).split("<img>")
        return [*self.encode(before), self.begin, *[self.image] * self.slots, self.end, *self.encode(after)]


class Sana(Layout):
    """SANA and DC-AE seen through the calls that sampling needs; the condition is made from queries, not here."""

    def __init__(self, net: OpenUniNet, vae: Any, schedule: dict[str, Any]) -> None:
        from diffusers import DPMSolverMultistepScheduler

        self.net, self.vae, self.sana = net, vae, net.transformer
        self.pipe = SimpleNamespace(scheduler=DPMSolverMultistepScheduler.from_config(schedule))

    @property
    def scale(self) -> int:
        return 2 ** (len(self.vae.config.encoder_block_out_channels) - 1)

    @property
    def channels(self) -> int:
        return int(self.sana.config.in_channels)

    @property
    def multiple(self) -> int:  # type: ignore[override]
        return int(self.sana.config.patch_size)

    @property
    def size(self) -> tuple[int, int]:
        side = self.sana.config.sample_size * self.scale
        return side, side

    def predict(self, x_RCHW: Tensor, time_R: Tensor, embeds: Embeds, guidance: float) -> Tensor:
        x, condition = x_RCHW.to(self.sana.dtype), embeds["prompt"].to(self.sana.dtype)
        time = time_R.to(x.device, torch.float32) * TIMES * self.sana.config.timestep_scale
        return self.sana(x, encoder_hidden_states=condition, timestep=time, return_dict=False)[0]

    def times(self, steps: int, shape: tuple[int, int, int]) -> Tensor:
        self.pipe.scheduler.set_timesteps(steps)
        sigmas = self.pipe.scheduler.sigmas.double().cpu()
        return torch.stack([sigmas[:-1], sigmas[1:]], 1)

    def decode(self, x_RCHW: Tensor) -> Tensor:
        return self._pixels(self.vae.decode(x_RCHW / self.vae.config.scaling_factor, return_dict=False)[0])

    def encode_image(self, pixels_RCHW: Tensor) -> Tensor:
        return self.vae.encode(pixels_RCHW.float() * 2 - 1).latent * self.vae.config.scaling_factor


class OpenUni(CausalText, Diffusion):
    """An OpenUni of any size. InternVL3 stays as it is; queries, connector (with projection) and SANA learn."""

    net: OpenUniNet
    chat: OpenUniText
    layout: Sana

    def __init__(self, net: OpenUniNet, chat: OpenUniText, layout: Sana, shift: float) -> None:
        CausalText.__init__(self, net, net.lmm.model.language_model, chat)
        self.layout, self.shift = layout, shift
        net.lmm.requires_grad_(False)
        self.trainable = {
            "queries": net.queries,
            "connector": nn.ModuleList([net.connector, net.projector]),
            "transformer": net.transformer,
        }

    @property
    def size(self) -> tuple[int, int]:
        return self.layout.size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the latents of its own size."""
        _, rows, columns = self.layout.shape(self.size)
        return rows, columns

    def shard_units(self) -> list[nn.Module]:
        """The modules that are called directly, inner ones first: what FSDP2 must gather one by one. InternVL3 and queries stay whole."""
        return [*self.net.connector.layers, self.net.projector, *self.net.transformer.transformer_blocks, self.net.transformer]

    # Drawing

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str], images: None = None) -> Prompts:  # type: ignore[override]
        """Prompts to draw, left-padded, with their unconditional twins and what SANA reads of both."""
        if images is not None:
            raise UsageError(
                "OpenUni does not edit pictures here: encode_prompts takes texts alone. Ask about pictures with generate_text."
            )
        rows, blank = [self.chat.drawing(text) for text in texts], self.chat.blank()
        width = max(map(len, [*rows, blank]))
        padded = (pad_left(part, self.chat.pad, width) for part in (rows, [blank] * len(rows)))
        (ids, mask), (blank_ids, blank_mask) = ((ids.to(self.device), mask.to(self.device)) for ids, mask in padded)
        return self._conditioned(Prompts(tuple(texts), ids, mask, blank_ids, blank_mask))

    @torch.no_grad()
    def draw(self, prompts: Prompts, policy: Policy, seeds: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """[B, C, H, W] final latents, each of its prompt and seed alone. Without noise the official solver, DPM-Solver++ of second order,
        takes the steps; with noise the steps are those of `sample`."""
        if any(policy.levels):
            return super().draw(prompts, policy, seeds, size)
        rows, shape = self._lanes(self._check(prompts, policy, seeds)), self.layout.shape(size or self.size)
        made = []
        for lane in rows:
            noise = normals(streams([seeds[row] for row in lane.rows]), *shape).to(self.device)
            made.append(self.solve(noise, prompts.select(lane.rows), len(policy.levels), policy.guidance)[: lane.n_real])
        return torch.cat(made)

    def solve(self, noise_BCHW: Tensor, prompts: Prompts, steps: int, guidance: float) -> Tensor:
        """The latents that the official solver makes of noise."""
        solver = type(self.layout.pipe.scheduler).from_config(self.layout.pipe.scheduler.config)
        solver.set_timesteps(steps, device=self.device)
        x = noise_BCHW
        for time in solver.timesteps:
            now = torch.full((len(x),), float(time) / TIMES, dtype=torch.float64)
            x = solver.step(self._predict(x, now, prompts, guidance, "guided"), time, x, return_dict=False)[0]
        return x

    def score(self, prompts: Prompts, trajectory: Trajectory, rows: Sequence[int], steps: Sequence[int], which: Which) -> Scored:
        """As for every flow model, with the condition made anew: queries and connector take gradients too."""
        return super().score(self._conditioned(prompts), trajectory, rows, steps, which)

    # Learning from pictures

    def supervised_loss(
        self, prompts: Prompts, pixels_BCHW: Tensor, seeds: Sequence[int], blank_B: Tensor | None = None, given: Supervision | None = None
    ) -> Tensor:
        """[B] flow-matching loss. Rows True in `blank_B` train the unconditional branch (guidance needs some)."""
        return self.token_losses(prompts, pixels_BCHW, seeds, blank_B, given).mean

    def token_losses(
        self, prompts: Prompts, pixels_BCHW: Tensor, seeds: Sequence[int], blank_B: Tensor | None = None, given: Supervision | None = None
    ) -> TokenLosses:
        """The loss of every latent place, at one of the 1000 shifted times of the schedule, drawn evenly by the sample's seed. A flow hides
        nothing, so of `given` it takes hints alone."""
        given = given or Supervision()
        if given.hidden is not None or given.scored is not None:
            raise UsageError("OpenUni hides no tokens of a picture, so none can be chosen. Give hints alone.")
        clean, sources = self.encode_image(pixels_BCHW), streams(seeds)
        share = (numbers(sources, 1)[:, 0].mul(TIMES).floor() + 1) / TIMES
        sigma = (self.shift * share / (1 + (self.shift - 1) * share)).float().to(self.device)
        noise = normals(sources, *clean.shape[1:]).to(self.device)
        ids, mask = prompts.ids, prompts.mask
        if blank_B is not None:
            blank = blank_B.to(self.device)[:, None]
            ids, mask = torch.where(blank, prompts.uncond_ids, ids), torch.where(blank, prompts.uncond_mask, mask)
        loss = self.flow_loss(clean, noise, sigma, self.condition(ids, mask, given)).flatten(1)
        return TokenLosses(loss, torch.ones_like(loss, dtype=torch.bool))

    def hidden_number(self, seeds: Sequence[int]) -> None:
        """None: a flow hides no tokens."""

    def flow_loss(self, clean_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor, condition_BQE: Tensor) -> Tensor:
        """[B, H, W] squared error of the velocity, the mean over channels."""
        at = sigma_B[:, None, None, None]
        noised = (1 - at) * clean_BCHW + at * noise_BCHW
        velocity = self.layout.predict(noised, sigma_B, {"prompt": condition_BQE}, 1.0).float()
        return ((velocity - (noise_BCHW - clean_BCHW)) ** 2).mean(1)

    def condition(self, ids_BL: Tensor, mask_BL: Tensor, given: Supervision | None = None) -> Tensor:
        """[B, Q, E'] what SANA reads of prompts, behind visual hints if there are any."""
        return self.net.projector(self.net.connector(inputs_embeds=self.query_states(ids_BL, mask_BL, given)).last_hidden_state)

    def query_states(self, ids_BL: Tensor, mask_BL: Tensor, given: Supervision | None = None) -> Tensor:
        """[B, Q, E] last hidden states of the queries."""
        queries = self.net.queries.weight.expand(len(ids_BL), -1, -1)
        embeds = torch.cat([self.net.get_input_embeddings()(ids_BL), queries], 1)
        mask = F.pad(mask_BL, (0, queries.shape[1]), value=True)
        if given is None or given.hints is None:
            return self._read(embeds, mask, causal(mask))[:, -queries.shape[1] :]
        layout = behind_hints(mask, ids_BL.shape[1], given.hints.shape[1], given.hinted)
        embeds, mask = with_hints(given.hints, given.hinted, embeds, mask)
        return self._read(embeds, mask, layout)[:, -queries.shape[1] :]

    # Pixels, always in [0, 1]

    def fit(self, pictures: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] pixels in [0, 1] of uint8 pictures of any size, cut to the model's own."""
        return fit_drawing(pictures, self.size)

    def image_features(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N, E] what InternVL3 reads of pictures, which are brought to its size. Differentiable in the pixels."""
        side = tuple(self.net.lmm.config.vision_config.image_size)
        x = pixels_BCHW.to(self.device)
        if x.shape[-2:] != side:
            x = images.resize_tensor(x, side, "bicubic", antialias=True).clamp(0, 1)
        return self.net.lmm.model.get_image_features(images.normalise(x, *IMAGENET).to(self.net.queries.weight.dtype)).pooler_output

    def text_features(self, texts: Sequence[str]) -> list[TextTokens]:
        """The tokens of each text as they enter the language model, without special ones."""
        rows = [self.chat.plain(text) for text in texts]
        ids, mask = (tensor.to(self.device) for tensor in pad_right(rows, self.chat.pad))
        features = self.net.get_input_embeddings()(ids)
        return [TextTokens(features[row][mask[row]], self.chat.words(ids)) for row, ids in enumerate(rows)]

    # Reading and writing text

    def questions(self, texts: Sequence[str], images: Sequence[Any]) -> tuple[list[list[int]], list[Tensor | None]]:
        side = tuple(self.net.lmm.config.vision_config.image_size)
        pixels = [image if image is None or isinstance(image, Tensor) else _squashed(image, side) for image in images]
        return [self.chat.question(text, image is not None) for text, image in zip(texts, pixels, strict=True)], pixels

    def prefill(self, trunk: CachedTrunk, ids_RP: Tensor, mask_RP: Tensor, pictures: Sequence[Tensor | None]) -> Prefix:
        return trunk.prefill(self._embed(ids_RP, pictures), mask_RP)

    def states(self, ids_RP: Tensor, mask: Tensor, pictures: Sequence[Tensor | None], tail_RL: Tensor) -> Tensor:
        return self._read(torch.cat([self._embed(ids_RP, pictures), self.net.get_input_embeddings()(tail_RL)], 1), mask, causal(mask))

    def is_picture(self, ids: Tensor) -> Tensor:
        return ids == self.chat.image

    # Inside

    def _conditioned(self, prompts: Prompts) -> Prompts:
        """The prompts with SANA's condition of both branches, as the networks are now."""
        longest = torch.maximum(prompts.mask.sum(-1), prompts.uncond_mask.sum(-1)).tolist()
        found: dict[str, list[Any]] = {"prompt": [None] * len(prompts), UNCOND + "prompt": [None] * len(prompts)}
        for lane in lanes(padded_lengths(longest, self.width is not None), self.width):
            part = prompts.select(lane.rows)
            for name, ids, mask in (("prompt", part.ids, part.mask), (UNCOND + "prompt", part.uncond_ids, part.uncond_mask)):
                space = lane.key - ids.shape[1]
                made = self.condition(F.pad(ids, (space, 0), value=self.chat.pad), F.pad(mask, (space, 0), value=False))
                for row, value in zip(lane.real, made, strict=False):
                    found[name][row] = value
        return replace(prompts, embeds={name: torch.stack(values) for name, values in found.items()})

    def _read(self, embeds_RLE: Tensor, mask_RL: Tensor, layout_RLL: Tensor) -> Tensor:
        """Last hidden states of a whole sequence. Padding takes no position."""
        position = (mask_RL.long().cumsum(-1) - 1).clamp(min=0)
        found = self.trunk(inputs_embeds=embeds_RLE, attention_mask=layout_RLL[:, None], position_ids=position, use_cache=False)
        return found.last_hidden_state

    def _embed(self, ids_RP: Tensor, pixels: Sequence[Tensor | None]) -> Tensor:
        """Input embeddings; placeholders are replaced by the features of their row's picture."""
        embeds = self.net.get_input_embeddings()(ids_RP)
        present = [picture for picture in pixels if picture is not None]
        if not present:
            return embeds
        return embeds.masked_scatter((ids_RP == self.chat.image)[..., None], self.image_features(torch.stack(present)).to(embeds.dtype))


def _squashed(picture: Any, size: tuple[int, int]) -> Tensor:
    """[3, H, W] in [0, 1] of a uint8 picture to ask about: one tile of InternVL3, whatever the picture's shape."""
    return images.to_tensor(images.resize(images.check_image(picture), size, "pil-bicubic"))[0]
