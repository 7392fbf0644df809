"""The loaded Janus: prompts, sampling, log-probabilities, losses and pixels (shapes and rules: docs of `mmalign.trajectory`).

Suffixes: B samples, L text tokens, N image tokens, V image codes, E model width, P prompt slots, R rows of a forward.
Source: deepseek-ai/Janus at 1daa72f (generation_inference.py, modeling_vlm.py). Changed: padding is masked out and takes no positions;
noise comes from one stream per sample; the image tokenizer's codes are chosen by cosine as the original does and transformers does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.models._janus_codes import CodeWriter, guide
from mmalign.models._janus_text import ChatFormat, Pixels
from mmalign.models.layers.cached import Cache, CachedTrunk
from mmalign.models.layers.lanes import ROWS, WIDE, Lane, Lanes, lanes, padded_lengths
from mmalign.models.layers.linear import can_pack
from mmalign.models.layers.noise import draw, uniforms
from mmalign.trajectory import WHICH, Embedding, Policy, Prompts, TextTrajectory, Trajectory, Which
from mmalign.types import MmalignError, UsageError

GROWTH = 64  # slots by which a text's cache grows
Pictures = Tensor | Sequence[Any] | None  # [B, 3, S, S] in [0, 1], or uint8 arrays [H, W, 3] (None where a row has no picture)


class Janus:
    """A Janus or Janus-Pro of any size: a causal trunk that reads text and pictures and writes text and image codes."""

    def __init__(self, net: Any, chat: ChatFormat, pixels: Pixels) -> None:
        self.net, self.chat, self.pixels, self.lanes = net, chat, pixels, Lanes()
        self.kept: dict[tuple, Cache] = {}  # a small model's last cache of codes: fresh memory costs a thirtieth of the drawing
        self.trunk = net.model.language_model
        grid = net.config.vision_config.image_size // net.config.vision_config.patch_size
        self.grid = (grid, grid)
        self.tokens = grid * grid
        self.codes = net.config.vq_config.num_embeddings
        self.size = (net.config.vision_config.image_size,) * 2
        self.trainable = {
            "language": self.trunk,
            "text_head": net.lm_head,
            "image_head": net.model.generation_head,
            "image_input": nn.ModuleList([net.model.generation_embeddings, net.model.generation_aligner]),
            "vision": nn.ModuleList([net.model.vision_model, net.model.aligner]),
        }

    @property
    def device(self) -> torch.device:
        return self.net.lm_head.weight.device

    def shard_units(self) -> list[nn.Module]:
        """The modules that are called directly, inner ones first: what FSDP2 must gather one by one. Vision and VQ stay whole."""
        heads = [self.net.lm_head, self.net.model.generation_head, self.net.model.generation_embeddings, self.net.model.generation_aligner]
        return [*self.trunk.layers, self.net.get_input_embeddings(), *heads, self.trunk]

    @property
    def width(self) -> int | None:
        """Rows of a lane: fixed on the CPU, where results are bitwise independent of the batch; elsewhere the whole batch is one lane."""
        return ROWS if self.device.type == "cpu" else None

    # Drawing

    def encode_prompts(self, texts: Sequence[str], images: None = None, reasoning: Sequence[str] | None = None) -> Prompts:
        """Prompts to draw, left-padded, with their unconditional twins. `reasoning` gives T2I-R1's second stage, "{text}. {reasoning}"."""
        if images is not None:
            raise UsageError("Janus cannot draw from a picture: encode_prompts takes texts alone. Ask about pictures with generate_text.")
        thoughts = [None] * len(texts) if reasoning is None else reasoning
        rows = [self.chat.drawing(text, thought) for text, thought in zip(texts, thoughts, strict=True)]
        ids, mask = (tensor.to(self.device) for tensor in self.chat.pad_left(rows))
        return Prompts(tuple(texts), ids, mask, self.chat.blank(ids), mask)

    @torch.no_grad()
    def sample(self, prompts: Prompts, policy: Policy, seeds: Sequence[int]) -> Trajectory:
        """Draw one image per prompt; sample b depends on prompt b, its seed and the policy alone. Behaviour log-probs are float32."""
        if len(seeds) != len(prompts):
            raise UsageError(f"Each of the {len(prompts)} prompts needs its own seed; got {len(seeds)} seeds.")
        noise_BN = uniforms(seeds, self.tokens).to(self.device)
        slots = padded_lengths(prompts.mask.sum(-1).tolist(), self.width is not None)
        codes_BN = torch.empty(len(prompts), self.tokens, dtype=torch.long, device=self.device)
        log_prob_BN = torch.empty(len(prompts), self.tokens, dtype=torch.float32, device=self.device)
        is_guided, writers = policy.guidance != 1, {}

        def write(lane: Lane) -> tuple[Tensor, Tensor]:
            n_rows = len(lane.rows)
            if n_rows not in writers:
                writers[n_rows] = CodeWriter(self, n_rows, is_guided)
            return writers[n_rows].write(prompts.select(lane.rows), lane.key[0], policy, noise_BN[lane.rows])

        work = (is_guided, torch.get_num_threads(), torch.is_autocast_enabled(self.device.type))
        wide = WIDE if can_pack(self.trunk) else None  # a large model's cache would not fit
        for lane, (codes, log_prob) in self.lanes.run([(slot, *work) for slot in slots], self.width, wide, write):
            codes_BN[lane.real], log_prob_BN[lane.real] = codes[: lane.n_real], log_prob[: lane.n_real]
        return Trajectory("ar", codes_BN, log_prob_BN, policy, tuple(seeds))

    def log_prob(self, prompts: Prompts, trajectory: Trajectory, which: Which = "guided") -> Tensor:
        """[B, N] float32 log-probabilities of the codes, with gradients, in one teacher-forced forward.

        `guided` is the policy that was sampled from; `cond` scores the conditional branch alone (what T2I-R1 does: half the cost, another
        policy than the sampler's); `guided_detach_uncond` is guided with no gradient through the unconditional branch.
        """
        if which not in WHICH:
            raise UsageError(f"There is no log-probability '{which}'; there are {', '.join(WHICH)}.")
        codes, policy = trajectory.actions, trajectory.policy
        if which == "cond" or policy.guidance == 1:
            logits = self._code_logits(prompts.ids, prompts.mask, codes)
        elif which == "guided" and prompts.ids.shape == prompts.uncond_ids.shape:
            ids, mask = torch.cat([prompts.ids, prompts.uncond_ids]), torch.cat([prompts.mask, prompts.uncond_mask])
            logits = guide(self._code_logits(ids, mask, codes.repeat(2, 1)), policy.guidance)
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and which == "guided"):
                uncond = self._code_logits(prompts.uncond_ids, prompts.uncond_mask, codes)
            cond = self._code_logits(prompts.ids, prompts.mask, codes)
            logits = uncond + policy.guidance * (cond - uncond)
        return _pick(logits / policy.temperature, codes)

    def supervised_loss(self, prompts: Prompts, pixels_BCHW: Tensor, blank_B: Tensor | None = None) -> Tensor:
        """[B] mean cross-entropy of the pictures' codes. Rows True in `blank_B` train the unconditional branch (guidance needs some)."""
        codes = self.encode_image(pixels_BCHW)
        ids, mask = prompts.ids, prompts.mask
        if blank_B is not None:
            ids = torch.where(blank_B.to(self.device)[:, None], prompts.uncond_ids, ids)
        return -_pick(self._code_logits(ids, mask, codes), codes).mean(-1)

    # Reading and writing text

    @torch.no_grad()
    def generate_text(
        self, texts: Sequence[str], images: Pictures, seeds: Sequence[int], temperature: float = 1.0, max_tokens: int = 512
    ) -> TextTrajectory:
        """Answers to questions, or reasoning about prompts (images=None), with ids for `text_tokens_log_prob`. Temperature 0 is greedy.

        Each text depends on its own question, picture and seed alone. Greedy log-probs are those of temperature 1.
        """
        if temperature < 0 or max_tokens < 1:
            raise UsageError(f"Text needs a temperature >= 0 and at least one token; got {temperature} and {max_tokens}.")
        rows, pixels = self._questions(texts, images)
        noise_BL = uniforms(seeds, max_tokens).to(self.device)
        slots = padded_lengths([len(row) for row in rows], self.width is not None)
        keys = [(slot, picture is not None) for slot, picture in zip(slots, pixels, strict=True)]
        ids = torch.full((len(rows), max_tokens), self.chat.pad, device=self.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        log_prob = torch.zeros(ids.shape, dtype=torch.float32, device=self.device)
        trunk = CachedTrunk(self.trunk, self.width or len(rows))
        for lane in lanes(keys, self.width):
            prompt, real = (tensor.to(self.device) for tensor in self.chat.pad_left([rows[row] for row in lane.rows], lane.key[0]))
            embeds = self._embed(prompt, [pixels[row] for row in lane.rows])
            written = self._write_text(trunk, embeds, real, noise_BL[lane.rows], temperature)
            for whole, part in zip((ids, mask, log_prob), written, strict=True):
                whole[lane.real, : part.shape[1]] = part[: lane.n_real]
        longest = int(mask.sum(-1).max()) if len(rows) else 0
        ids, mask, log_prob = ids[:, :longest], mask[:, :longest], log_prob[:, :longest]
        answers = tuple(self.chat.decode(row[real].tolist()) for row, real in zip(ids, mask, strict=True))
        return TextTrajectory(answers, ids, mask, log_prob, temperature, tuple(seeds))

    def text_log_prob(self, texts: Sequence[str], images: Pictures, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log-probs [B, L] (float32, with gradients) of each answer's tokens and of its end, and the mask of real ones; 0 elsewhere."""
        ids, mask = (tensor.to(self.device) for tensor in self.chat.pad_right([self.chat.answer(answer) for answer in answers]))
        return self.text_tokens_log_prob(texts, images, ids, mask), mask

    def text_tokens_log_prob(self, texts: Sequence[str], images: Pictures, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
        """[B, L] log-probs of given token ids after the questions, in one forward; 0 where the mask is False."""
        rows, pixels = self._questions(texts, images)
        prompt, real = (tensor.to(self.device) for tensor in self.chat.pad_left(rows))
        embeds = torch.cat([self._embed(prompt, pixels), self.net.get_input_embeddings()(ids[:, :-1])], 1)
        hidden = self._hidden(embeds, torch.cat([real, mask[:, :-1]], 1))[:, prompt.shape[1] - 1 :]
        return _pick(self.net.lm_head(hidden).float() / (temperature or 1.0), ids) * mask

    def embed(self, texts: Sequence[str], images: Pictures = None) -> Embedding:
        """Last hidden states of question-formatted texts with their pictures, for grounding maps; picture slots are in raster order."""
        rows, pixels = self._questions(texts, images)
        ids, mask = (tensor.to(self.device) for tensor in self.chat.pad_left(rows))
        is_image = ids == self.chat.image
        special = torch.tensor(self.chat.tokenizer.all_special_ids, device=self.device)
        return Embedding(self._hidden(self._embed(ids, pixels), mask), mask, mask & ~is_image & ~torch.isin(ids, special), is_image)

    # Pixels, always in [0, 1]

    def image_features(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N, E] what the trunk reads of pictures: the vision tower's tokens after the aligner. Differentiable in the pixels."""
        if pixels_BCHW.shape[-2:] != self.size:
            raise MmalignError(
                f"The vision tower reads {self.size[0]} x {self.size[1]} pixels; got {list(pixels_BCHW.shape)}. "
                "Give uint8 arrays, which are fitted, or resize the tensor."
            )
        x = self.pixels.normalise(pixels_BCHW.to(self.device)).to(self.net.lm_head.weight.dtype)
        return self.net.model.get_image_features(x).pooler_output

    @torch.no_grad()
    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N] codes of pictures: the nearest code by cosine. (transformers' own encode leaves out the normalisation and differs.)"""
        vq = self.net.model.vqmodel
        x = pixels_BCHW.to(self.device, vq.quant_conv.weight.dtype) * 2 - 1
        z_BNC = vq.quant_conv(vq.encoder(x)).flatten(2).mT
        return (F.normalize(z_BNC, dim=-1) @ F.normalize(vq.quantize.embedding.weight, dim=-1).T).argmax(-1)

    def decode(self, codes_BN: Tensor) -> Tensor:
        """[B, 3, H, W] float32 pixels in [0, 1] of codes."""
        return ((self.net.model.vqmodel.decode(codes_BN).float() + 1) / 2).clamp(0, 1)

    def fit(self, images: Sequence[Any]) -> Tensor:
        """[B, 3, S, S] pixels in [0, 1] of uint8 pictures of any size: the long side fitted, the rest padded with the mean colour."""
        return torch.stack([self.pixels.fit(image) for image in images])

    # Inside

    def _hidden(self, embeds_RPE: Tensor, mask_RP: Tensor) -> Tensor:
        """Last hidden states of a whole sequence. Padding takes no position."""
        position = (mask_RP.long().cumsum(-1) - 1).clamp(min=0)
        return self.trunk(inputs_embeds=embeds_RPE, attention_mask=mask_RP.long(), position_ids=position, use_cache=False).last_hidden_state

    def _code_logits(self, ids_RP: Tensor, mask_RP: Tensor, codes_RN: Tensor) -> Tensor:
        """[R, N, V] float32 logits of every code given the prompt and the codes before it."""
        embeds = self.net.get_input_embeddings()(ids_RP)
        embeds = torch.cat([embeds, self.net.prepare_embeddings_for_image_generation(codes_RN[:, :-1])], 1)
        mask = F.pad(mask_RP, (0, codes_RN.shape[1] - 1), value=True)
        return self.net.model.generation_head(self._hidden(embeds, mask)[:, ids_RP.shape[1] - 1 :]).float()

    def _questions(self, texts: Sequence[str], images: Pictures) -> tuple[list[list[int]], list[Tensor | None]]:
        """Token ids of the questions and each one's pixels [3, S, S], or None for one without a picture."""
        given = [None] * len(texts) if images is None else list(images)
        if len(given) != len(texts):
            raise UsageError(f"Each of the {len(texts)} questions needs its own picture or None; got {len(given)} pictures.")
        pixels = [image if image is None or isinstance(image, Tensor) else self.pixels.fit(image) for image in given]
        rows = [self.chat.question(text, picture is not None) for text, picture in zip(texts, pixels, strict=True)]
        return rows, pixels

    def _embed(self, ids_RP: Tensor, pixels: Sequence[Tensor | None]) -> Tensor:
        """Input embeddings; placeholders are replaced by the features of their row's picture."""
        embeds = self.net.get_input_embeddings()(ids_RP)
        present = [picture.to(self.device) for picture in pixels if picture is not None]
        if not present:
            return embeds
        features = self.image_features(torch.stack(present)).to(embeds.dtype)
        return embeds.masked_scatter((ids_RP == self.chat.image)[..., None], features)

    def _write_text(
        self, trunk: CachedTrunk, embeds_RPE: Tensor, mask_RP: Tensor, noise_RL: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ids, mask and log-probs of one lane's texts, until every row has ended or the noise is used up."""
        rows, limit = noise_RL.shape
        prefix = trunk.prefill(embeds_RPE, mask_RP)
        cache = Cache(prefix, rows, min(GROWTH, limit), block=GROWTH)
        hidden = cache.begin(prefix, torch.arange(rows, device=self.device))
        is_open = torch.ones(rows, dtype=torch.bool, device=self.device)
        ids, masks, log_probs = [], [], []
        for index in range(limit):
            log_prob_RV = (self.net.lm_head(hidden).float() / (temperature or 1.0)).log_softmax(-1)
            token = draw(log_prob_RV, noise_RL[:, index]) if temperature else log_prob_RV.argmax(-1)
            token = torch.where(is_open, token, self.chat.pad)
            ids.append(token)
            masks.append(is_open)
            log_probs.append(log_prob_RV.gather(-1, token[:, None])[:, 0] * is_open)
            is_open = is_open & (token != self.chat.eos)
            if not is_open.any() or index == limit - 1:
                break
            if cache.is_full:
                cache.widen(GROWTH)
            hidden = trunk.step(self.net.get_input_embeddings()(token), cache)
        return torch.stack(ids, 1), torch.stack(masks, 1), torch.stack(log_probs, 1)


def _pick(logits: Tensor, index: Tensor) -> Tensor:
    """Log-softmax at the index along the last axis."""
    return logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]
