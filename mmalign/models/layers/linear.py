"""Linear layers for decoding: several that read one input become one product, with weights laid out once for the processor.

A decoding step multiplies a few dozen rows by every matrix of the model. On a CPU the plain product rearranges the matrix each time;
oneDNN's packed weights do not (measured on an AVX-512 machine: 1.7 to 2.3 times the rows per second at 32 to 128 rows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_BYTES = 2**30  # packing copies the weights: only for models whose copy is small


def fused(modules: Sequence[Any], rows: int, pack: bool) -> Callable[[Tensor], Tensor]:
    """A function x [rows, D] -> the modules' outputs side by side.

    With `pack` (see `can_pack`) weights are read now, so build it anew after they change. Anything that is not exactly a
    bare Linear, such as one with an adapter or a hook, is called as it is.
    """
    if pack and all(_is_bare(module) for module in modules):
        weight = torch.cat([module.weight for module in modules]).detach()
        biases = [module.bias if module.bias is not None else weight.new_zeros(len(module.weight)) for module in modules]
        bias = torch.cat(biases).detach() if any(module.bias is not None for module in modules) else None
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    if len(modules) == 1:
        return modules[0]
    return lambda x: torch.cat([module(x) for module in modules], -1)


def can_pack(model: nn.Module) -> bool:
    """Whether the weights are float32 on the CPU, few enough to copy, used as they are (no autocast), and torch can pack."""
    parameters = list(model.parameters())
    plain = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in parameters)
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return plain and available and not torch.is_autocast_enabled("cpu") and sum(weight.nbytes for weight in parameters) <= PACKED_BYTES


def _is_bare(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


def head_slice(head: nn.Module, start: int, stop: int) -> Callable[[Tensor], Tensor]:
    """A function x [..., D] -> the outputs start to stop of a linear layer: with a vocabulary of 10^5 a small part of the work.

    A layer with an adapter or a hook is called whole, and its outputs cut.
    """
    if isinstance(head, nn.Linear) and _is_bare(head):
        bias = None if head.bias is None else head.bias[start:stop]
        return lambda x: F.linear(x, head.weight[start:stop], bias)
    return lambda x: head(x)[..., start:stop]
