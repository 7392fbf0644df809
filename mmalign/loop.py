"""What every trainer shares: optimiser, LoRA, EMA, exact resume, figures, pictures, the held-out panel. No method lives here.

A step depends on (seed, step) and the weights alone: prompts, sampling seeds and masks are drawn from both, never from state that
accumulates. So a run that was killed continues from its last state exactly as if nothing had happened, and looking at a run (pictures,
panel, trackers) changes nothing in it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmalign import config as configs
from mmalign import distributed, history
from mmalign.trackers import Tracker
from mmalign.types import MmalignError, Prompt, UsageError, digest

KEPT_STATES = 2
OBSERVING = ("image_every", "tracker")  # options that look at a run and change nothing in it: a run continues under others
Pictures = list[tuple[Any, str]]  # uint8 [H, W, 3] and a caption


@dataclass(frozen=True)
class LoopConfig:
    """Options that every trainer has; a trainer's Config extends it and sets the paper's values."""

    steps: int = 100
    seed: int = 0
    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    grad_norm: float = 1.0
    warmup: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    micro_batch: int = 32  # samples in one forward and backward; changes memory and speed, never the result's meaning
    lora_rank: int = 0  # 0: all trainable weights; else LoRA on the trainable linear layers
    lora_alpha: int = 64
    ema: float = 0.0  # decay of the averaged weights that are saved and evaluated; 0: none
    autocast: Literal["none", "bfloat16", "float16"] = "none"
    gradient_checkpointing: bool = False
    save_every: int = 50
    panel_every: int = 0  # steps between measurements on held-out prompts; 0: never
    image_every: int = 25  # steps between pictures of the same prompts and seeds, for the report; 0: none
    tracker: tuple[str, ...] = ()  # tensorboard, wandb, trackio; metrics.jsonl is written always
    parts: tuple[str, ...] = ("language", "text_head")  # which of the model's trainable parts learn; the rest is frozen

    @property
    def sampling(self) -> Mapping[str, Any]:
        """Sampling settings with which a model so trained is measured, where they are not the model's own."""
        return {}


