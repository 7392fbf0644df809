"""The loaded Harmon: prompts, drawing with a record, its log-probabilities, learning from pictures, and what it reads of them.

Suffixes: B samples, L text tokens, N image tokens, C channels, K slots, T MAR tokens (buffer and visible), E width, R rows.
Source: wusize/Harmon at 4eb6087 (src/models/harmon.py, written anew). A MAR encodes the visible tokens, Qwen2.5 refines them behind the
prompt (causally: image tokens first, the buffer last), the MAR decodes a condition for every token, a small diffusion draws hidden ones.
Changed: padding takes no position and is never seen; rows may differ in their visible tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from mmalign.models._causal_text import CausalText
from mmalign.models._harmon_draw import Condition, Noise, Streams, cosine, denoise, hidden_after, score, steps_of
from mmalign.models._harmon_text import HarmonText, fit_drawing, fit_reading
from mmalign.models.layers import token_diffusion
from mmalign.models.layers.cached import CachedTrunk, Prefix
from mmalign.models.layers.hints import behind_hints, causal, with_hints
from mmalign.models.layers.kl import KlAutoencoder
from mmalign.models.layers.lanes import lanes, padded_lengths
from mmalign.models.layers.mar import Mar, Seen
from mmalign.models.layers.masked import first_slots
from mmalign.models.layers.noise import normals, numbers, streams, uniforms
from mmalign.models.layers.rows import pad_left, pad_right
from mmalign.models.layers.token_diffusion import Schedule
from mmalign.trajectory import WHICH, Policy, Prompts, Supervision, TextTokens, TokenLosses, Trajectory, Which
from mmalign.types import MmalignError, UsageError

# The share of tokens hidden in training: a normal distribution around 1, cut at 0.7 and 1 (MAR). And times of each token in a step.
LEAST_HIDDEN, SPREAD = 0.7, 0.25
TIMES_PER_TOKEN = 4


class HarmonNet(nn.Module):
    """The parts that learn, under the names of the checkpoint."""

    def __init__(self, llm: Any, mar: Mar, proj_in: nn.Module, proj_out: nn.Module) -> None:
        super().__init__()
        self.llm, self.mar, self.proj_in, self.proj_out = llm, mar, proj_in, proj_out

    @property
    def lm_head(self) -> nn.Module:
        return self.llm.lm_head

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def gradient_checkpointing_enable(self, options: dict[str, Any] | None = None) -> None:
        self.llm.gradient_checkpointing_enable(options)


class Harmon(CausalText):
    """A Harmon of any size. `scale` multiplies the image coder's latents; `size` in pixels is what it draws and reads by itself."""

    net: HarmonNet
    chat: HarmonText

    def __init__(self, net: HarmonNet, chat: HarmonText, vae: KlAutoencoder, scale: float, size: tuple[int, int], inner_steps: int) -> None:
        super().__init__(net, net.llm.model, chat)
        self.mar, self.vae, self.scale, self.size, self.inner_steps = net.mar, vae, scale, size, inner_steps
        self.steps = 64
        self.trainable = {
            "language": net.llm.model,
            "text_head": net.llm.lm_head,
            "mar": net.mar,
            "projections": nn.ModuleList([net.proj_in, net.proj_out]),
        }

    def shard_units(self) -> list[nn.Module]:
        """The modules that are called directly, inner ones first: what FSDP2 must gather one by one. A tied head goes with the trunk."""
        mar = [*self.mar.encoder_blocks, *self.mar.decoder_blocks, self.mar.denoiser, self.mar]
        heads = [] if self.is_tied else [self.net.get_input_embeddings(), self.net.lm_head]
        return [*mar, self.net.proj_in, self.net.proj_out, *self.trunk.layers, *heads, self.net.llm if self.is_tied else self.trunk]

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the input embedding."""
        return self.net.lm_head.weight is self.net.get_input_embeddings().weight

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens of a picture of its own size."""
        return self.grid_of(self.size)

    @property
    def tokens(self) -> int:
        """Image tokens of a picture of its own size."""
        return math.prod(self.grid)

    def grid_of(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of image tokens; UsageError when the size cannot be drawn."""
        stride = self.vae.stride
        if any(side < stride or side % stride for side in size):
            raise UsageError(f"Harmon draws sizes that are multiples of {stride}; got {size[0]} x {size[1]} pixels.")
        return size[0] // stride, size[1] // stride

    # Drawing

    def encode_prompts(self, texts: Sequence[str], images: None = None) -> Prompts:
        """Prompts to draw, left-padded, with their unconditional twins."""
        if images is not None:
            raise UsageError("Harmon cannot draw from a picture: encode_prompts takes texts alone. Ask about pictures with generate_text.")
        rows, blank = [self.chat.drawing(text) for text in texts], self.chat.blank()
        width = max(map(len, [*rows, blank]))
        padded = (pad_left(part, self.chat.pad, width) for part in (rows, [blank] * len(rows)))
        (ids, mask), (blank_ids, blank_mask) = ((ids.to(self.device), mask.to(self.device)) for ids, mask in padded)
        return Prompts(tuple(texts), ids, mask, blank_ids, blank_mask)

    def completed(self, policy: Policy) -> Policy:
        """The policy with this model's own steps where it names none: `hidden` of the outer, `levels` of the inner ones (1: as trained)."""
        return replace(policy, hidden=policy.hidden or cosine(self.steps), levels=policy.levels or (1.0,) * self.inner_steps)

    @torch.no_grad()
    def sample(self, prompts: Prompts, policy: Policy, seeds: Sequence[int], size: tuple[int, int] | None = None) -> Trajectory:
        """Draw one picture per prompt; sample b depends on prompt b, its seed and the policy alone.

        Actions are tokens [B, N, C], `step_of` says when each was decided (at random; the order is not scored), `times` holds the inner
        states [B, N, J + 1, C], `log_prob` [B, N] the mean log-density of a token's inner steps, per channel (float32).
        """
        if len(seeds) != len(prompts):
            raise UsageError(f"Each of the {len(prompts)} prompts needs its own seed; got {len(seeds)} seeds.")
        policy, grid = self.completed(policy), self.grid_of(size or self.size)
        longest = torch.maximum(prompts.mask.sum(-1), prompts.uncond_mask.sum(-1)).tolist()
        found: list[Any] = [None] * len(prompts)
        for lane in lanes(padded_lengths(longest, self.width is not None), self.width):
            noise = Streams([seeds[row] for row in lane.rows], self.device)
            made = self.draw(_cut(prompts.select(lane.rows), lane.key, self.chat.pad), policy, noise, grid)
            for index, row in enumerate(lane.real):
                found[row] = [part[index] for part in made]
        step_of, states, log_prob = (torch.stack(parts) for parts in zip(*found, strict=True))
        return Trajectory("mar", states[:, :, -1], log_prob, policy, tuple(seeds), step_of=step_of, times=states)

    def draw(self, prompts: Prompts, policy: Policy, noise: Noise, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Steps [B, N], inner states [B, N, J + 1, C] and log-probabilities [B, N] of one lane, whose shapes follow from the policy."""
        samples, n_tokens, channels = len(prompts), grid[0] * grid[1], self.mar.sizes.channels
        levels, schedule = self._levels(policy), Schedule(len(policy.levels))
        counts = hidden_after(n_tokens, policy.hidden)
        step_of = steps_of(noise.order(n_tokens), counts)
        states = torch.zeros(samples, n_tokens, len(levels) + 1, channels, device=self.device)
        log_prob = torch.zeros(samples, n_tokens, device=self.device)
        for step, (before, after) in enumerate(zip([n_tokens, *counts], counts, strict=False)):
            if before == after:
                continue
            slots = first_slots(step_of == step, before - after)
            condition = self._condition(prompts, states[:, :, -1], step_of >= step, slots, grid, policy, "guided")
            shape = (samples, before - after, channels)
            made, value = denoise(self.mar.denoiser, schedule, condition, noise, shape, levels)
            states = states.scatter(1, slots[:, :, None, None].expand(-1, -1, *made.shape[2:]), made)
            log_prob = log_prob.scatter(1, slots, value)
        return step_of, states, log_prob

    def log_prob(
        self,
        prompts: Prompts,
        trajectory: Trajectory,
        which: Which = "guided",
        steps: Iterable[int] | None = None,
        inner: Sequence[int] | None = None,
    ) -> Tensor:
        """[B, N] float32 log-probabilities, with gradients, of every token in the state that it was drawn from.

        One forward per outer step; `steps` names some of them, and tokens of the others get 0. `inner` names some of the inner steps: the
        mean over them estimates the mean over all without bias when they are chosen at random. `guided` is the policy that was sampled
        from; `cond` scores the conditional branch alone; `guided_detach_uncond` has no gradient through the other.
        """
        assert trajectory.step_of is not None and trajectory.times is not None
        if which not in WHICH:
            raise UsageError(f"There is no log-probability '{which}'; there are {', '.join(WHICH)}.")
        policy, step_of = trajectory.policy, trajectory.step_of
        levels, schedule = self._levels(policy), Schedule(len(policy.levels))
        drawing = token_diffusion.decision_steps(levels)
        if inner is not None and not set(inner) <= set(drawing):
            raise UsageError(f"Only the inner steps {drawing} draw anything; got {list(inner)}.")
        chosen = drawing if inner is None else list(inner)
        total = torch.zeros_like(trajectory.log_prob)
        grid = _square(trajectory.actions)
        for step in sorted(set(step_of.unique().tolist()) & set(range(len(policy.hidden)) if steps is None else steps)):
            slots = first_slots(step_of == step, int((step_of == step).sum(1).max()))
            condition = self._condition(prompts, trajectory.actions, step_of >= step, slots, grid, policy, which)
            states = trajectory.times.gather(1, slots[:, :, None, None].expand(-1, -1, *trajectory.times.shape[2:])).flatten(0, 1)
            if chosen:
                value = score(self.mar.denoiser, schedule, condition, states, levels, chosen)
                total = total.scatter(1, slots, value.view(slots.shape))
        return total

    # Learning from pictures

    def supervised_loss(
        self, prompts: Prompts, pixels_BCHW: Tensor, seeds: Sequence[int], blank_B: Tensor | None = None, given: Supervision | None = None
    ) -> Tensor:
        """[B] mean diffusion loss of hidden tokens. Rows True in `blank_B` train the unconditional branch (guidance needs some)."""
        return self.token_losses(prompts, pixels_BCHW, seeds, blank_B, given).mean

    def token_losses(
        self, prompts: Prompts, pixels_BCHW: Tensor, seeds: Sequence[int], blank_B: Tensor | None = None, given: Supervision | None = None
    ) -> TokenLosses:
        """The diffusion loss of every hidden token, a mean over a few times and noises of its own: of the tokens of `given`, or of tokens
        hidden at random. Their number, places, times and noises are those of the sample's seed."""
        given = given or Supervision()
        tokens, grid = self.encode_image(pixels_BCHW), self.grid_of(pixels_BCHW.shape[-2:])
        n_tokens, sources = tokens.shape[1], streams(seeds)
        rank = numbers(sources, n_tokens + 1)[:, 1:].argsort(1).argsort(1)  # the first number is that of `hidden_number`
        time = numbers(sources, TIMES_PER_TOKEN, n_tokens).mul(token_diffusion.TIMES).long()
        noise = normals(sources, TIMES_PER_TOKEN, n_tokens, tokens.shape[-1])
        hidden = rank < self.hidden_number(seeds, n_tokens)[:, None] if given.hidden is None else given.hidden
        hidden = hidden.to(self.device)
        scored = hidden if given.scored is None else hidden & given.scored.to(self.device)
        slots = first_slots(scored, int(scored.sum(1).max()))
        ids, mask = prompts.ids, prompts.mask
        if blank_B is not None:
            blank = blank_B.to(self.device)[:, None]
            ids, mask = torch.where(blank, prompts.uncond_ids, ids), torch.where(blank, prompts.uncond_mask, mask)
        z = self._picked(self._conditions(ids, mask, tokens, hidden, grid, given), slots)
        clean = tokens.gather(1, slots[..., None].expand(-1, -1, tokens.shape[-1]))
        losses = []
        for index in range(TIMES_PER_TOKEN):
            at = time[:, index].to(self.device).gather(1, slots)
            eps = noise[:, index].to(self.device).gather(1, slots[..., None].expand_as(clean))
            flat = (part.flatten(0, 1) for part in (clean, z, at, eps))
            losses.append(token_diffusion.loss(self.mar.denoiser, Schedule(), *flat))
        each = torch.stack(losses).mean(0).view(slots.shape) * scored.gather(1, slots)
        return TokenLosses(torch.zeros(hidden.shape, device=self.device).scatter(1, slots, each), scored)

    def hidden_number(self, seeds: Sequence[int], n_tokens: int | None = None) -> Tensor:
        """int [B] how many tokens of each sample `token_losses` hides by itself."""
        low, high = ndtr((LEAST_HIDDEN - 1) / SPREAD), ndtr(0.0)
        share = 1 + SPREAD * ndtri(low + uniforms(seeds, 1)[:, 0].numpy() * (high - low))
        return torch.from_numpy(share).mul(n_tokens or self.tokens).ceil().long()

    # Pixels, always in [0, 1]

    @torch.no_grad()
    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N, C] tokens of pictures in raster order: the mode of the image coder."""
        self.grid_of(pixels_BCHW.shape[-2:])
        return self.vae.encode(pixels_BCHW.to(self.device)).flatten(2).mT * self.scale

    def decode(self, tokens_BNC: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """[B, 3, H, W] float32 pixels in [0, 1] of tokens; a square one without a size."""
        grid = _square(tokens_BNC) if size is None else self.grid_of(size)
        return self.vae.decode((tokens_BNC / self.scale).mT.unflatten(2, grid)).clamp(0, 1)

    def fit(self, pictures: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] pixels in [0, 1] of uint8 pictures of any size, cut to the model's own."""
        return fit_drawing(pictures, self.size)

    def image_features(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N, E] what the language model reads of pictures, in raster order, without the buffer. Differentiable in the weights alone."""
        return self._reading(pixels_BCHW)[:, : -self.mar.sizes.buffer]

    def text_features(self, texts: Sequence[str]) -> list[TextTokens]:
        """The tokens of each text as they enter the language model, without special ones."""
        rows = [self.chat.plain(text) for text in texts]
        ids, mask = (tensor.to(self.device) for tensor in pad_right(rows, self.chat.pad))
        features = self.net.get_input_embeddings()(ids)
        return [TextTokens(features[row][mask[row]], self.chat.words(ids)) for row, ids in enumerate(rows)]

    # Reading and writing text

    def questions(self, texts: Sequence[str], images: Sequence[Any]) -> tuple[list[list[int]], list[Tensor | None]]:
        pixels = [image if image is None or isinstance(image, Tensor) else fit_reading(image, self.size) for image in images]
        slots = [0 if image is None else math.prod(self.grid_of(image.shape[-2:])) + self.mar.sizes.buffer for image in pixels]
        return [self.chat.question(text, count) for text, count in zip(texts, slots, strict=True)], pixels

    def prefill(self, trunk: CachedTrunk, ids_RP: Tensor, mask_RP: Tensor, pictures: Sequence[Tensor | None]) -> Prefix:
        return trunk.prefill(self._embed(ids_RP, pictures), mask_RP)

    def states(self, ids_RP: Tensor, mask: Tensor, pictures: Sequence[Tensor | None], tail_RL: Tensor) -> Tensor:
        embeds = torch.cat([self._embed(ids_RP, pictures), self.net.get_input_embeddings()(tail_RL)], 1)
        return self._read(embeds, mask, causal(mask))

    def is_picture(self, ids: Tensor) -> Tensor:
        """Where ids stand for image tokens; the buffer behind them is no part of the picture."""
        is_slot = ids == self.chat.image
        left = is_slot.flip(1).cumsum(1).flip(1)
        return is_slot & (left > self.mar.sizes.buffer)

    # Inside

    def _levels(self, policy: Policy) -> list[float]:
        return [policy.temperature * level for level in policy.levels]

    def _condition(
        self, prompts: Prompts, tokens_BNC: Tensor, hidden_BN: Tensor, slots_BK: Tensor, grid: tuple[int, int], policy: Policy, which: Which
    ) -> Condition:
        """What the denoiser reads of the slots' tokens, both branches in one forward unless only one of them takes a gradient."""
        ids, mask = torch.cat([prompts.ids, prompts.uncond_ids]), torch.cat([prompts.mask, prompts.uncond_mask])

        def picked(ids: Tensor, mask: Tensor, times: int) -> Tensor:
            z = self._conditions(ids, mask, tokens_BNC.repeat(times, 1, 1), hidden_BN.repeat(times, 1), grid)
            return self._picked(z, slots_BK.repeat(times, 1)).flatten(0, 1)

        if which == "cond" or policy.guidance == 1:
            return Condition(picked(prompts.ids, prompts.mask, 1), None)
        if which == "guided":
            cond, uncond = picked(ids, mask, 2).chunk(2)
            return Condition(cond, uncond, policy.guidance)
        with torch.no_grad():
            uncond = picked(prompts.uncond_ids, prompts.uncond_mask, 1)
        return Condition(picked(prompts.ids, prompts.mask, 1), uncond, policy.guidance, detaches=True)

    @staticmethod
    def _picked(z_BNE: Tensor, slots_BK: Tensor) -> Tensor:
        return z_BNE.gather(1, slots_BK[..., None].expand(-1, -1, z_BNE.shape[-1]))

    def _conditions(
        self,
        ids_BL: Tensor,
        mask_BL: Tensor,
        tokens_BNC: Tensor,
        hidden_BN: Tensor,
        grid: tuple[int, int],
        given: Supervision | None = None,
    ) -> Tensor:
        """[B, N, E'] conditions of all tokens, given the prompt, the visible tokens and, if any, visual hints before the text."""
        seen = Seen.where(~hidden_BN, grid)
        return self.mar("decode", self._refined(ids_BL, mask_BL, self.mar("encode", tokens_BNC, seen), seen, given), seen)

    def _refined(self, ids_BL: Tensor, mask_BL: Tensor, encoded_BTE: Tensor, seen: Seen, given: Supervision | None = None) -> Tensor:
        """[B, T, E] the encoder's features with what the language model makes of them added."""
        buffer, slots = self.mar.sizes.buffer, encoded_BTE.shape[1]
        embeds = torch.cat([self.net.get_input_embeddings()(ids_BL), self._buffer_last(self.net.proj_in(encoded_BTE))], 1)
        is_image = mask_BL.new_ones(len(mask_BL), slots - buffer) if seen.is_real is None else seen.is_real
        mask = F.pad(torch.cat([mask_BL, is_image], 1), (0, buffer), value=True)
        if given is None or given.hints is None:
            hidden = self._read(embeds, mask, causal(mask))
        else:
            layout = behind_hints(mask, ids_BL.shape[1], given.hints.shape[1], given.hinted)
            embeds, mask = with_hints(given.hints, given.hinted, embeds, mask)
            hidden = self._read(embeds, mask, layout)
        image, tail = hidden[:, -slots:].split([slots - buffer, buffer], 1)
        return encoded_BTE + self.net.proj_out(torch.cat([tail, image], 1))

    def _read(self, embeds_RLE: Tensor, mask_RL: Tensor, layout_RLL: Tensor) -> Tensor:
        """Last hidden states of a whole sequence. Padding takes no position."""
        position = (mask_RL.long().cumsum(-1) - 1).clamp(min=0)
        found = self.trunk(inputs_embeds=embeds_RLE, attention_mask=layout_RLL[:, None], position_ids=position, use_cache=False)
        return found.last_hidden_state

    def _buffer_last(self, x_BTE: Tensor) -> Tensor:
        return x_BTE.roll(-self.mar.sizes.buffer, 1)

    def _reading(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N + buffer, E] what the language model reads of pictures: all of the image, then the buffer."""
        tokens = self.encode_image(pixels_BCHW)
        seen = Seen.where(tokens.new_ones(tokens.shape[:2], dtype=torch.bool), self.grid_of(pixels_BCHW.shape[-2:]))
        return self._buffer_last(self.net.proj_in(self.mar("encode", tokens, seen)))

    def _embed(self, ids_RP: Tensor, pixels: Sequence[Tensor | None]) -> Tensor:
        """Input embeddings; placeholders are replaced by the features of their row's picture."""
        is_slot = ids_RP == self.chat.image
        embeds = self.net.get_input_embeddings()(ids_RP.masked_fill(is_slot, self.chat.pad))
        present = [picture for picture in pixels if picture is not None]
        if not present:
            return embeds
        if len({picture.shape for picture in present}) > 1:
            raise MmalignError("Pictures of one call must have one size. Give uint8 arrays, which are fitted, or resize the tensors.")
        return embeds.masked_scatter(is_slot[..., None], self._reading(torch.stack(present)).to(embeds.dtype))


def _square(tokens_BNC: Tensor) -> tuple[int, int]:
    """The grid of so many tokens, where nothing else tells it."""
    side = round(tokens_BNC.shape[1] ** 0.5)
    if side * side != tokens_BNC.shape[1]:
        raise UsageError(
            f"{tokens_BNC.shape[1]} tokens are no square. Log-probabilities, and decode without a size, are of square pictures."
        )
    return side, side


def _cut(prompts: Prompts, width: int, pad: int) -> Prompts:
    """The prompts with rows of one width: cut where all is padding, or padded."""
    space = width - prompts.ids.shape[1]
    ids, uncond_ids = (F.pad(part, (space, 0), value=pad) for part in (prompts.ids, prompts.uncond_ids))
    mask, uncond_mask = (F.pad(part, (space, 0), value=False) for part in (prompts.mask, prompts.uncond_mask))
    return replace(prompts, ids=ids, mask=mask, uncond_ids=uncond_ids, uncond_mask=uncond_mask)
