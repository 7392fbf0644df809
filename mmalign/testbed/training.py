"""The loop that trains the testbed's base models: seeded by step, logged, resumable after a kill."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


def fit(
    name: str,
    work: Path,
    parameters: Iterable[torch.nn.Parameter],
    modules: dict[str, torch.nn.Module],
    loss_of: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    steps: int,
    learning_rate: float,
    warmup: int = 100,
    weight_decay: float = 0.01,
    save_every: int = 200,
) -> None:
    """Trains for `steps` with AdamW and a cosine schedule to a tenth. `loss_of(step)` must depend on its step alone, so that a
    resumed run repeats what an undisturbed one would have done. State and log: <work>/<name>.pt and <work>/<name>.jsonl."""
    work.mkdir(parents=True, exist_ok=True)
    state_file, log_file = work / f"{name}.pt", work / f"{name}.jsonl"
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    start, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        start, spent = state["step"], state["seconds"]
        optimizer.load_state_dict(state["optimizer"])
        for key, module in modules.items():
            module.load_state_dict(state[key])
    begun = time.monotonic()
    for step in range(start, steps):
        progress = step / steps
        rate = learning_rate * min(1.0, (step + 1) / warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, figures = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        seconds = spent + time.monotonic() - begun
        if step % 50 == 0 or step + 1 == steps:
            with log_file.open("a") as log:
                log.write(
                    json.dumps({"step": step, "loss": round(float(loss.detach()), 5), **figures, "seconds": round(seconds, 1)}) + "\n"
                )
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {key: module.state_dict() for key, module in modules.items()}
            aside = state_file.with_suffix(".tmp")
            torch.save({"step": step + 1, "seconds": seconds, "optimizer": optimizer.state_dict(), **state}, aside)
            os.replace(aside, state_file)
