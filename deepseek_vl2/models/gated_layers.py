"""The feed-forward layers that one token passes, in one call on the CPU: its experts and the shared ones together.

One by one their products are so short that a good part of a token's time goes into starting them.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from transformers.activations import SiLUActivation

from .few_row_products import are_few_rows, as_array, as_tensor, can_multiply, kernels, run_kernel, threads_for
from .streamed_weights import StreamedWeight, is_plain


class GatedLayers:
    """A gated feed-forward layer with SiLU, or experts of that kind, in the form that the kernels read.

    Args:
        weights: Gate, up and down; or gate and up as one, and down.

    Attributes:
        places: [E, 3, 4] int64, `StreamedWeight.places` of gate, up and down; E is 1 without experts.
        is_whole: Whether no block of outputs of int4 weights is filled up, but for the last.
    """

    def __init__(self, *weights: StreamedWeight) -> None:
        self.weights = weights
        self.first, self.down = weights[0], weights[-1]
        self.width = self.down.num_inputs
        self.is_readable = all(weight.is_readable for weight in weights)
        widths = self.first.num_rows // 2 if len(weights) == 2 else self.first.num_rows
        self.is_whole = widths == self.width and not (self.first.is_int4 and self.width % self.first.block_rows)
        self.kind = (self.first.kind, self.down.kind)
        if self.is_readable:
            gate, up = self.first.halves() if len(weights) == 2 else (weights[0].places, weights[1].places)
            self.places = np.stack((gate, up, self.down.places), axis=1)


def gated_layers(module: nn.Module, *weights: StreamedWeight | None) -> GatedLayers | None:
    """What is known of a module with such layers; None if some weight is, or the activation is none of the kernels'.

    Args:
        module: Its activation is `act_fn`.
        weights: See `GatedLayers`.
    """
    if not is_silu(module.act_fn):  # type: ignore[arg-type]
        return None
    known: GatedLayers | None = vars(module).get("_gated")
    if known is None or known.weights != weights:
        of_all = [weight for weight in weights if weight is not None]
        if len(of_all) < len(weights):
            return None
        known = vars(module)["_gated"] = GatedLayers(*of_all)
    return known


def run_one_token(
    hidden_states: torch.Tensor,
    modules: Sequence[nn.Module],
    chosen: Sequence[Sequence[int]],
    factors: Sequence[float],
) -> torch.Tensor | None:
    """Runs one token through gated feed-forward layers and adds up what they give, in float32.

    Args:
        hidden_states: [..., D].
        modules: Layers or experts, which say by a method `gated_layers` where their weights are.
        chosen: For each module the numbers of the experts, (0,) where it is a single layer.
        factors: What the output of each of these is multiplied by.

    Returns:
        [..., D] in the type of the hidden states; None if the modules have to be called themselves: for more than one
        token, elsewhere than on the CPU, with weights of different kinds, and where a module is wrapped or watched.
    """
    if not is_one_token(hidden_states):
        return None
    layers = [layer for layer in map(_gated_layers, modules) if layer is not None]
    row = hidden_states.reshape(1, -1)
    if len(layers) < len(modules) or not _can_run(row, layers):
        return None
    if len(layers) == 1 and len(chosen[0]) == len(layers[0].places):
        places = layers[0].places
    else:
        places = np.concatenate([layer.places[list(numbers)] for layer, numbers in zip(layers, chosen, strict=True)])
    first, down = layers[0].first, layers[0].down
    inputs = as_array(row)[0]
    outputs = np.empty(down.num_rows, inputs.dtype)
    widths = sum(layer.width * len(numbers) for layer, numbers in zip(layers, chosen, strict=True))
    weight_type, scale_type = first.types
    kernel = kernels().run_gated_layers
    if first.is_int4:
        kernel = kernels().int4_gated_kernel(first.block_rows)
        weight_type = np.array([first.group_size, down.group_size])
    factors_of_all = np.array(factors, np.float32)
    run_kernel(
        kernel, threads_for(widths * first.row_bytes), inputs, places, factors_of_all, weight_type, scale_type, outputs
    )
    return as_tensor(outputs[: down.num_outputs], row.dtype).view(hidden_states.shape)


def is_one_token(hidden_states: torch.Tensor) -> bool:
    """Whether hidden states [..., D] are those of a single token on the CPU."""
    return are_few_rows(hidden_states) and hidden_states.numel() == hidden_states.shape[-1]


def _gated_layers(module: nn.Module) -> GatedLayers | None:
    get = getattr(type(module), "gated_layers", None)  # by the class, see `weight_of`
    return get(module) if get and is_plain(module) else None


def _can_run(row: torch.Tensor, layers: Sequence[GatedLayers]) -> bool:
    first = layers[0]
    if first.first.is_int4 and row.dtype == torch.float32:
        return False  # the kernel rounds inputs to 16 bits
    are_alike = all(layer.is_readable and layer.is_whole and layer.kind == first.kind for layer in layers)
    # Float weights and int8 are read by one kernel whatever their number of inputs, which no kind tells.
    return (
        are_alike
        and first.kind[0][:3] == first.kind[1][:3]
        and can_multiply(row, 1, *(layer.first for layer in layers))
    )


def is_silu(activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether an activation is what the kernels compute."""
    return isinstance(activation, SiLUActivation | nn.SiLU)
