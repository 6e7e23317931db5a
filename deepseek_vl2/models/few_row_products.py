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

import numpy as np
import torch
from torch import nn

logger = logging.getLogger(__name__)

# Up to so many rows of one matrix: with more, its weights are in the processor's caches for most of the time, where
# torch's products, which use instructions for matrices, are faster.
MAX_ROWS = 4
# int4 weights are held in bytes, two in each.
WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
# So many bytes of weights are read by one thread; for fewer another one costs more than it brings, and much more where
# other programs keep it waiting.
BYTES_A_THREAD = 2**17
# A single weight of fewer bytes is in a cache, where torch's product takes less time than the way to the kernel.
MIN_LINEAR_BYTES = 2**18
_TOLERANCE = 1e-5  # of the largest output: sums are formed in another order
# One caller at a time: not all of numba's pools of threads stand two.
_lock = threading.Lock()


class StreamedLinear(nn.Linear):
    """A linear layer that reads its weight at the speed of memory where a few rows on the CPU are multiplied by it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows [..., K] -> [..., N]."""
        output = linear(input, self.weight)
        if output is None:
            return super().forward(input)
        return output if self.bias is None else output + self.bias


def linear(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """Multiplies inputs [..., K] by a weight [N, K], which may be of another type.

    Returns:
        [..., N] in the type of the inputs; None if they are not a few rows, or the weight is small.
    """
    if weight.nbytes < MIN_LINEAR_BYTES:
        return None
    rows = inputs.reshape(-1, inputs.shape[-1])
    if not can_multiply(rows, weight, rows.shape[0]):
        return None
    return multiply(rows, weight).view(*inputs.shape[:-1], -1)


def multiply(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None = None,
    matrices: Sequence[int] = (0,),
    counts: Sequence[int] | None = None,
    block_rows: int = 64,
) -> torch.Tensor:
    """Multiplies rows by the matrices that they belong to; sums are in float32.

    Args:
        rows: [P, K] in bfloat16 or float32, those of one matrix beside each other.
        weight: [E, N, K] in float32, bfloat16 or int8, or [E, N, K / 2] uint8 of int4 weights as in
            `quantization.packing`; without E if there is one matrix.
        scales: bfloat16 [E, N] for int8, [E, K / g, N, 2] for int4; also.
        matrices: Numbers of the matrices that are used.
        counts: How many rows each of them multiplies; None if one has all.
        block_rows: Outputs of int4 weights that lie side by side.

    Returns:
        [P, N] in the type of the rows.
    """
    counts = [rows.shape[0]] if counts is None else counts
    if weight.dtype == torch.uint8 and rows.dtype == torch.float32:
        # The kernel rounds inputs to 16 bits: enough for bfloat16, but not for float32. So in two parts.
        steps = (
            rows.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(rows.dtype).tiny) / torch.iinfo(torch.int16).max
        )
        coarse = (rows / steps).round_() * steps
        both = torch.stack((coarse, rows - coarse), dim=1).flatten(0, 1)
        outputs = _run(both, weight, scales, matrices, [2 * count for count in counts], block_rows)
        return outputs.unflatten(0, (-1, 2)).sum(dim=1)
    return _run(rows, weight, scales, matrices, counts, block_rows)


