"""Products of few rows with many weights on the CPU, as fast as it reads memory: what decoding waits for.

The kernels are compiled by numba, which needs no compiler on the machine. Each kind is tried once a process on small
numbers; where numba is missing or a result is wrong, callers take another way, and the log says so.
"""

import functools
import logging
import threading
from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from .streamed_weights import NUMPY_TYPES, StreamedWeight, remember

logger = logging.getLogger(__name__)

# Up to so many rows of one matrix: with more, its weights are in the processor's caches for most of the time, where
# torch's products, which use instructions for matrices, are faster.
MAX_ROWS = 16
INPUT_TYPES = (torch.float32, torch.bfloat16)
# So many bytes of weights are read by one thread; for fewer another one costs more than it brings, and much more where
# other programs keep it waiting.
BYTES_A_THREAD = 2**17
# Weights of fewer bytes are in a cache, where torch's product takes less time than the way to the kernel.
MIN_LINEAR_BYTES = 2**18
# Of the largest output: sums are formed in another order, and rounded to eight bits in bfloat16.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
# One caller at a time: not all of numba's pools of threads stand two.
_lock = threading.Lock()


class StreamedLinear(nn.Linear):
    """A linear layer that reads its weight at the speed of memory where a few rows on the CPU are multiplied by it."""

    def streamed_weight(self) -> StreamedWeight:
        """The weight in the form that the kernels read."""
        return remember(self, "weight", self.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows [..., K] -> [..., N]."""
        output = project(input, self.streamed_weight()) if are_few_rows(input) else None
        if output is None:
            return super().forward(input)
        return output if self.bias is None else output + self.bias


def are_few_rows(inputs: torch.Tensor, most_rows: int = MAX_ROWS) -> bool:
    """Whether inputs [..., K] are no more rows than so many, on the CPU, and no compiler traces them."""
    return (
        type(inputs) is torch.Tensor
        and not torch.compiler.is_compiling()
        and 0 < inputs.numel() <= most_rows * inputs.shape[-1]
        and inputs.device.type == "cpu"
    )


def project(inputs: torch.Tensor, weight: StreamedWeight) -> torch.Tensor | None:
    """Multiplies inputs by a weight.

    Args:
        inputs: [..., K] in bfloat16 or float32.
        weight: [N, K].

    Returns:
        [..., N] in the type of the inputs; None if they are not a few rows, or the weight is small and as torch takes
        it.
    """
    if weight.scales is None and weight.num_rows * weight.row_bytes < MIN_LINEAR_BYTES:
        return None
    rows = inputs.reshape(-1, inputs.shape[-1])
    num_rows = rows.shape[0]
    if not can_multiply(rows, num_rows, weight):
        return None
    outputs = multiply(rows, weight, (0,), (num_rows,))
    return outputs.view(*inputs.shape[:-1], weight.num_outputs)


def multiply(
    rows: torch.Tensor, weight: StreamedWeight, matrices: Sequence[int], counts: Sequence[int]
) -> torch.Tensor:
    """Multiplies rows by the matrices that they belong to; sums are in float32.

    Args:
        rows: [P, K] in bfloat16 or float32, those of one matrix beside each other.
        weight: [E, N, K], or [N, K] which is matrix 0.
        matrices: Numbers of the matrices that are used.
        counts: How many rows each of them multiplies.

    Returns:
        [P, N] in the type of the rows.
    """
    if not (weight.is_int4 and rows.dtype == torch.float32):
        return _multiply(rows, weight, matrices, counts)
    # The kernel rounds inputs to 16 bits: enough for bfloat16, but not for float32. So in two parts.
    largest = rows.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(rows.dtype).tiny)
    steps = largest / torch.iinfo(torch.int16).max
    coarse = (rows / steps).round_() * steps
    both = torch.stack((coarse, rows - coarse), dim=1).flatten(0, 1)
    outputs = _multiply(both, weight, matrices, [2 * count for count in counts])
    return outputs.unflatten(0, (-1, 2)).sum(dim=1)


def _multiply(
    rows: torch.Tensor, weight: StreamedWeight, matrices: Sequence[int], counts: Sequence[int]
) -> torch.Tensor:
    """See `multiply`; int4 weights multiply rows that are rounded to 16 bits."""
    inputs = as_array(rows.contiguous())
    outputs = np.empty((len(inputs), weight.num_rows), inputs.dtype)
    ends = list(accumulate(counts))
    spans = np.array(list(zip([0, *ends[:-1]], ends, strict=True)))
    kernel = kernels().int4_rows_kernel(weight.block_rows) if weight.is_int4 else kernels().multiply_rows
    num_threads = threads_for(len(matrices) * weight.num_rows * weight.row_bytes)
    places = weight.places[list(matrices)]
    run_kernel(kernel, num_threads, inputs, places, spans, *weight.types, outputs.reshape(-1))
    # Blocks of int4 weights are filled up.
    return as_tensor(outputs[:, : weight.num_outputs], rows.dtype)


def run_kernel(kernel: Any, num_threads: int, *arguments: Any) -> None:
    """Calls a compiled kernel in so many threads."""
    numba, _ = _modules()
    with _lock:
        if numba.get_num_threads() != num_threads:
            numba.set_num_threads(num_threads)
        kernel(num_threads, *arguments)


def has_numba() -> bool:
    """Whether kernels can be had; the log says why not."""
    try:
        _modules()
    except ImportError as error:
        logger.warning("Answers take longer on this CPU: numba, which compiles products for it, fails: %s", error)
        return False
    return True


def try_kernel(kernel: Any, num_threads: int, *arguments: Any) -> bool:
    """As `run_kernel`; whether it could be compiled, which happens at the first call. The log says why not."""
    try:
        run_kernel(kernel, num_threads, *arguments)
    except (_modules()[0].core.errors.NumbaError, RuntimeError) as error:
        logger.warning("Answers take longer on this CPU: %s is not compiled: %s", kernel.__name__, error)
        return False
    return True


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, scaling: float
) -> torch.Tensor | None:
    """Attention of one token a row to those in a cache, which is read once.

    Args:
        query: [B, H, 1, D].
        key: [B, G, K, D], G dividing H; it and `value` may be views of a longer cache.
        value: [B, G, K, V].
        visible: [B, K], not 0 where a token may be seen; None for all.
        scaling: Factor on the scores.

    Returns:
        [B, 1, H, V] in the type of the query; None if the cache lies in memory in another way, or `visible` has another
        shape.
    """
    keys, values = _with_room(key), _with_room(value)
    if keys is None or values is None or (visible is not None and visible.shape != (key.shape[0], key.shape[2])):
        return None
    batch_size, num_heads = query.shape[:2]
    queries = as_array(query.contiguous()).reshape(batch_size, key.shape[1], -1, query.shape[3])
    outputs = np.empty((*queries.shape[:3], value.shape[3]), queries.dtype)
    arguments = (queries, keys, values, key.shape[2], as_visible(visible), np.float32(scaling), outputs)
    run_kernel(kernels().attend_one_token, threads_for(key.nbytes + value.nbytes), *arguments)
    return as_tensor(outputs, query.dtype).view(batch_size, 1, num_heads, -1)


def as_visible(visible: torch.Tensor | None) -> np.ndarray:
    """What tokens may be seen [B, K] as the kernels take it: bool, and [0, 0] for all."""
    return np.empty((0, 0), np.bool_) if visible is None else visible.bool().contiguous().numpy()


def _with_room(cached: torch.Tensor) -> np.ndarray | None:
    """The cache [B, G, room, D] that a view [B, G, K, D] begins, if it lies in one piece."""
    batch_size, num_groups, _, width = cached.shape
    step = cached.stride(1)
    is_dense = cached.stride() == (num_groups * step, step, width, 1) and step % width == 0
    end = cached.storage_offset() + batch_size * num_groups * step
    if not is_dense or end * cached.element_size() > cached.untyped_storage().nbytes():
        return None
    return as_array(cached.as_strided((batch_size, num_groups, step // width, width), cached.stride()))


def as_array(numbers: torch.Tensor) -> np.ndarray:
    """The same memory for numba, which knows no bfloat16: as the integers that its bits are."""
    if numbers.requires_grad:
        numbers = numbers.detach()
    return (numbers.view(torch.uint16) if numbers.dtype == torch.bfloat16 else numbers).numpy()


def as_tensor(numbers: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The same memory for torch."""
    return torch.from_numpy(numbers).view(dtype)


def threads_for(num_bytes: int) -> int:
    """torch's number of threads, or fewer if there is little to read."""
    num_useful = max(num_bytes // BYTES_A_THREAD, 1)
    return min(torch.get_num_threads(), _modules()[0].config.NUMBA_NUM_THREADS, num_useful)


def kernels() -> ModuleType:
    """The kernels, `compiled`."""
    return _modules()[1]


@functools.cache
def _modules() -> tuple[ModuleType, ModuleType]:
    """numba and the kernels; not above, since they take as long to import as transformers' models."""
    import numba

    from . import compiled

    return numba, compiled


def can_attend(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether `attend` may take the place of products by torch."""
    return type(key) is torch.Tensor and key.device.type == "cpu" and can_run(query, key)


def can_multiply(rows: torch.Tensor, most_rows: int, weight: StreamedWeight) -> bool:
    """Whether a product is one of few rows on the CPU, and neither differentiated nor traced by a compiler.

    Args:
        rows: [P, K].
        most_rows: Rows of the matrix that multiplies the most.
        weight: What they are to be multiplied by.
    """
    return (
        0 < most_rows <= MAX_ROWS
        and weight.is_readable
        and weight.num_inputs == rows.shape[1]
        and can_run(rows, weight.values)
    )


def can_run(inputs: torch.Tensor, first: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether kernels may run on inputs, and weights or a cache on the CPU, that no gradient is asked of."""
    return (
        type(inputs) is torch.Tensor
        and inputs.device.type == "cpu"
        and inputs.dtype in INPUT_TYPES
        and first.dtype in NUMPY_TYPES
        and not (torch.is_grad_enabled() and any(numbers.requires_grad for numbers in (inputs, first, *others)))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and is_supported(inputs.dtype, first.dtype)
    )


@functools.cache
def is_supported(input_type: torch.dtype, weight_type: torch.dtype) -> bool:
    """Whether products of inputs with weights of these types work here; the log says why not.

    Args:
        input_type: One of `INPUT_TYPES`.
        weight_type: float32, bfloat16, int8, or uint8 for int4.
    """
    if not has_numba():
        return False
    kinds = f"{input_type} by {weight_type}"
    try:
        is_right = _is_right(input_type, weight_type)
    except (_modules()[0].core.errors.NumbaError, RuntimeError) as error:
        logger.warning("Answers take longer on this CPU: products of %s are not compiled: %s", kinds, error)
        return False
    if not is_right:
        logger.warning("Answers take longer on this CPU: compiled products of %s are wrong", kinds)
    return is_right


def _is_right(input_type: torch.dtype, weight_type: torch.dtype) -> bool:
    # Not above: that package uses this module.
    from .quantization import packing
    from .quantization.config import WeightFormat

    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.inference_mode():
        values = torch.randn(2, 2 * packing.BLOCK_ROWS, 192, generator=generator)
        rows = torch.randn(MAX_ROWS + 2, 192, generator=generator).to(input_type)
        if weight_type.is_floating_point:
            weight, scales = values.to(weight_type), None
            exact = weight.float()
        else:
            exact = torch.empty_like(values)
            weight_format = WeightFormat(8) if weight_type == torch.int8 else WeightFormat(4, 64)
            weight, scales = packing.empty_weight(values.shape[1], values.shape[2], weight_format, (2,))
            for matrix in range(2):
                packing.quantize_into(values[matrix], weight[matrix], scales[matrix], weight_format)
                exact[matrix] = packing.dequantize(weight[matrix], scales[matrix], weight_format, values.shape[1])
        found = multiply(rows, StreamedWeight(weight, scales), (1, 0), (1, MAX_ROWS + 1))
        expected = torch.cat((rows[:1].float() @ exact[1].t(), rows[1:].float() @ exact[0].t()))
        return bool((found.float() - expected).abs().max() <= _TOLERANCES[input_type] * expected.abs().max())
