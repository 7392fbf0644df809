"""Serving requests with a model that draws and answers: settings, sizes, pictures in questions, and failures that cost one request.

What a family adds: `encode_prompts`, `sample`, `decode` and, where its capabilities name "answer", `generate_text`; where they name
"choose", `text_log_prob` (docs/models.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign import config, images
from mmalign.models.layers.lanes import lanes
from mmalign.trajectory import Policy, Prompts, TextTrajectory, Trajectory
from mmalign.types import Failure, Request, Sample, UsageError

DTYPES = ("float32", "bfloat16", "float16")
TASKS = ("image", "answer", "choose")


class Serving:
    """`generate` for a family. A result depends on its request alone: bitwise on the CPU, where work is cut into lanes."""

    family: str
    name: str
    settings: Mapping[str, Any]
    sampling_type: type
    size: tuple[int, int]  # height and width that it draws when a request names none
    width: int | None  # rows of a lane
    encode_prompts: Callable[..., Prompts]
    sample: Callable[..., Trajectory]
    decode: Callable[..., torch.Tensor]
    generate_text: Callable[..., TextTrajectory]
    text_log_prob: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    is_whole: Callable[..., bool]  # whether an answer's ids end as the model ends an answer, and not by the limit
    capabilities: Collection[str]

    def generate(self, requests: Sequence[Request]) -> list[Sample | Failure]:
        """Per request an image, an answer or a failure, which depends on that request alone (bitwise on the CPU)."""
        started = time.perf_counter()
        results: list[Any] = [None] * len(requests)
        settings = [self._settings(request) for request in requests]
        for lane in lanes(settings, None):
            group = [requests[row] for row in lane.rows]
            made = {"image": self._draw, "answer": self._answer, "choose": self._choose}[lane.key.task](group, lane.key)
            for row, result in zip(lane.rows, made, strict=True):
                results[row] = result
        share = (time.perf_counter() - started) / max(1, len(requests))
        return [
            result if isinstance(result, Failure) else Sample(request, seconds=share, **result)
            for request, result in zip(requests, results, strict=True)
        ]

    def policy(self, settings: Any) -> Policy:
        """The policy that sampling settings mean."""
        return Policy(settings.guidance, settings.temperature)

    def wrong_size(self, size: tuple[int, int]) -> str:
        """Why this size cannot be drawn, as the end of a sentence; "" when it can."""
        return "" if size == self.size else f"draws {self.size[0]} x {self.size[1]} pixels only"

    def prepare(self, requests: Sequence[Request], settings: Any, size: tuple[int, int]) -> tuple[Prompts, list[dict[str, Any]]]:
        """The encoded prompts of requests, and what is worth keeping about each beside its picture."""
        return self.encode_prompts([request.prompt.text for request in requests]), [{} for _ in requests]

    def pixels_of(self, codes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """[B, 3, H, W] in [0, 1] of drawn codes."""
        return self.decode(codes)

    def size_settings(self, size: tuple[int, int]) -> dict[str, Any]:
        """Further arguments of `sample` that a size means, where the prompts do not tell it."""
        return {}

    def render(self, prompts: Prompts, drawn: Trajectory, size: tuple[int, int] | None = None) -> torch.Tensor:
        """[B, 3, H, W] in [0, 1]: the pictures of what was drawn for these prompts."""
        return self.pixels_of(drawn.actions, size or self.size)

    def wrong_picture(self, image_HWC: np.ndarray) -> str:
        """Why a question cannot be asked about this picture, as a whole sentence; "" when it can."""
        return ""

    def answer_settings(self, settings: Any) -> dict[str, Any]:
        """Further arguments of `generate_text` that sampling settings mean."""
        return {}

    def _settings(self, request: Request) -> Any:
        chosen: Any = config.build(self.sampling_type, {**self.settings, **request.settings}, f"settings of {request.id}")
        if chosen.task not in set(TASKS) & set(self.capabilities):
            known = ", ".join(task for task in TASKS if task in self.capabilities)
            raise UsageError(f"{self.family} has no task '{chosen.task}'; there are {known}. Correct sampling.task.")
        return chosen

    def _draw(self, requests: Sequence[Request], settings: Any) -> list[dict[str, Any] | Failure]:
        results: list[Any] = [None] * len(requests)
        for lane in lanes([request.size or self.size for request in requests], None):
            reason = self.wrong_size(lane.key)
            made = [] if reason else self._images([requests[row] for row in lane.rows], settings, lane.key)
            for index, row in enumerate(lane.rows):
                results[row] = self._refused(requests[row], reason) if reason else made[index]
        return results

    @torch.no_grad()
    def _images(self, requests: Sequence[Request], settings: Any, size: tuple[int, int]) -> list[dict[str, Any]]:
        """uint8 [H, W, 3] each. Fractions are cut off, not rounded, as the official scripts do."""
        prompts, extras = self.prepare(requests, settings, size)
        seeds = [request.seed for request in requests]
        drawn = self.sample(prompts, self.policy(settings), seeds, **self.size_settings(size))
        made: list[dict[str, Any]] = [{} for _ in requests]
        for lane in lanes([0] * len(requests), self.width):
            pixels = self.render(prompts.select(lane.rows), drawn.select(lane.rows), size)
            bytes_BHWC = (pixels * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            for row, picture in zip(lane.real, bytes_BHWC, strict=False):
                made[row] = {"image": picture.copy(), "extra": extras[row]}
        return made

    def _refused(self, request: Request, reason: str) -> Failure:
        asked = " x ".join(map(str, request.size or self.size))
        return Failure("generate", "error", f"{self.name} {reason}; {request.id} asks for {asked}. Leave the size out.")

    def _answer(self, requests: Sequence[Request], settings: Any) -> list[dict[str, Any] | Failure]:
        pictures = [self._picture(request) for request in requests]
        rows = [index for index, picture in enumerate(pictures) if not isinstance(picture, Failure)]
        results: list[Any] = list(pictures)
        if rows:
            texts, seeds = [requests[row].prompt.text for row in rows], [requests[row].seed for row in rows]
            asked = [pictures[row] for row in rows]
            written = self.generate_text(
                texts, asked, seeds, settings.answer_temperature, settings.max_tokens, **self.answer_settings(settings)
            )
            for row, text, mask, ids in zip(rows, written.texts, written.mask, written.ids, strict=True):
                # A reply cut off by the limit is not the model's answer; the scorer must be able to tell.
                results[row] = {"answer": text, "extra": {"tokens": int(mask.sum()), "is_whole": self.is_whole(ids[mask])}}
        return results

    def _choose(self, requests: Sequence[Request], settings: Any) -> list[dict[str, Any] | Failure]:
        return [self._likeliest(request) for request in requests]

    @torch.no_grad()
    def _likeliest(self, request: Request) -> dict[str, Any] | Failure:
        """The letter in meta["options"] whose text, with its end, has the least mean loss after the question; the losses by letter.

        The rows of a forward are one request's options, so that nothing depends on other requests.
        """
        options = request.prompt.meta.get("options")
        if not isinstance(options, Mapping) or not options:
            return Failure("generate", "missing", f"{request.id} has no options to choose from in its metadata.")
        picture = self._picture(request)
        if isinstance(picture, Failure):
            return picture
        pictures = None if picture is None else [picture] * len(options)
        log_prob, mask = self.text_log_prob([request.prompt.text] * len(options), pictures, list(options.values()))
        losses = (-(log_prob * mask).sum(1) / mask.sum(1)).tolist()
        if not all(map(math.isfinite, losses)):
            return Failure("generate", "nonfinite", f"{self.name} gives {request.id} losses that are not finite: {losses}.")
        by_letter = dict(zip(options, losses, strict=True))
        return {"answer": min(by_letter, key=by_letter.__getitem__), "extra": {"losses": by_letter}}

    def _picture(self, request: Request) -> np.ndarray | Failure | None:
        """The request's one picture, None when it asks about none, or the failure to read it or to ask about it."""
        image = _read_picture(request, self.family)
        reason = "" if image is None or isinstance(image, Failure) else self.wrong_picture(image)
        return Failure("generate", "error", f"{request.id}: {reason}") if reason else image


def _read_picture(request: Request, family: str) -> np.ndarray | Failure | None:
    """The request's one picture, None when it asks about none, or the failure to read it."""
    given = list(request.prompt.meta.get("images") or ())
    if len(given) > 1:
        message = f"{family} reads one picture per question; {request.id} has {len(given)}. Join them into one picture."
        return Failure("generate", "error", message)
    if not given:
        return None
    try:
        return images.check_image(given[0]) if isinstance(given[0], np.ndarray) else images.decode_image(Path(given[0]))
    except images.ImageError as error:
        is_missing = not isinstance(given[0], np.ndarray) and not Path(given[0]).exists()
        return Failure("generate", "missing" if is_missing else "error", str(error))