def _run(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    matrices: Sequence[int],
    counts: Sequence[int],
    block_rows: int,
) -> torch.Tensor:
    """See `multiply`; int4 weights multiply rows that are rounded to 16 bits."""
    # Arrays from here on: what torch takes for a view or a shape is a part of a small product's time.
    inputs, values = _array(rows.contiguous()), _array(weight)
    factors = None if scales is None else _array(scales)
    num_outputs = values.shape[-2]
    outputs = np.empty((len(inputs), num_outputs), inputs.dtype)
    chosen, ends = np.array(matrices), np.array([0, *accumulate(counts)])
    kernels = _kernels(len(matrices) * num_outputs * values.shape[-1] * values.itemsize)
    with _lock:
        if weight.dtype == torch.uint8 and factors is not None:
            num_groups = factors.shape[-3]
            blocks = (num_outputs // block_rows, block_rows)
            kernels.int4_kernel(block_rows)(
                inputs.reshape(len(inputs), num_groups, -1),
                values.reshape(-1, blocks[0], inputs.shape[1], block_rows // 2),
                factors.reshape(-1, num_groups, *blocks, 2),
                chosen,
                ends,
                outputs.reshape(len(inputs), *blocks),
            )
        else:
            factors = None if factors is None else factors.reshape(-1, num_outputs)
            values = values.reshape(-1, num_outputs, inputs.shape[1])
            kernels.multiply_rows(inputs, values, factors, chosen, ends, outputs)
    return _tensor(outputs, rows.dtype)


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
    queries = _array(query.contiguous()).reshape(batch_size, key.shape[1], -1, query.shape[3])
    outputs = np.empty((*queries.shape[:3], value.shape[3]), queries.dtype)
    shown = None if visible is None else visible.bool().numpy()
    kernels = _kernels(key.nbytes + value.nbytes)
    with _lock:
        kernels.attend_one_token(queries, keys, values, key.shape[2], shown, np.float32(scaling), outputs)
    return _tensor(outputs, query.dtype).view(batch_size, 1, num_heads, -1)


def _with_room(cached: torch.Tensor) -> np.ndarray | None:
    """The cache [B, G, room, D] that a view [B, G, K, D] begins, if it lies in one piece."""
    batch_size, num_groups, _, width = cached.shape
    step = cached.stride(1)
    is_dense = cached.stride() == (num_groups * step, step, width, 1) and step % width == 0
    end = cached.storage_offset() + batch_size * num_groups * step
    if not is_dense or end * cached.element_size() > cached.untyped_storage().nbytes():
        return None
    return _array(cached.as_strided((batch_size, num_groups, step // width, width), cached.stride()))


def _array(numbers: torch.Tensor) -> np.ndarray:
    """The same memory for numba, which knows no bfloat16: as the integers that its bits are."""
    if numbers.requires_grad:
        numbers = numbers.detach()
    return (numbers.view(torch.uint16) if numbers.dtype == torch.bfloat16 else numbers).numpy()


def _tensor(numbers: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(numbers).view(dtype)


def _kernels(num_bytes: int) -> ModuleType:
    """The kernels, set to torch's number of threads, or to fewer if there is little to read."""
    numba, kernels = _modules()
    num_useful = max(num_bytes // BYTES_A_THREAD, 1)
    num_threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, num_useful)
    if numba.get_num_threads() != num_threads:
        numba.set_num_threads(num_threads)
    return kernels


@functools.cache
def _modules() -> tuple[ModuleType, ModuleType]:
    """numba and the kernels; not above, since they take as long to import as transformers' models."""
    import numba

    from . import compiled_kernels

    return numba, compiled_kernels


def can_attend(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether `attend` may take the place of products by torch."""
    return _can_run(query, key)


def can_multiply(rows: torch.Tensor, weight: torch.Tensor, most_rows: int) -> bool:
    """Whether a product is one of few rows on the CPU, and neither differentiated nor traced by a compiler.

    Args:
        rows: [P, K].
        weight: As for `multiply`.
        most_rows: Rows of the matrix that multiplies the most.
    """
    num_inputs = weight.shape[-1] * (2 if weight.dtype == torch.uint8 else 1)
    return 0 < most_rows <= MAX_ROWS and rows.shape[1] == num_inputs and _can_run(rows, weight)


def _can_run(inputs: torch.Tensor, streamed: torch.Tensor) -> bool:
    return (
        type(inputs) is torch.Tensor
        and type(streamed) in (torch.Tensor, nn.Parameter)  # no parts of something shared between processes
        and inputs.device.type == streamed.device.type == "cpu"
        and inputs.dtype in (torch.bfloat16, torch.float32)
        and streamed.dtype in WEIGHT_TYPES
        and not (torch.is_grad_enabled() and (inputs.requires_grad or streamed.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and is_supported(streamed.dtype)
    )


@functools.cache
def is_supported(weight_type: torch.dtype) -> bool:
    """Whether products with weights of a type work here; the log says why not.

    Args:
        weight_type: float32, bfloat16, int8, or uint8 for int4.
    """
    try:
        numba, _ = _modules()
    except ImportError as error:
        logger.warning("Answers take longer on this CPU: numba, which compiles products for it, fails: %s", error)
        return False
    try:
        is_right = _is_right(weight_type)
    except (numba.core.errors.NumbaError, RuntimeError) as error:
        logger.warning("Answers take longer on this CPU: products are not compiled for %s: %s", weight_type, error)
        return False
    if not is_right:
        logger.warning("Answers take longer on this CPU: compiled products with %s weights are wrong", weight_type)
    return is_right


def _is_right(weight_type: torch.dtype) -> bool:
    # Not above: that package uses this module.
    from .quantization import packing
    from .quantization.config import WeightFormat

    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.inference_mode():
        values = torch.randn(2, 2 * packing.BLOCK_ROWS, 192, generator=generator)
        rows = torch.randn(MAX_ROWS + 2, 192, generator=generator)
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
        found = multiply(rows, weight, scales, (1, 0), (1, MAX_ROWS + 1))
        expected = torch.cat((rows[:1] @ exact[1].t(), rows[1:] @ exact[0].t()))
        return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())
