"""Products with quantised weights: torch's packed kernels for some rows, dequantising for many.

The packed kernels are private operators of torch. Each is tried once a process on small numbers, and without it, or
with wrong results, plain torch takes its place; the log says so. The fewest rows are left to `few_row_products`.
"""

import functools
import logging

import torch

from .. import cpu_features
from . import packing
from .config import WeightFormat

logger = logging.getLogger(__name__)

# Up to so many rows the packed kernel is used, by bits a weight. It reads each weight once for a few rows, which is
# what decoding waits for, but multiplies without the processor's bfloat16 instructions; from some number of rows on it
# is cheaper to dequantise a block of weights and use the fast product. That is later for int4 than for int8, since
# taking nibbles apart costs more than converting bytes: at 128 and at 12 rows, on two cores with AVX512.
PACKED_MAX_ROWS = {8: 12, 4: 128}
# The same where products are computed in float32 for want of such instructions: at 500 and 900 rows, measured on the
# same cores. Kept well below, since other processors' kernels differ.
PACKED_MAX_ROWS_WITHOUT_BFLOAT16 = {8: 128, 4: 256}
# Weights dequantised at once: an expert of the largest model in one piece (16 MB in bfloat16), output layers in parts.
# Smaller blocks stay in a faster cache, but make a prompt a fifth slower on CPUs with bfloat16 instructions.
DEQUANTIZED_AT_ONCE = 2**23
# torch's int8 kernel crashes the process unless all rows of inputs and weights begin at such addresses, in bytes.
INT8_INPUT_ALIGNMENT = 32
INT8_WEIGHT_ALIGNMENT = 16
INT8_PACKED_MULTIPLE = 16  # so many numbers a row keep both
_TOLERANCE = 0.02  # of the largest output: bfloat16 inputs and outputs


def linear(
    inputs: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, weight_format: WeightFormat, num_outputs: int
) -> torch.Tensor:
    """Multiplies inputs [..., K] by a quantised weight [N, K]; see `packing` for its layout.

    Returns:
        [..., N] in the type of the inputs.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    check_activations(rows.dtype)
    if weight_format.group_size is None:
        output = _int8_product(rows, weight, scales)
    else:
        output = _int4_product(rows, weight, scales, weight_format.group_size, num_outputs)
    return output.view(*inputs.shape[:-1], num_outputs)


def check_activations(dtype: torch.dtype) -> None:
    """Refuses float16, in which products of integers overflow.

    Raises:
        ValueError: For float16.
    """
    if dtype == torch.float16:
        raise ValueError("Quantised weights do not work in float16. Choose bfloat16 (fastest) or float32.")


def packed_max_rows(bits: int) -> int:
    """Up to how many rows the packed kernel of so many bits is used on this machine."""
    limits = PACKED_MAX_ROWS if cpu_features.has_fast_bfloat16() else PACKED_MAX_ROWS_WITHOUT_BFLOAT16
    return limits[bits]


def _are_few(rows: torch.Tensor, bits: int) -> bool:
    return rows.dtype == torch.bfloat16 and 0 < rows.shape[0] <= packed_max_rows(bits)


def _int8_product(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    if _are_few(rows, bits=8) and has_int8_kernel():
        rows = rows.contiguous()
        is_aligned = (
            rows.shape[1] % INT8_PACKED_MULTIPLE == 0
            and rows.data_ptr() % INT8_INPUT_ALIGNMENT == 0
            and weight.data_ptr() % INT8_WEIGHT_ALIGNMENT == 0
        )
        if is_aligned:
            return torch.ops.aten._weight_int8pack_mm(rows, weight, scales.bfloat16())
    return _int8_product_of_many_rows(rows, weight, scales)


def _int8_product_of_many_rows(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    output = rows.new_empty(rows.shape[0], weight.shape[0])
    rows = rows.to(cpu_features.product_dtype(rows))
    blocks = packing.row_blocks(weight.shape[0], weight.shape[1], DEQUANTIZED_AT_ONCE)
    for start in blocks:
        block = slice(start, start + blocks.step)
        # Integers up to 127 are exact in bfloat16; the scale of an output is cheaper on the output.
        output[:, block] = (rows @ weight[block].to(rows.dtype).t()) * scales[block].to(rows.dtype)
    return output


def _int4_product(
    rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, group_size: int, num_outputs: int
) -> torch.Tensor:
    if _are_few(rows, bits=4) and has_int4_kernel():
        output = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), weight, group_size, scales.bfloat16())
        return output[:, :num_outputs]
    return _int4_product_of_many_rows(rows, weight, scales, group_size, num_outputs)


def _int4_product_of_many_rows(
    rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, group_size: int, num_outputs: int
) -> torch.Tensor:
    output = rows.new_empty(rows.shape[0], num_outputs)
    rows = rows.to(cpu_features.product_dtype(rows))
    blocks = packing.row_blocks(weight.shape[0], rows.shape[1], DEQUANTIZED_AT_ONCE)
    for start in blocks:
        stop = min(start + blocks.step, num_outputs)
        values = packing.dequantize_int4_transposed(
            weight[start : start + blocks.step],
            scales[:, start : start + blocks.step],
            group_size,
            rows.dtype,
            machine_block_rows(),
        )
        output[:, start:stop] = (rows @ values)[:, : stop - start]
    return output


@functools.cache
def has_int8_kernel() -> bool:
    """Whether torch's int8 kernel is there and right."""
    rows, weight, scales, expected = _sample_product(24, 3 * INT8_PACKED_MULTIPLE, WeightFormat(8))
    is_right = False
    if hasattr(torch.ops.aten, "_weight_int8pack_mm"):
        is_right = _is_close(_try_int8(rows, weight, scales), expected)
    if not is_right:
        logger.warning("torch's int8 kernel is not usable here; a slower way with the same results takes its place.")
    return is_right


