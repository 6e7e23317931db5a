"""Weights as the compiled kernels for few rows read them: from their addresses in memory.

What is known of a weight is kept beside it, since finding it out takes as long as a small product. It is found out anew
once the weight is another one, or lies elsewhere.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

# The types of weights, and as what numba reads them; it knows no bfloat16, and int4 weights lie in bytes, two in each.
NUMPY_TYPES = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.int8: np.int8, torch.uint8: np.uint8}
_LIKE = {dtype: np.empty(0, numpy_type) for dtype, numpy_type in NUMPY_TYPES.items()}


class NotCopied:
    """What is true of one place in memory: copied or saved with its module it becomes None, and is found out anew."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class StreamedWeight(NotCopied):
    """A weight [N, K] of a linear layer, those of experts [E, N, K], or [K] of a norm, as the kernels read it.

    Args:
        values: In float32, bfloat16 or int8, or uint8 [..., N', K / 2] of int4 weights as in `quantization.packing`.
        scales: [..., N] of int8, [..., K / g, N', 2] of int4.
        block_rows: Outputs of int4 weights that lie side by side.
        num_outputs: N, if it is not N'.

    Attributes:
        kind: What weights have in common that one call of a kernel multiplies by.
        types: What tells a kernel how to read: arrays of the weights' type (of int4 g) and of the scales', or None.
        places: [E, 4] int64, E being 1 without experts. Of each matrix the addresses of its weights and of its scales
            (0 if there are none), how many outputs it has (of int4 N'), and N' again for int4 scales, which lie apart
            by so many outputs for each group of inputs.
    """

    def __init__(
        self,
        values: torch.Tensor,
        scales: torch.Tensor | None = None,
        block_rows: int = 64,
        num_outputs: int | None = None,
    ) -> None:
        self.values, self.scales, self.block_rows = values, scales, block_rows
        self.shape, self.is_int4 = values.shape, values.dtype == torch.uint8
        self.num_inputs = values.shape[-1] * (2 if self.is_int4 else 1)
        self.num_rows = values.shape[-2] if values.dim() > 1 else 1
        self.num_outputs = self.num_rows if num_outputs is None else num_outputs
        self.row_bytes = values.shape[-1] * values.itemsize
        self.int4_block_rows = block_rows if self.is_int4 else 0
        self.group_size = self.num_inputs // scales.shape[-3] if self.is_int4 and scales is not None else 0
        self.kind = (values.dtype, None if scales is None else scales.dtype, block_rows, self.group_size)
        self.is_readable = all(map(_is_readable, (values,) if scales is None else (values, scales)))
        if self.is_readable:
            self.types = (
                self.group_size if self.is_int4 else _LIKE[values.dtype],
                None if scales is None else _LIKE[scales.dtype],
            )
            self.addresses = (values.data_ptr(), 0 if scales is None else scales.data_ptr())
            self.places = self._find_places()

    def _find_places(self) -> np.ndarray:
        num_matrices = self.values.shape[0] if self.values.dim() == 3 else 1
        places = np.zeros((num_matrices, 4), np.int64)
        numbers = np.arange(num_matrices)
        places[:, 0] = self.addresses[0] + numbers * (self.num_rows * self.row_bytes)
        places[:, 2] = self.num_rows
        if self.scales is not None:
            places[:, 1] = self.addresses[1] + numbers * (self.scales.nbytes // num_matrices)
            places[:, 3] = self.num_rows
        return places

    def is_of(self, values: torch.Tensor, scales: torch.Tensor | None) -> bool:
        """Whether this is still what is to be known of a weight."""
        return (
            self.is_readable
            and values is self.values
            and scales is self.scales
            and values.data_ptr() == self.addresses[0]
            and values.shape == self.shape
            and values.is_contiguous()
            and (scales is None or (scales.data_ptr() == self.addresses[1] and scales.dtype == self.kind[1]))
        )

    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Places of the first and of the second half of each matrix' outputs."""
        half = self.num_rows // 2
        first, second = self.places.copy(), self.places.copy()
        first[:, 2] = second[:, 2] = half
        second[:, 0] += half * self.row_bytes
        if self.scales is not None:
            second[:, 1] += half * self.scales.itemsize * (2 if self.is_int4 else 1)
        return first, second


# What users choose in a configuration, or set up for several processes, and what decides which code runs.
_SETTINGS = ("_attn_implementation", "_experts_implementation", "_is_expert_parallel")


class Unchanged(NotCopied):
    """Tells whether a module still is what it was: its parts, its weights in their places, no hooks, the same settings.

    Finding out anew what is to be known of a layer takes several times as long.

    Args:
        module: Looked at with all of its parts.
        weights: Its weights.
    """

    def __init__(self, module: nn.Module, weights: Iterable[StreamedWeight]) -> None:
        parts = list(module.modules())
        self._states = [vars(part) for part in parts]
        self._members = [
            (members, list(members.values()))
            for state in self._states
            for members in (state["_modules"], state["_parameters"], state["_buffers"])
            if members
        ]
        self._ids = [[*map(id, values)] for _, values in self._members]
        self._weights = tuple(weights)
        owners = {id(owner): owner for part in parts for owner in (part, getattr(part, "config", None))}
        self._settings = [
            (owner, name, getattr(owner, name))
            for owner in owners.values()
            for name in _SETTINGS
            if hasattr(owner, name)
        ]

    def holds(self) -> bool:
        """Whether all of that is so."""
        for state in self._states:
            if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
                return False
        for (members, _), ids in zip(self._members, self._ids, strict=True):
            if [*map(id, members.values())] != ids:
                return False
        for owner, name, value in self._settings:
            if getattr(owner, name) != value:
                return False
        return all(weight.is_of(weight.values, weight.scales) for weight in self._weights)


def _is_readable(numbers: torch.Tensor) -> bool:
    # No parts of something that processes share.
    is_plain_tensor = type(numbers) in (torch.Tensor, nn.Parameter)
    return is_plain_tensor and numbers.device.type == "cpu" and numbers.is_contiguous() and numbers.dtype in NUMPY_TYPES


def remember(
    module: nn.Module,
    name: str,
    values: torch.Tensor,
    scales: torch.Tensor | None = None,
    block_rows: int = 64,
    num_outputs: int | None = None,
) -> StreamedWeight:
    """What is known of a module's weight of that name; see `StreamedWeight`."""
    known: dict[str, StreamedWeight] = vars(module).setdefault("_streamed", {})
    weight = known.get(name)
    if weight is None or not weight.is_of(values, scales):
        weight = known[name] = StreamedWeight(values, scales, block_rows, num_outputs)
    return weight


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module does no more than its class says: no hooks, and no function in its place."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def weights_of(*layers: nn.Module) -> tuple[StreamedWeight, ...] | None:
    """The weights of linear layers in the form that the kernels read; None if calling some layer does more."""
    weights: list[StreamedWeight] = []
    for layer in layers:
        # By the class: an adapter around a layer may pass on what it does not know.
        streamed_weight = getattr(type(layer), "streamed_weight", None)
        if streamed_weight is None or layer.bias is not None or not is_plain(layer):
            return None
        weights.append(streamed_weight(layer))
    return tuple(weights)
