"""Where a run's figures go beside metrics.jsonl, when asked for: TensorBoard, Weights & Biases, Trackio.

Each is an optional package and is imported when a run that names it starts. TensorBoard writes into the run's folder; the other two keep
the run under the project `mmalign` and its folder's name, where their own settings say (WANDB_MODE=offline, TRACKIO_DIR, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mmalign.types import UsageError, digest

PROJECT = "mmalign"


class Tracker(Protocol):
    """Receives each step's figures and pictures (uint8 [H, W, 3], caption) once, in order."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def show(self, step: int, kind: str, pictures: Sequence[tuple[Any, str]]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under <run>/tensorboard; steps that a resumed run does again replace the earlier ones."""

    def __init__(self, run: Path, facts: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def show(self, step: int, kind: str, pictures: Sequence[tuple[Any, str]]) -> None:
        for number, (image, _) in enumerate(pictures):
            self.writer.add_image(f"{kind}/{number:02d}", image, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One run of wandb; its id comes from the folder, so a resumed training continues it. wandb drops steps that it has already."""

    def __init__(self, run: Path, facts: Mapping[str, Any], step: int) -> None:
        import wandb

        self.module = wandb
        place = digest("wandb", str(run.resolve()))
        self.run = wandb.init(project=PROJECT, name=run.name, id=place, resume="allow", dir=str(run), config=dict(facts))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def show(self, step: int, kind: str, pictures: Sequence[tuple[Any, str]]) -> None:
        self.run.log({kind: [self.module.Image(image, caption=caption) for image, caption in pictures]}, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """One run of trackio under the folder's name, continued when the training is."""

    def __init__(self, run: Path, facts: Mapping[str, Any], step: int) -> None:
        import trackio

        self.module = trackio
        trackio.init(project=PROJECT, name=run.name, resume="allow", config=dict(facts))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.module.log(dict(figures), step=step)

    def show(self, step: int, kind: str, pictures: Sequence[tuple[Any, str]]) -> None:
        images = {f"{kind}/{number:02d}": self.module.Image(image, caption=caption) for number, (image, caption) in enumerate(pictures)}
        self.module.log(images, step=step)

    def close(self) -> None:
        self.module.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """UsageError for a tracker that does not exist or whose package is not installed; cheap, so that it comes before any weights."""
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"There is no tracker '{name}'; there are {', '.join(TRACKERS)}. metrics.jsonl is written always.")
        if find_spec(name) is None:
            raise UsageError(
                f"--tracker {name}: the package {name} is not installed here. Install it (pip install 'mmalign[trackers]'), "
                "or leave --tracker out: metrics.jsonl and the report hold the same figures."
            )


def open_trackers(names: Sequence[str], run: Path, facts: Mapping[str, Any], step: int) -> list[Tracker]:
    """The named trackers of a run that begins or continues after `step`; `facts` are its choices, for those that show them."""
    check_trackers(names)
    return [TRACKERS[name](run, facts, step) for name in names]