def _try_int8(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor | None:
    try:
        return torch.ops.aten._weight_int8pack_mm(rows, weight, scales)
    except (RuntimeError, TypeError):  # not built for this processor, or called otherwise in another version
        return None


@functools.cache
def _int4_block_rows() -> int | None:
    """Outputs side by side in the bytes that torch's int4 kernel reads here, None if it is not usable."""
    group_size = 64
    rows, weight, scales, expected = _sample_product(2 * packing.BLOCK_ROWS, 192, WeightFormat(4, group_size))
    if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        for block_rows in (packing.BLOCK_ROWS, packing.BLOCK_ROWS // 2):
            packed = packing.with_block_rows(weight, packing.BLOCK_ROWS, block_rows)
            if _is_close(_try_int4(rows, packed, scales, group_size), expected):
                return block_rows
    logger.warning("torch's int4 kernel is not usable here; a slower way with the same results takes its place.")
    return None


def _try_int4(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor | None:
    try:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, group_size, scales)
    except (RuntimeError, TypeError):  # as for int8
        return None


def _sample_product(
    num_rows: int, num_inputs: int, weight_format: WeightFormat
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A small input [3, K], a quantised weight, its scales, and their product [3, N] in float32."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        values = torch.randn(num_rows, num_inputs, generator=generator)
        rows = torch.randn(3, num_inputs, generator=generator).bfloat16()
        weight, scales = packing.empty_weight(num_rows, num_inputs, weight_format)
        packing.quantize_into(values, weight, scales, weight_format)
        expected = rows.float() @ packing.dequantize(weight, scales, weight_format, num_rows).t()
    return rows, weight, scales, expected


def _is_close(output: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return output is not None and bool((output.float() - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def has_int4_kernel() -> bool:
    """Whether torch's int4 kernel is there and right."""
    return _int4_block_rows() is not None


def machine_block_rows() -> int:
    """How int4 weights lie in memory on this machine: as in checkpoints, unless the kernel wants it otherwise."""
    return _int4_block_rows() or packing.BLOCK_ROWS
