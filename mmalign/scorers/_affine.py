"""The five-layer head of the aesthetic predictor and of ImageReward: without activations between them, one affine map.

Keys `layers.{0,2,4,6,7}.{weight,bias}` (dropout stands between and is off when scoring). Folding the product in float64 gives the chain's
value to rounding and costs one dot product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mmalign.types import MmalignError

if TYPE_CHECKING:
    import torch

LAYERS = (0, 2, 4, 6, 7)


def fold(state: Mapping[str, torch.Tensor], width: int, source: str) -> torch.nn.Linear:
    """The head as one float32 Linear from `width` features to a score; MmalignError when tensors are missing, left over or do not fit."""
    import torch

    names = {f"layers.{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")}
    if state.keys() != names:
        raise MmalignError(
            f"{source} is not the expected head: missing {sorted(names - state.keys())[:2]}, unknown {sorted(state.keys() - names)[:2]}. "
            "Expected layers.{0,2,4,6,7} with weight and bias."
        )
    weights = [state[f"layers.{layer}.weight"].double() for layer in LAYERS]
    inputs, outputs = [weight.shape[1] for weight in weights], [weight.shape[0] for weight in weights]
    if inputs[0] != width or outputs[-1] != 1 or inputs[1:] != outputs[:-1]:
        shapes = " ".join(f"{i}->{o}" for i, o in zip(inputs, outputs, strict=True))
        raise MmalignError(f"The head {source} has layers {shapes}; expected a chain from the network's {width} features to 1 score.")
    weight, bias = weights[0], state["layers.0.bias"].double()
    for layer, step in zip(LAYERS[1:], weights[1:], strict=True):
        weight, bias = step @ weight, step @ bias + state[f"layers.{layer}.bias"].double()
    linear = torch.nn.Linear(width, 1)
    linear.weight.data, linear.bias.data = weight.float(), bias.float()
    return linear.requires_grad_(False).eval()