class Loop:
    """One training run in one folder. Trainers use `steps`, `draw`, `backward`, `update`, `reference`, `log`, `keep`.

    `panel` measures and `pictures` draws with the weights as they are; every process calls them. Figures and pictures also go to
    `trackers` (the first process has them).
    """

    def __init__(
        self,
        config: LoopConfig,
        model: Any,
        run: Path,
        panel: Callable[[], dict[str, float]] | None = None,
        say: Callable[[str], None] | None = None,
        pictures: Callable[[], Pictures] | None = None,
    ) -> None:
        self.config, self.model, self.run, self.panel, self.say = config, model, run, panel, say
        self.pictures, self.trackers = pictures, list[Tracker]()
        self.step = 0
        self._figures: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._companions: dict[str, Tensor] = {}
        _choose_parts(model, config.parts)
        if config.lora_rank:
            _add_lora(model, config)
        if config.gradient_checkpointing:
            _checkpoint_activations(model.net)
        self.sharded = distributed.shard(model.shard_units())
        self.parameters = {name: parameter for name, parameter in model.net.named_parameters() if parameter.requires_grad}
        self._base = {} if config.lora_rank else {name: value.detach().clone() for name, value in self.parameters.items()}
        self._average = {name: value.detach().clone() for name, value in self.parameters.items()} if config.ema else {}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        if distributed.rank() == 0:
            run.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        self._resume()

    # -- what a trainer calls ---------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps that are left. After each one: panel, pictures, log line, state."""
        if self.step == 0:  # what training starts from
            if self.panel and self.config.panel_every:
                self._measure_panel()
            self._draw_pictures()
            if self._figures:
                self._write_log()
        while self.step < self.config.steps:
            begun = time.monotonic()
            yield self.step
            self._timed("step", time.monotonic() - begun)
            self.step += 1
            last = self.step == self.config.steps
            if self.panel and self.config.panel_every and (self.step % self.config.panel_every == 0 or last):
                self._measure_panel()
            if self.shows or last:
                self._draw_pictures()
            self._write_log()
            if self.step % self.config.save_every == 0 or last:
                self.save()

    def draw(self, prompts: Sequence[Prompt], number: int) -> list[Prompt]:
        """This process's share of the step's prompts: every epoch is a fresh shuffle by (seed, epoch), read on without overlap."""
        first, chosen = self.step * number, []
        for position in range(first, first + number):
            epoch, place = divmod(position, len(prompts))
            order = list(range(len(prompts)))
            Random(f"{self.config.seed}/{epoch}").shuffle(order)
            chosen.append(prompts[order[place]])
        return distributed.share(chosen)

    def seeds(self, prompts: Sequence[Prompt], number: int, purpose: str = "image") -> list[int]:
        """Sampling seeds, `number` for each prompt in turn, from (seed, step, purpose, prompt): the same on any number of processes."""
        keys = [(prompt.id, index) for prompt in prompts for index in range(number)]
        return [int(digest(self.config.seed, self.step, purpose, *key)[:15], 16) for key in keys]

    def autocast(self):
        """Mixed precision for forwards, as configured."""
        if self.config.autocast == "none":
            return nullcontext()
        return torch.autocast(self.model.device.type, getattr(torch, self.config.autocast))

    def backward(self, loss: Tensor, tensors: dict[str, Tensor], prompts: Sequence[Prompt]) -> None:
        """Adds the gradient of one micro-batch's share of the loss. A loss that is no number stops the run and names its cause."""
        if not torch.isfinite(loss):
            bad = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), "loss")
            texts = "; ".join(dict.fromkeys(prompt.text for prompt in prompts))
            raise MmalignError(
                f"Step {self.step}: the loss is {float(loss)}; the first tensor that is not finite is '{bad}', prompts: {texts[:300]}. "
                f"The last whole state is kept in {self.run / 'state'}; lower the learning rate or train in float32."
            )
        (loss * distributed.world()).backward()  # FSDP averages gradients over processes; losses here are shares of one sum

    def update(self) -> None:
        """One optimiser step on the accumulated gradients, clipped; then the average."""
        found: Any = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.grad_norm)
        norm = float(found.full_tensor() if hasattr(found, "full_tensor") else found)
        if not math.isfinite(norm):
            bad = next((name for name, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all()), "?")
            raise MmalignError(f"Step {self.step}: the gradient of '{bad}' is not finite; the last whole state is in {self.run / 'state'}.")
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * _schedule(self.config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, average in self._average.items():
            average.lerp_(self.parameters[name].detach(), 1 - self.config.ema)
        self.log(grad_norm=norm, learning_rate=self.optimizer.param_groups[0]["lr"])

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Inside, weights are whole on every process (samplers read them directly) and nothing records gradients."""
        for unit in self.sharded:
            # Else a module would be gathered anew at each call, and the processes' texts differ in length.
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            with torch.no_grad():
                yield
        finally:
            for unit in self.sharded:
                unit.set_reshard_after_forward(True, recurse=False)
                unit.reshard()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is the one that training started from: LoRA switched off, or the first weights put in place."""
        if self.config.lora_rank:
            _switch_lora(self.model.net, enabled=False)
            try:
                yield
            finally:
                _switch_lora(self.model.net, enabled=True)
            return
        with _swapped(self.parameters, self._base):
            yield

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights (the current ones when there is no average)."""
        with _swapped(self.parameters, self._average) if self._average else nullcontext():
            yield

    def log(self, **figures: float) -> None:
        """Figures of this step; a name given again in the same step replaces the earlier value."""
        self._figures.update({name: float(value) for name, value in figures.items()})

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._timed(name, time.monotonic() - begun)

    @property
    def shows(self) -> bool:
        """Whether pictures are kept at this step: of the same prompts, and what a trainer wants to `keep` of its own."""
        return bool(self.config.image_every) and self.step % self.config.image_every == 0

    def keep(self, kind: str, pictures: Pictures, title: str = "") -> None:
        """Keeps pictures of the step that is being done under <kind>/ (the first process does), and shows them to the trackers."""
        self._keep(self.step + 1, kind, pictures, title)

    def export(self, folder: Path) -> None:
        """Writes the trained checkpoint (averaged when there is an average, LoRA merged) in the family's official layout; every process
        takes part, the first one writes: aside first, then renamed."""
        with self.averaged(), _merged_lora(self.model.net, self.config):
            state = distributed.whole_state(self.model.net)
        if distributed.rank() == 0:
            import shutil

            aside = folder.with_name(folder.name + ".tmp")
            shutil.rmtree(aside, ignore_errors=True)
            self.model.save(aside, {_plain_name(name): value for name, value in state.items() if "lora_" not in name})
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(aside, folder)
        distributed.barrier()

    def join(self, name: str, state: dict[str, Tensor]) -> None:
        """Takes along what else a trainer learns, as live tensors: saved with the state, and filled now when the run continues. Each
        process has its own; with another number of processes they continue from those that are there."""
        number = distributed.rank()
        folder = distributed.latest_state(self.run / "state")
        if folder is not None:
            processes = distributed.load_manifest(folder)["processes"]
            with torch.no_grad():
                distributed.fill(folder, {f"{name}.{number % processes}.{key}": value for key, value in state.items()})
        self._companions |= {f"{name}.{number}.{key}": value for key, value in state.items()}

    # -- state ------------------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """The whole training state under state/step-<n>; older ones go, two stay."""
        folder = self.run / "state" / f"step-{self.step:06d}"
        manifest = {"step": self.step, "config": digest(configs.plain(self.config)), "processes": distributed.world()}
        distributed.save_state(folder, self._tensors(), manifest, self._companions)
        if distributed.rank() == 0:
            import shutil

            for old in sorted((self.run / "state").glob("step-*"))[:-KEPT_STATES]:
                shutil.rmtree(old)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self._average.items()}
        return tensors | {
            f"optimizer.{name}": value for name, value in distributed.optimizer_tensors(self.optimizer, self.parameters).items()
        }

    def _resume(self) -> None:
        folder = distributed.latest_state(self.run / "state")
        if folder is not None:
            with torch.no_grad():
                self.step = distributed.load_state(folder, self._tensors())["step"]
        if distributed.rank() == 0:
            history.truncate_metrics(self.run, self.step if folder else -1)

    # -- figures ----------------------------------------------------------------------------------------------------------------

    def _timed(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _write_log(self) -> None:
        if distributed.rank() == 0:
            seconds = {f"seconds/{name}": round(value, 4) for name, value in self._seconds.items()}
            line = {"step": self.step, **self._figures, **seconds}
            history.append_metrics(self.run, line)
            for tracker in self.trackers:
                tracker.log(self.step, {name: value for name, value in line.items() if name != "step"})
            if self.say:
                names = ("loss", "reward", "spread", "kl", "grad_norm", *(key for key in line if key in ("panel/strict",)), "seconds/step")
                self.say(f"step {self.step:5d}  " + "  ".join(f"{name} {line[name]:.4g}" for name in names if name in line))
        self._figures, self._seconds = {}, {}

    def _draw_pictures(self) -> None:
        if self.pictures is not None and self.config.image_every:
            with self.timer("pictures"), self.averaged(), self.rollout():
                drawn = self.pictures()
            self._keep(self.step, "samples", drawn)

    def _keep(self, step: int, kind: str, pictures: Pictures, title: str = "") -> None:
        if distributed.rank() == 0 and pictures:
            history.write_album(self.run, kind, step, pictures, title)
            for tracker in self.trackers:
                tracker.show(step, kind, pictures)

    def _measure_panel(self) -> None:
        assert self.panel is not None
        with self.timer("panel"), self.averaged(), self.rollout():
            figures = self.panel()
        self.log(**{f"panel/{name}": value for name, value in figures.items()})


def _schedule(config: LoopConfig, step: int) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[config.schedule]


@contextmanager
def _swapped(parameters: dict[str, nn.Parameter], others: dict[str, Tensor]) -> Iterator[None]:
    with torch.no_grad():
        kept = {name: parameters[name].detach().clone() for name in others}
        for name, value in others.items():
            parameters[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


def _choose_parts(model: Any, parts: Sequence[str]) -> None:
    """Freezes everything but the named parts."""
    unknown = sorted(set(parts) - set(model.trainable))
    if unknown or not parts:
        raise UsageError(f"{model.family} has no trainable part '{', '.join(unknown)}'; its parts are {', '.join(model.trainable)}.")
    model.net.requires_grad_(False)
    for part in parts:
        model.trainable[part].requires_grad_(True)


def _checkpoint_activations(net: Any) -> None:
    """Compute activations again in the backward pass; diffusers and transformers name the switch differently.

    transformers checkpoints a layer only in training mode, in which it also throws away the sampler's cache: each layer is in that mode
    for the forwards that record gradients, and for no other.
    """
    if hasattr(net, "enable_gradient_checkpointing"):
        net.enable_gradient_checkpointing()
        return
    net.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in net.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.register_forward_pre_hook(lambda layer, _: setattr(layer, "training", torch.is_grad_enabled()))


def _add_lora(model: Any, config: LoopConfig) -> None:
    """LoRA on the linear layers that were trainable; everything else freezes. The adapters start at zero effect, seeded."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, layer in model.net.named_modules() if isinstance(layer, nn.Linear) and layer.weight.requires_grad]
    if not linear:
        raise UsageError("LoRA needs trainable linear layers; this model offers none under these options.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=linear), model.net)
    for name, parameter in model.net.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _switch_lora(module: nn.Module, enabled: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(enabled)


@contextmanager
def _merged_lora(module: nn.Module, config: LoopConfig) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)] if config.lora_rank else []
    kept = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.unmerge()
            with torch.no_grad():  # subtracting what was added leaves rounding behind
                layer.get_base_layer().weight.copy_(weight)


def _plain_name(name: str) -> str:
    """A parameter's name without what LoRA wrapped around it."""
    return name.replace(".base_layer.", ".")
