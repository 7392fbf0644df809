"""The amortised head: three small convolutions that read credit off the scorer's own patch tokens, three evaluations for a picture.

Input: patch tokens of the joint space times the text feature. It learns online from the equations of fast_shap's mask bank, by squared
error on v(z) - v(1 - z) = (2z - 1) . phi, without any Shapley label; the sum is set to v(whole) - v(empty). Because it is learned it can
be wrong where pictures are new or where it was trained too long, so every step also measures it on pairs it never trains on
(`fidelity`), and it refuses to explain until that has reached a floor.

Legend: B pictures, C width of the joint space, P pairs, h w cells of the map, N = h * w.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from mmalign import distributed
from mmalign.attribution.fast_shap import mask_bank
from mmalign.attribution.game import Game, ends, values
from mmalign.attribution.maps import resize_bilinear
from mmalign.attribution.protocol import FeatureScorer
from mmalign.types import MmalignError


@dataclass(frozen=True)
class Amortised:
    """`pairs` per picture and step, of a bank of `bank` pairs of which the last `spare` are never trained on; `share` of a batch
    that a step plays; `floor`: the least fidelity with which the head explains."""

    pairs: int = 8
    bank: int = 64
    spare: int = 16
    share: float = 0.25
    width: int = 64
    learning_rate: float = 1e-3
    floor: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.spare < self.bank and 1 <= self.pairs <= self.bank - self.spare and 0 < self.share <= 1):
            raise ValueError("spare lies between 0 and bank, pairs fit into the rest of the bank, share is in (0, 1]")


class AmortisedHead:
    """The head, its optimiser and its running fidelity: correlation of predicted and measured spare pairs (nan before any step)."""

    def __init__(self, scorer: FeatureScorer, channels: int, config: Amortised = Amortised(), device: str = "cpu") -> None:
        self.scorer, self.config = scorer, config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.net = nn.Sequential(
                nn.Conv2d(2 * channels, config.width, 1),
                nn.GELU(),
                nn.Conv2d(config.width, config.width, 3, padding=1),
                nn.GELU(),
                nn.Conv2d(config.width, 1, 3, padding=1),
            ).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=config.learning_rate)
        self.memory = torch.tensor([0.0, torch.nan, torch.nan], dtype=torch.float64)  # steps done, scale, fidelity

    @property
    def scale(self) -> float:
        """Spread of the first answers, in which the head speaks; nan before any step."""
        return float(self.memory[1])

    @property
    def fidelity(self) -> float:
        return float(self.memory[2])

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as live tensors: to be saved, or filled."""
        parameters = dict(self.net.named_parameters())
        optimizer = {f"optimizer.{name}": value for name, value in distributed.optimizer_tensors(self.optimizer, parameters).items()}
        return {**{f"net.{name}": value.detach() for name, value in parameters.items()}, **optimizer, "memory": self.memory}

    def predict(self, game: Game) -> Tensor:
        """Credit [B, h, w] in units of the scale, before the sum is set; with graph."""
        with torch.no_grad():
            tokens = self.scorer.patch_tokens(game.pixels)
            text = self.scorer.text_features(game.prompts)[:, :, None, None]
            game.evaluations += 1
            seen = torch.cat([tokens * text * tokens.shape[1] ** 0.5, tokens * tokens.shape[1] ** 0.5], 1)
        return resize_bilinear(self.net(seen)[:, 0], *game.grid)

    def step(self, game: Game) -> dict[str, float]:
        """Plays a random share of the pictures on a few trained and a few spare pairs; one optimiser step. Returns loss and fidelity."""
        number = max(1, round(self.config.share * game.count))
        generator = torch.Generator().manual_seed(self.config.seed + int(self.memory[0]))
        chosen = torch.randperm(game.count, generator=generator)[:number].sort().values.to(game.device)
        part = game.part(chosen)
        trained = self.config.bank - self.config.spare
        pick = torch.cat(
            [
                torch.randperm(trained, generator=generator)[: self.config.pairs],
                trained + torch.randperm(self.config.spare, generator=generator)[: max(2, self.config.pairs // 4)],
            ]
        )
        bank = mask_bank(game.grid, self.config.bank, self.config.seed)[pick].to(game.device)
        found = values(part, torch.cat([bank, ~bank]))
        answers = (found[:, : len(bank)] - found[:, len(bank) :]).float()
        if self.scale != self.scale:
            self.memory[1] = float(answers.std().clamp(min=1e-12))
        signs = rearrange(bank, "p h w -> p (h w)").float() * 2 - 1
        with torch.enable_grad():
            said = self.predict(part).flatten(1) @ signs.T
            loss = ((said - answers / self.scale)[:, : self.config.pairs] ** 2).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.optimizer.step()
        self.memory[0] += 1
        game.evaluations += part.evaluations * number / game.count
        self._watch(said[:, self.config.pairs :].detach(), answers[:, self.config.pairs :])
        return {"loss": float(loss.detach()), "fidelity": self.fidelity}

    def _watch(self, said: Tensor, answers: Tensor) -> None:
        pair = torch.stack([said.flatten(), answers.flatten()])
        now = float(torch.corrcoef(pair)[0, 1].nan_to_num())
        self.memory[2] = now if self.fidelity != self.fidelity else 0.9 * self.fidelity + 0.1 * now

    def explain(self, game: Game) -> Tensor:
        """Credit [B, h, w], float64, whose sum is v(whole) - v(empty); three evaluations for a picture."""
        if not self.fidelity >= self.config.floor:
            raise MmalignError(
                f"The amortised head's fidelity on spare pairs is {self.fidelity:.2f}, below its floor of {self.config.floor}. "
                "Train it longer with step(), lower the floor, or use fast_shap."
            )
        full, empty = ends(game)
        with torch.no_grad():
            credit = self.predict(game).double() * self.scale
        short = full - empty - credit.sum((1, 2))
        return credit + (short / (game.grid[0] * game.grid[1]))[:, None, None]
