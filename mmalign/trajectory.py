"""What a sampler and a trainer exchange: encoded prompts, the policy that was sampled from, and the record of what it decided.

These stand left of the model families and of the trainers' mathematics, because both need them and neither may import the other.
Shapes: B prompts, L prompt tokens, N image tokens, K denoising steps, S decisions (N or K), C h w latent channels and sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal

from mmalign.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from mmalign.sde import Noise

Kind = Literal["ar", "masked", "flow", "mar"]
Which = Literal["cond", "guided", "guided_detach_uncond"]
WHICH: tuple[Which, ...] = ("cond", "guided", "guided_detach_uncond")


@dataclass(frozen=True)
class Policy:
    """The distribution that `sample` draws from and `log_prob` scores. Nothing else may bend it: no top-k, no top-p, no min-p.

    `guidance` w mixes the conditional and unconditional predictions, u + w (c - u); 1 is the conditional model alone. `temperature`
    divides the mixed logits. Families with denoising steps have no temperature but `levels`, one for each step: how much noise it adds by
    the rule `noise` of `mmalign.sde`; a level of 0 is a deterministic step, and deterministic steps alone are the ODE sampler.
    Masked families decide tokens in steps: `hidden` is the share that stays hidden after each, `order_noise` scales the noise that says
    which ones; empty and None mean the model's own. With `order` "random" chance alone says in which step a token is decided, so that
    `hidden` is what stays hidden on average (MaskGRPO's sampler). The order is part of how they draw, but of no log-probability.
    """

    guidance: float = 5.0
    temperature: float = 1.0
    noise: Noise = "flow"
    levels: tuple[float, ...] = ()
    hidden: tuple[float, ...] = ()
    order_noise: float | None = None
    order: Literal["surest", "random"] = "surest"

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise UsageError(f"The guidance must be a finite number; got {self.guidance}. 5 is usual, 1 turns it off.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UsageError(f"The temperature of a policy must be positive, or it has no log-probabilities; got {self.temperature}.")
        if not all(math.isfinite(level) and level >= 0 for level in self.levels):
            raise UsageError(f"Noise levels are finite and not negative; got {self.levels}.")


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts with their unconditional twins, padded the family's own way; masks are True at real tokens.

    `embeds` holds what diffusion families compute from the text once (detached), each with B rows.
    """

    texts: tuple[str, ...]
    ids: Tensor  # int [B, L]
    mask: Tensor  # bool [B, L]
    uncond_ids: Tensor  # int [B, Lu]
    uncond_mask: Tensor  # bool [B, Lu]
    embeds: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: list[int]) -> Prompts:
        """The prompts of these rows, in this order; a row may be repeated (a group of samples of one prompt)."""
        tensors = {item.name: getattr(self, item.name)[rows] for item in fields(self) if item.name not in ("texts", "embeds")}
        return Prompts(
            texts=tuple(self.texts[row] for row in rows), embeds={name: value[rows] for name, value in self.embeds.items()}, **tensors
        )


@dataclass(frozen=True)
class Trajectory:
    """Everything needed to score a sample again without drawing it again.

    kind    actions                             step_of              times
    ar      codes int [B, N]                    None (0 .. N-1)      None
    masked  final codes int [B, N]              int [B, N]           None
    flow    states after each step [B,K,C,h,w]  None                 before and after each step [K, 2]
    mar     token latents [B, N, C]             int [B, N]           inner denoising states

    `log_prob` [B, S] float32 is the behaviour policy's, as the sampler saw it; ratios use `log_prob()` of the model instead, because
    a cached sampling pass and a training forward differ in low precision. A flow's `states` are those before each step, float32, and its
    times are sigmas (alpha-bars for models that predict noise); a deterministic step is no decision and has log-probability 0.
    `predictions` are the guided predictions at `states`, kept for completions.
    """

    kind: Kind
    actions: Tensor
    log_prob: Tensor
    policy: Policy
    seeds: tuple[int, ...]
    states: Tensor | None = None
    step_of: Tensor | None = None
    times: Tensor | None = None
    predictions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.actions)

    def select(self, rows: list[int]) -> Trajectory:
        """The trajectories of these rows, in this order."""
        by_row = ("actions", "log_prob", "states", "step_of", "predictions")
        changes = {name: value[rows] for name in by_row if (value := getattr(self, name)) is not None}
        if self.kind == "mar" and self.times is not None:
            changes["times"] = self.times[rows]
        return replace(self, seeds=tuple(self.seeds[row] for row in rows), **changes)


@dataclass(frozen=True)
class TextTrajectory:
    """Sampled texts: the decoded strings, their token ids [B, L] (right-padded), the mask of real tokens, log-probs [B, L].

    The end token is part of the ids when the model wrote it; a text that hit the limit has none. Padding has log-probability 0.
    """

    texts: tuple[str, ...]
    ids: Tensor
    mask: Tensor
    log_prob: Tensor
    temperature: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Embedding:
    """Last hidden states [B, L, E] of question-formatted rows, and which slots are real, of the text, of the picture (bool [B, L])."""

    hidden: Tensor
    mask: Tensor
    is_text: Tensor
    is_image: Tensor


@dataclass(frozen=True)
class TextTokens:
    """One text before the transformer: features [L, E] of its tokens without special ones, and each token as text."""

    features: Tensor
    words: tuple[str, ...]


@dataclass(frozen=True)
class Supervision:
    """What a supervised step shows and asks. What is None is the family's own: tokens hidden at random, all of them scored, no hints.

    Hints are features as `image_features` gives them, put before the text. A family that hides no tokens takes hints alone.
    """

    hidden: Tensor | None = None  # bool [B, N] image tokens that are hidden
    scored: Tensor | None = None  # bool [B, N] those of the hidden ones that the loss counts
    hints: Tensor | None = None  # [B, K, E]
    hinted: Tensor | None = None  # bool [B], which samples get their hints; None: all


@dataclass(frozen=True)
class TokenLosses:
    """A family's training loss token by token: [B, N] with gradients, 0 where not scored; which are scored; whether the most probable
    code of each scored one is the right one (None where there are no codes)."""

    loss: Tensor
    scored: Tensor
    right: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """[B] the loss of each sample."""
        return self.loss.sum(1) / self.scored.sum(1)
