"""What autoregressive families share: codes drawn one by one and their log-probabilities in one forward, beside text (`_causal_text`).

Suffixes: B samples, N image tokens, V image codes, P prompt slots, R rows of a forward. A family says how its ids become hidden states,
what codes follow them (`code_logits`, `code_writer`), and how prompts, questions and pictures become ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.models._causal_codes import CodeWriter, guide, to_slots
from mmalign.models._causal_text import CausalText, pick
from mmalign.models.layers.cached import Cache
from mmalign.models.layers.lanes import WIDE, Lane, Lanes, padded_lengths
from mmalign.models.layers.linear import can_pack
from mmalign.models.layers.noise import uniforms
from mmalign.trajectory import WHICH, Policy, Prompts, Trajectory, Which
from mmalign.types import UsageError


class Causal(CausalText):
    """A causal trunk that reads text and pictures and writes text and image codes. Prompts are padded on the left."""

    def __init__(self, net: Any, trunk: Any, chat: Any) -> None:
        super().__init__(net, trunk, chat)
        self.lanes = Lanes()
        self.kept: dict[tuple, Cache] = {}  # a small model's last cache of codes: fresh memory costs a thirtieth of the drawing

    # What a family adds

    def n_codes(self, prompts: Prompts) -> int:
        """Image tokens of each of these prompts' pictures."""
        raise NotImplementedError

    def code_writer(self, n_samples: int, is_guided: bool) -> CodeWriter:
        raise NotImplementedError

    def code_logits(self, ids_RP: Tensor, mask_RP: Tensor, codes_RN: Tensor) -> Tensor:
        """[R, N, V] float32 logits of every code given the prompt and the codes before it."""
        raise NotImplementedError

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N] codes of pictures in [0, 1]."""
        raise NotImplementedError

    def log_probs(self, logits: Tensor, policy: Policy, taken: Tensor | None = None) -> Tensor:
        """Log-probabilities of all codes under a policy, along the last axis; `taken` are codes that were drawn by it."""
        return (logits / policy.temperature).log_softmax(-1)

    # Drawing

    @torch.no_grad()
    def sample(self, prompts: Prompts, policy: Policy, seeds: Sequence[int]) -> Trajectory:
        """Draw one image per prompt; sample b depends on prompt b, its seed and the policy alone. Behaviour log-probs are float32."""
        if len(seeds) != len(prompts):
            raise UsageError(f"Each of the {len(prompts)} prompts needs its own seed; got {len(seeds)} seeds.")
        number = self.n_codes(prompts)
        noise_BN = uniforms(seeds, number).to(self.device)
        slots = padded_lengths(prompts.mask.sum(-1).tolist(), self.width is not None)
        codes_BN = torch.empty(len(prompts), number, dtype=torch.long, device=self.device)
        log_prob_BN = torch.empty(len(prompts), number, dtype=torch.float32, device=self.device)
        is_guided, writers = policy.guidance != 1, {}

        def write(lane: Lane) -> tuple[Tensor, Tensor]:
            n_rows = len(lane.rows)
            if n_rows not in writers:
                writers[n_rows] = self.code_writer(n_rows, is_guided)
            return writers[n_rows].write(prompts.select(lane.rows), lane.key[0], policy, noise_BN[lane.rows])

        work = (is_guided, number, torch.get_num_threads(), torch.is_autocast_enabled(self.device.type))
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
            logits = self.code_logits(prompts.ids, prompts.mask, codes)
        elif which == "guided":
            ids, mask = (torch.cat(pair) for pair in _branches(prompts, self.chat.pad))
            logits = guide(self.code_logits(ids, mask, codes.repeat(2, 1)), policy.guidance)
        else:
            with torch.no_grad():
                uncond = self.code_logits(prompts.uncond_ids, prompts.uncond_mask, codes)
            cond = self.code_logits(prompts.ids, prompts.mask, codes)
            logits = uncond + policy.guidance * (cond - uncond)
        return self.log_probs(logits, policy, codes).gather(-1, codes[..., None])[..., 0]

    def supervised_loss(self, prompts: Prompts, pixels_BCHW: Tensor, blank_B: Tensor | None = None) -> Tensor:
        """[B] mean cross-entropy of the pictures' codes. Rows True in `blank_B` train the unconditional branch (guidance needs some)."""
        codes = self.encode_image(pixels_BCHW)
        ids, mask = prompts.ids, prompts.mask
        if blank_B is not None:
            blank = blank_B.to(self.device)[:, None]
            ids, mask = (torch.where(blank, uncond, cond) for cond, uncond in _branches(prompts, self.chat.pad))
        return -pick(self.code_logits(ids, mask, codes), codes).mean(-1)


def _branches(prompts: Prompts, pad: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """ids and masks, each of the conditional and the unconditional branch, padded on the left to one length."""
    slots = max(prompts.ids.shape[1], prompts.uncond_ids.shape[1])
    ids = to_slots(prompts.ids, slots, pad), to_slots(prompts.uncond_ids, slots, pad)
    return ids, (to_slots(prompts.mask, slots, False), to_slots(prompts.uncond_mask, slots, False))
