"""Norms and rotations of a few rows on the CPU, in one call each in the place of half a dozen of torch."""

import numpy as np
import torch

from .few_row_products import are_few_rows, as_array, as_tensor, can_run, kernels
from .streamed_weights import StreamedWeight


def normalize(hidden_states: torch.Tensor, weight: StreamedWeight, epsilon: float) -> torch.Tensor | None:
    """Root-mean-square norm.

    Args:
        hidden_states: [..., D].
        weight: [D].
        epsilon: Added to the mean square.

    Returns:
        [..., D]; None if it is to be computed otherwise.
    """
    if not weight.is_readable or hidden_states.dtype != weight.values.dtype:
        return None
    if not can_run(hidden_states, weight.values):
        return None
    rows = as_array(hidden_states.contiguous()).reshape(-1, weight.num_inputs)
    outputs = np.empty(rows.shape, rows.dtype)
    kernels().normalize_rows(rows, weight.addresses[0], weight.types[0], np.float32(epsilon), outputs)
    return as_tensor(outputs.reshape(hidden_states.shape), hidden_states.dtype)


def rotate_halves(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
    """Rotates the heads of one token, see `rotary_positions.rotate_halves`.

    Returns:
        [1, H, 1, head]; None if it is to be computed otherwise.
    """
    is_one_token = heads.shape[0] == heads.shape[2] == 1
    if not is_one_token or not are_few_rows(heads[0, :1]) or not can_run(heads):
        return None
    rows = as_array(heads.contiguous())[0, :, 0]
    outputs = np.empty(rows.shape, rows.dtype)
    kernels().rotate_halves(rows, cos.numpy()[0, 0], sin.numpy()[0, 0], outputs)
    return as_tensor(outputs.reshape(heads.shape), heads.dtype)
