"""What masked discrete families share: drawing, log-probabilities in any context of hidden tokens, and the masked loss.

Suffixes: B samples, R rows of a forward ([conditional; unconditional] when guided), L tokens of a row, N image tokens, K slots (some
of the N), V image codes, E model width. A row of `Prompts` is the whole sequence, its image tokens hidden by the mask token.
A family adds the row's layout and its attention: `_hidden`, `encode_prompts`, and the class attributes below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.models.layers import masked
from mmalign.models.layers.lanes import ROWS, lanes, padded_lengths
from mmalign.models.layers.linear import head_slice
from mmalign.models.layers.masked import HIDDEN, LogitsAt, Streams, first_slots, make_plan, random_masks, random_number
from mmalign.models.layers.noise import uniforms
from mmalign.trajectory import WHICH, Policy, Prompts, Supervision, TokenLosses, Trajectory, Which
from mmalign.types import UsageError

Pictures = Tensor | Sequence[Any] | None  # [B, 3, H, W] in [0, 1], or uint8 arrays [H, W, 3] (None where a row has no picture)


class MaskedImages:
    """A transformer that fills in hidden image tokens. Codes are the vocabulary's entries from `offset` on."""

    fades = True  # whether the noise of the order fades from step to step
    holds_last = True  # whether the last token waits for the last step
    pads_left = True  # on which side rows are padded
    net: Any
    head: Any  # the output layer
    vq: Any  # the image tokenizer: encode, decode, codes
    grid: tuple[int, int]  # rows and columns of image tokens
    offset: int
    mask_id: int
    pad_id: int
    steps: int  # where the policy names no schedule
    order_noise: float

    def _hidden(self, ids_RL: Tensor, mask_RL: Tensor) -> Tensor:
        """[R, L, E] last hidden states of rows to draw; those of padding mean nothing."""
        raise NotImplementedError

    def _hidden_after(self, given: Supervision, ids_RL: Tensor, mask_RL: Tensor) -> Tensor:
        """[R, L, E] as `_hidden`, of rows that stand behind visual hints."""
        raise UsageError(f"This model has no place for visual hints before a text ({type(self).__name__}). Train it without hints.")

    def question_row(self, text: str, codes: Any | None) -> list[int]:
        """Token ids of a question, with the codes of its picture if it has one, up to where the answer begins."""
        raise NotImplementedError

    def picture_codes(self, pictures: Sequence[Any]) -> list[Any]:
        """What `question_row` needs of pictures (tensors or uint8 arrays), one after the other."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def width(self) -> int | None:
        """Rows of a lane: fixed on the CPU, where results are bitwise independent of the batch; elsewhere the whole batch is one lane."""
        return ROWS if self.device.type == "cpu" else None

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def codes(self) -> int:
        return self.vq.codes

    # Drawing

    def schedule(self, steps: int) -> tuple[float, ...]:
        """The share of an image that is hidden after each of so many steps, for `Policy.hidden`."""
        return masked.cosine(steps)

    def completed(self, policy: Policy) -> Policy:
        """The policy with this model's own schedule and noise of the order where it names none. Trajectories record this one."""
        noise = self.order_noise if policy.order_noise is None else policy.order_noise
        return replace(policy, hidden=policy.hidden or self.schedule(self.steps), order_noise=noise)

    @torch.no_grad()
    def sample(self, prompts: Prompts, policy: Policy, seeds: Sequence[int]) -> Trajectory:
        """Draw one image per prompt; sample b depends on prompt b, its seed and the policy alone.

        `step_of` says when each token was decided, `log_prob` how probable its code was then (float32). The order is not scored.
        """
        if len(seeds) != len(prompts):
            raise UsageError(f"Each of the {len(prompts)} prompts needs its own seed; got {len(seeds)} seeds.")
        policy = self.completed(policy)
        assert policy.order_noise is not None
        tokens = int((prompts.ids[0] == self.mask_id).sum())
        plan = make_plan(tokens, policy.hidden, policy.order_noise, self.fades, self.holds_last)
        longest = torch.maximum(prompts.mask.sum(-1), prompts.uncond_mask.sum(-1)).tolist()
        codes = torch.empty(len(prompts), tokens, dtype=torch.long, device=self.device)
        step_of, log_prob = torch.empty_like(codes), torch.empty(codes.shape, device=self.device)
        for lane in lanes(padded_lengths(longest, self.width is not None), self.width):
            noise = Streams([seeds[row] for row in lane.rows], len(plan), tokens, self.device)
            logits_at = self._logits_at(self.to_width(prompts.select(lane.rows), lane.key), policy, "guided")
            if policy.order == "random":
                drawn = masked.emerge(logits_at, policy.hidden, noise, policy.temperature, self.width is not None)
            else:
                drawn = masked.decode(logits_at, len(lane.rows), plan, noise, policy.temperature, self.device)
            for whole, part in zip((codes, step_of, log_prob), (drawn.codes, drawn.step_of, drawn.log_prob), strict=True):
                whole[lane.real] = part[: lane.n_real]
        return Trajectory("masked", codes, log_prob, policy, tuple(seeds), step_of=step_of)

    def log_prob(self, prompts: Prompts, trajectory: Trajectory, which: Which = "guided", steps: Iterable[int] | None = None) -> Tensor:
        """[B, N] float32 log-probabilities, with gradients, of every code in the state that it was drawn from.

        One forward per step that decided something; `steps` names some of them, and codes of the others get 0. `guided` is the policy
        that was sampled from; `cond` scores the conditional branch alone; `guided_detach_uncond` has no gradient through the other.
        """
        assert trajectory.step_of is not None
        present = sorted(set(trajectory.step_of.unique().tolist()) & set(range(len(trajectory.policy.hidden)) if steps is None else steps))
        total = torch.zeros_like(trajectory.log_prob)
        for step in present:
            scored = trajectory.step_of == step
            total = total + self.log_prob_given(prompts, trajectory, trajectory.step_of >= step, scored, which)
        return total

    def log_prob_given(
        self, prompts: Prompts, trajectory: Trajectory, hidden_BN: Tensor, scored_BN: Tensor | None = None, which: Which = "guided"
    ) -> Tensor:
        """[B, N] float32 log-probabilities, with gradients, of the scored codes (all hidden ones by default) when `hidden_BN` is hidden.

        One forward; 0 where nothing is scored. The recorded trajectory, random masks and the fully hidden image are all contexts.
        """
        self._check(which)
        scored = hidden_BN if scored_BN is None else scored_BN
        if (scored & ~hidden_BN).any():
            raise UsageError("Only hidden tokens have log-probabilities in a masked model; some that are to be scored are visible.")
        codes, policy = trajectory.actions, trajectory.policy
        slots = first_slots(scored, int(scored.sum(1).max()))
        logits = self._logits_at(self.to_width(prompts), policy, which)(codes.masked_fill(hidden_BN, HIDDEN), slots)
        picked = (logits / policy.temperature).log_softmax(-1).gather(-1, codes.gather(1, slots)[..., None])[..., 0]
        return torch.zeros_like(trajectory.log_prob).scatter(1, slots, picked * scored.gather(1, slots))

    def log_prob_blank(self, prompts: Prompts, trajectory: Trajectory, scored_BN: Tensor | None = None, which: Which = "guided") -> Tensor:
        """[B, N] float32 log-probabilities, with gradients, of the scored codes (all by default) when the whole image is hidden.

        What the model says then depends on the prompt alone, so P prompts serve P * G trajectories, G in turn for each, with one forward of
        P rows. The output layer works on the places that any of a prompt's trajectories needs; elsewhere the result is 0.
        """
        self._check(which)
        if len(trajectory) % len(prompts):
            raise UsageError(f"{len(trajectory)} trajectories cannot be divided among {len(prompts)} prompts; each needs as many, in turn.")
        codes_PGN = trajectory.actions.unflatten(0, (len(prompts), -1))
        scored_PGN = torch.ones_like(codes_PGN, dtype=torch.bool) if scored_BN is None else scored_BN.view(codes_PGN.shape)
        wanted_PN = scored_PGN.any(1)
        slots_PK = first_slots(wanted_PN, int(wanted_PN.sum(1).max()))
        blank_PN = torch.full(wanted_PN.shape, HIDDEN, device=self.device)
        logits_PKV = self._logits_at(self.to_width(prompts), trajectory.policy, which)(blank_PN, slots_PK)
        slots_PGK = slots_PK[:, None].expand(-1, codes_PGN.shape[1], -1)
        drawn_PKG = codes_PGN.gather(2, slots_PGK).transpose(1, 2)
        picked_PGK = (logits_PKV / trajectory.policy.temperature).log_softmax(-1).gather(-1, drawn_PKG).transpose(1, 2)
        whole_PGN = torch.zeros_like(trajectory.log_prob).view(codes_PGN.shape)
        return whole_PGN.scatter(2, slots_PGK, picked_PGK * scored_PGN.gather(2, slots_PGK)).flatten(0, 1)

    def supervised_loss(
        self, prompts: Prompts, pixels_BCHW: Tensor, seeds: Sequence[int], blank_B: Tensor | None = None, given: Supervision | None = None
    ) -> Tensor:
        """[B] mean cross-entropy of hidden codes. Rows True in `blank_B` train the unconditional branch (guidance needs some)."""
        return self.token_losses(prompts, pixels_BCHW, seeds, blank_B, given).mean

    def token_losses(
        self, prompts: Prompts, pixels_BCHW: Tensor, seeds: Sequence[int], blank_B: Tensor | None = None, given: Supervision | None = None
    ) -> TokenLosses:
        """The cross-entropy of every hidden code: of those of `given`, or of codes hidden at random (number and places by the seed)."""
        given = given or Supervision()
        codes = self.encode_image(pixels_BCHW)
        hidden = random_masks(uniforms(seeds, codes.shape[1] + 1), codes.shape[1]) if given.hidden is None else given.hidden
        hidden = hidden.to(self.device)
        scored = hidden if given.scored is None else hidden & given.scored.to(self.device)
        prompts = self.to_width(prompts)
        if blank_B is not None:
            blank = blank_B.to(self.device)[:, None]
            ids, mask = torch.where(blank, prompts.uncond_ids, prompts.ids), torch.where(blank, prompts.uncond_mask, prompts.mask)
            prompts = replace(prompts, ids=ids, mask=mask)
        slots = first_slots(scored, int(scored.sum(1).max()))
        logits = self._branch(prompts.ids, prompts.mask, codes.masked_fill(hidden, HIDDEN), slots, given)
        target = codes.gather(1, slots)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(slots.shape)
        is_scored = scored.gather(1, slots)
        right = torch.zeros_like(scored).scatter(1, slots, (logits.argmax(-1) == target) & is_scored)
        return TokenLosses(torch.zeros(codes.shape, device=self.device).scatter(1, slots, loss * is_scored), scored, right)

    def hidden_number(self, seeds: Sequence[int]) -> Tensor:
        """int [B] how many tokens of each sample `token_losses` hides by itself."""
        return random_number(uniforms(seeds, 1)[:, 0], self.tokens)

    # Pixels, always in [0, 1]

    @torch.no_grad()
    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N] codes of pictures in [0, 1]."""
        return self.vq.encode(pixels_BCHW.to(self.device))

    def decode(self, codes_BN: Tensor) -> Tensor:
        """[B, 3, H, W] float32 pixels in [0, 1] of codes."""
        return self.vq.decode(codes_BN, self.grid).clamp(0, 1)

    # Inside

    def _check(self, which: str) -> None:
        if which not in WHICH:
            raise UsageError(f"There is no log-probability '{which}'; there are {', '.join(WHICH)}.")

    def _questions(self, texts: Sequence[str], pictures: Pictures) -> list[list[int]]:
        """Token ids of the questions, with the codes of their pictures."""
        given = [None] * len(texts) if pictures is None else list(pictures)
        if len(given) != len(texts):
            raise UsageError(f"Each of the {len(texts)} questions needs its own picture or None; got {len(given)} pictures.")
        present = [row for row, picture in enumerate(given) if picture is not None]
        codes = dict(zip(present, self.picture_codes([given[row] for row in present]), strict=True))
        return [self.question_row(text, codes.get(row)) for row, text in enumerate(texts)]

    def to_width(self, prompts: Prompts, width: int | None = None) -> Prompts:
        """The prompts with rows of one width (the longest of both branches, if None): cut where all is padding, or padded."""
        if width is None:
            width = int(torch.maximum(prompts.mask.sum(-1), prompts.uncond_mask.sum(-1)).max())
        sized: dict[str, Any] = {}
        for item in fields(prompts):
            if item.name.endswith(("ids", "mask")):
                tensor = getattr(prompts, item.name)
                space = width - tensor.shape[1]
                value = self.pad_id if item.name.endswith("ids") else False
                sized[item.name] = F.pad(tensor, (space, 0) if self.pads_left else (0, space), value=value)
        return replace(prompts, **sized)

    def _logits_at(self, prompts: Prompts, policy: Policy, which: Which) -> LogitsAt:
        """The function from codes and slots to guided logits; both branches go through one forward."""
        weight = policy.guidance
        is_alone = which == "cond" or weight == 1
        ids, mask = torch.cat([prompts.ids, prompts.uncond_ids]), torch.cat([prompts.mask, prompts.uncond_mask])

        def logits_at(codes_BN: Tensor, slots_BK: Tensor) -> Tensor:
            if is_alone:
                return self._branch(prompts.ids, prompts.mask, codes_BN, slots_BK)
            if which == "guided":
                cond, uncond = self._branch(ids, mask, codes_BN.repeat(2, 1), slots_BK.repeat(2, 1)).chunk(2)
            else:
                cond = self._branch(prompts.ids, prompts.mask, codes_BN, slots_BK)
                with torch.no_grad():
                    uncond = self._branch(prompts.uncond_ids, prompts.uncond_mask, codes_BN, slots_BK)
            return weight * cond - (weight - 1) * uncond

        return logits_at

    def _branch(self, ids_RL: Tensor, mask_RL: Tensor, codes_RN: Tensor, slots_RK: Tensor, given: Supervision | None = None) -> Tensor:
        """[R, K, V] float32 logits of the slots, given the codes that are not HIDDEN. The output layer works on nothing else."""
        places_RN = first_slots(ids_RL == self.mask_id, codes_RN.shape[1])
        tokens_RN = torch.where(codes_RN == HIDDEN, self.mask_id, codes_RN + self.offset)
        rows_RL = ids_RL.scatter(1, places_RN, tokens_RN)
        if given is None or given.hints is None:
            hidden_RLE = self._hidden(rows_RL, mask_RL)
        else:
            hidden_RLE = self._hidden_after(given, rows_RL, mask_RL)
        places_RK = places_RN.gather(1, slots_RK)
        picked_RKE = hidden_RLE.gather(1, places_RK[..., None].expand(-1, -1, hidden_RLE.shape[-1]))
        return head_slice(self.head, self.offset, self.offset + self.codes)(picked_RKE).float()
