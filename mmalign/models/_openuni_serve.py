"""OpenUni as a model that serves requests: name, fingerprint, settings, pictures, saving."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmalign.models._openuni import OpenUni, OpenUniText, Sana
from mmalign.models._openuni_layout import Checkpoint, build, find
from mmalign.models._serving import DTYPES, Serving
from mmalign.trajectory import Policy, Prompts, Trajectory
from mmalign.types import MmalignError, Request, UsageError, digest

REVISION = 1  # of the sampler: raise it when equal weights, seed and settings give other pictures
SHIFT = 3.0  # of the training schedule, where SANA's scheduler does not say
LEARNED = ("connector.", "projector.", "transformer.")


class OpenUniModel(Serving, OpenUni):
    """An OpenUni with a name, a fingerprint and `generate`."""

    family = "openuni"
    capabilities = frozenset({"image", "answer", "choose", "train"})

    def __init__(self, path: Path, found: Checkpoint, sampling: Any, device: str, dtype: str) -> None:
        net, vae = build(found, path, dtype)
        net.to(device).eval()
        sizes = net.lmm.config.vision_config
        slots = int((sizes.image_size[0] // sizes.patch_size[0]) ** 2 * net.lmm.config.downsample_ratio**2)
        schedule = _schedule(found.bases["sana"])
        layout = Sana(net, vae.to(device).eval().requires_grad_(False), schedule)
        super().__init__(net, OpenUniText(found.bases["internvl3"], slots), layout, float(schedule.get("flow_shift") or SHIFT))
        self.path, self.found, self.name, self.sampling_type = path, found, path.resolve().name, type(sampling)
        self.settings: Mapping[str, Any] = asdict(sampling)
        self.fingerprint = digest(self.family, found.identity, dtype, REVISION)
        self.determinism = "bitwise" if self.device.type == "cpu" else "kernel"

    def policy(self, settings: Any) -> Policy:
        return Policy(settings.guidance, levels=(0.0,) * settings.steps)

    def wrong_size(self, size: tuple[int, int]) -> str:
        unit = self.layout.scale * self.layout.multiple
        return f"draws multiples of {unit} pixels only" if any(side < unit or side % unit for side in size) else ""

    @torch.no_grad()
    def _images(self, requests: Sequence[Request], settings: Any, size: tuple[int, int]) -> list[dict[str, Any]]:
        prompts = self.encode_prompts([request.prompt.text for request in requests])
        latents = self.draw(prompts, self.policy(settings), [request.seed for request in requests], size)
        return [{"image": picture, "extra": {}} for picture in self.pictures(latents)]

    def render(self, prompts: Prompts, drawn: Trajectory, size: tuple[int, int] | None = None) -> torch.Tensor:
        return self.decode(drawn.actions[:, -1])

    def is_whole(self, ids: torch.Tensor) -> bool:
        return bool((ids == self.chat.eos).any())

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the overlay (`state`, or the networks' own) as safetensors, a config that names the family, and the folders below it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        whole = self.net.state_dict() if state is None else state
        tensors = {name: tensor.detach().contiguous() for name, tensor in whole.items() if name.startswith(LEARNED)}
        tensors["meta_queries"] = whole["queries.weight"].detach().contiguous()
        for part in ("lmm", "vae"):  # as they were read: neither of them learns
            tensors |= {f"{part}.{name}": tensor.contiguous() for name, tensor in self.found.overlay[part].items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        heads = self.net.connector.config.num_attention_heads
        content = {"model_type": self.family, "connector": {"num_attention_heads": heads}}
        (folder / "config.json").write_text(json.dumps(content, indent=1))
        for name, source in self.found.bases.items():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)


def open_model(path: Path, sampling: Any, device: str, dtype: str, extra: Mapping[str, Path]) -> OpenUniModel:
    """Read an overlay and what lies below it; an error says which folder, file, parameter or size is wrong."""
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'; OpenUni runs in {', '.join(DTYPES)}.")
    return OpenUniModel(path, find(path, extra), sampling, device, dtype)


def _schedule(sana: Path) -> dict[str, Any]:
    file = sana / "scheduler" / "scheduler_config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MmalignError(f"SANA's schedule {file} cannot be read: {error}. Download that repository again.") from error
