"""Many processes: torchrun, FSDP2 sharding, sums over processes, and training state as sharded safetensors.

One process needs none of it: `world()` is 1, `shard` does nothing, sums are the numbers themselves. State is written by
torch.distributed.checkpoint into safetensors shards (no pickle), aside first, the manifest last, then renamed: a folder that has a
manifest is whole. What n processes saved, m processes load.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmalign.types import MmalignError

MANIFEST = "manifest.json"


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def start(timeout_minutes: float = 30) -> None:
    """Joins the process group when torchrun started this process. The timeout is finite: a lost peer ends the run with a message."""
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))


def stop() -> None:
    """Leaves the group after everyone has arrived, so that no process tears it down under another."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(value: float | Tensor) -> float:
    """The sum over processes, in float64."""
    number = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    if world() == 1:
        return float(number)
    number = number.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(number)
    return float(number)


def largest(value: float | Tensor) -> float:
    """The maximum over processes."""
    number = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    if world() == 1:
        return float(number)
    number = number.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return float(number)


def gather(items: list) -> list:
    """The items of all processes, in rank order, on every process."""
    if world() == 1:
        return items
    shares: list[list] = [[] for _ in range(world())]
    dist.all_gather_object(shares, items)
    return [item for share in shares for item in share]


def share(items: list, what: str = "prompts") -> list:
    """This process's contiguous part of a global list whose length the number of processes must divide."""
    if len(items) % world():
        raise MmalignError(
            f"{len(items)} {what} in a step cannot be divided among {world()} processes; set their number to a multiple of {world()}."
        )
    size = len(items) // world()
    return items[rank() * size : (rank() + 1) * size]


def shard(units: Iterable[nn.Module]) -> list[Any]:
    """FSDP2 over the given modules, inner ones first; returns them (none in one process). Every module that is called directly must be
    one of them, because FSDP2 gathers a module's parameters in its own forward."""
    if world() == 1:
        return []
    from torch.distributed.fsdp import fully_shard

    sharded: list = [fully_shard(unit) for unit in units]
    for unit in reversed(sharded):
        # FSDP2 takes the first module that runs for the root of what it holds. Here an inner one (the embedding) runs first, so roots
        # are settled now, outermost first; there is no public call for it.
        unit._get_fsdp_state()._lazy_init()
    return sharded


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer whole, on the CPU of the first process; all processes must call it."""
    if world() == 1:
        return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole: dict[str, Any] = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return whole


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The live state of AdamW by parameter name, to be saved or filled; AdamW makes it at its first step, loading needs it before."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors


def save_state(folder: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], companions: Mapping[str, Tensor] = {}) -> None:
    """Writes tensors (plain or sharded), those of companions, and a JSON manifest to `folder`. A crash at any moment leaves a whole
    folder or none."""
    import torch.distributed.checkpoint as checkpoint

    aside = folder.with_name(folder.name + ".tmp")
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.save({**tensors, **companions}, storage_writer=checkpoint.HuggingFaceStorageWriter(str(aside), save_distributed=True))
    barrier()
    if rank() == 0:
        with (aside / MANIFEST).open("w") as file:
            json.dump({**manifest, "tensors": len(tensors)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(aside, folder)
    barrier()


def load_state(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fills the given tensors in place from a folder that `save_state` wrote with any number of processes; returns the manifest."""
    manifest = load_manifest(folder)
    if manifest["tensors"] != len(tensors):
        raise MmalignError(
            f"The training state in {folder} holds {manifest['tensors']} tensors, this run has {len(tensors)}: its model, LoRA or EMA "
            "options differ. Use the options it was started with, or another --run folder."
        )
    fill(folder, tensors)
    return manifest


def load_manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return found


def fill(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills some of a folder's tensors in place."""
    import torch.distributed.checkpoint as checkpoint

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.load(dict(tensors), storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)))


def latest_state(parent: Path) -> Path | None:
    """The whole state of the highest step under `parent`; half-written ones are never seen."""
    whole = [path for path in parent.glob("step-*") if path.suffix != ".tmp" and (path / MANIFEST).exists()]
    return max(whole, default=None)
