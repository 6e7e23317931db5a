"""Products of a few rows with the weights of a few outputs, as much as there are registers for.

Where the inputs are bfloat16 and the weights int8, rows are rounded to integers of 16 bits, finer than bfloat16:
products of integers take half as long, since two are made and added up in one instruction. Some processors have such an
instruction for bfloat16, too, and rows stay what they are.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils

from .numbers import (
    BYTE,
    CACHE_LINE,
    ELEMENTS,
    FASTMATH,
    FLOAT,
    HAS_PAIR_PRODUCTS,
    INT,
    LANES,
    LONG,
    WORD,
    add_bfloat16_pairs,
    add_pairs,
    array_start,
    as_float,
    from_float32,
    intrinsic,
    load,
    load_vector,
    prefetch_line,
    to_float32,
)

ROWS_AT_ONCE = 4
# Of 32 registers for vectors 16 hold sums; processors without AVX-512 have half as many, or half as long ones.
OUTPUTS_AT_ONCE = 4 if LANES == 16 else 2
# How far ahead of its use memory is asked for. Half as far is slower, twice as far no faster.
BYTES_AHEAD = 5120

_FUSED = tuple(sorted(FASTMATH))
_INT16_MAX = 32767
_INT32_MAX = 2**31 - 1
_INT8_SIZE = 128
_SMALLEST_INPUT = 1e-30  # rows of nothing larger count as zero


@intrinsic(prefer_literal=True)
def _multiply_lines(
    typing_context: Any, rows: Any, first: Any, num_rows: Any, addresses: Any, ahead: Any, like: Any, sums: Any
) -> Any:
    """Multiplies rows by outputs, as far as their weights fill cache lines.

    Written for LLVM's vectors, since numba does not find this way itself: each input and each weight is loaded once
    for all products of the tile.

    Args:
        typing_context: Of numba.
        rows: See `multiply_tile`.
        first: Also.
        num_rows: Also, a constant.
        addresses: Of the weights of `OUTPUTS_AT_ONCE` outputs, a tuple.
        ahead: How many bytes ahead of their use weights are asked for.
        like: See `multiply_tile`.
        sums: Also.
    """
    are_words = rows.dtype in (types.int16, types.uint16)
    element, row_element, total_element = (
        ELEMENTS[like.dtype],
        WORD if are_words else FLOAT,
        INT if rows.dtype == types.int16 else FLOAT,
    )
    step = 2 * LANES if are_words else LANES
    line = CACHE_LINE * 8 // like.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows_value, first_value, _, addresses_value, ahead_value, _, sums_value = arguments
        num_inputs = cgutils.unpack_tuple(builder, context.make_array(rows)(context, builder, rows_value).shape)[1]
        inputs = array_start(context, builder, rows, rows_value, row_element)
        starts = [
            builder.gep(inputs, [builder.mul(builder.add(first_value, LONG(row)), num_inputs)])
            for row in range(num_rows.literal_value)
        ]
        pointers = cgutils.unpack_tuple(builder, addresses_value)
        outputs = [builder.inttoptr(address, element.as_pointer()) for address in pointers]
        nothing = ir.Constant(ir.VectorType(total_element, LANES), None)
        totals = [[cgutils.alloca_once_value(builder, nothing) for _ in outputs] for _ in starts]
        with cgutils.for_range(builder, builder.udiv(num_inputs, LONG(line)), intp=LONG) as loop:
            line_start = builder.mul(loop.index, LONG(line))
            for output in outputs:
                start = builder.bitcast(builder.gep(output, [line_start]), BYTE.as_pointer())
                prefetch_line(builder, builder.gep(start, [ahead_value]))
            for offset in range(0, line, step):
                place = [builder.add(line_start, LONG(offset))]
                weights = [load_vector(builder, builder.gep(output, place), element, step) for output in outputs]
                weights = [_as_factors(builder, like.dtype, weight, rows.dtype) for weight in weights]
                for start, row_totals in zip(starts, totals, strict=True):
                    numbers = load_vector(builder, builder.gep(start, place), row_element, step)
                    for weight, total in zip(weights, row_totals, strict=True):
                        builder.store(_add_products(builder, builder.load(total), numbers, weight), total)
        target = array_start(context, builder, sums, sums_value, FLOAT)
        for number, total in enumerate(total for row_totals in totals for total in row_totals):
            builder.store(_sum_of(builder, builder.load(total)), builder.gep(target, [LONG(number)]))
        return context.get_dummy_value()

    return types.void(rows, types.intp, num_rows, addresses, types.intp, like, sums), generate


def _as_factors(builder: Any, number: Any, weight: Any, row_number: Any) -> Any:
    """Weights as what rows are multiplied by: integers of 16 bits, bfloat16 as it is, or floats."""
    if row_number == types.int16:
        return builder.sext(weight, ir.VectorType(WORD, weight.type.count))
    if row_number == types.uint16:
        return weight
    return as_float(builder, number, weight)


def _add_products(builder: Any, total: Any, numbers: Any, weight: Any) -> Any:
    if total.type.element == INT:
        return builder.add(total, add_pairs(builder, weight, numbers))
    if weight.type.element == WORD:
        return add_bfloat16_pairs(builder, total, numbers, weight)
    return builder.fadd(total, builder.fmul(numbers, weight, flags=_FUSED), flags=_FUSED)


def _sum_of(builder: Any, total: Any) -> Any:
    """The elements of a vector, added up as floats."""
    if total.type.element == INT:
        total = builder.sitofp(total, ir.VectorType(FLOAT, LANES))
    kind = ir.FunctionType(FLOAT, [FLOAT, total.type])
    add_up = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return builder.call(add_up, [FLOAT(0), total], fastmath=("reassoc",))


@intrinsic
def _output_addresses(typing_context: Any, address: Any, row_bytes: Any, num_outputs: Any) -> Any:
    """Addresses of the weights of `OUTPUTS_AT_ONCE` outputs; those that there are not are the last one again."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, step, count = arguments
        last = builder.sub(count, LONG(1))
        addresses = []
        for output in range(OUTPUTS_AT_ONCE):
            number = builder.select(builder.icmp_signed("<", LONG(output), last), LONG(output), last)
            addresses.append(builder.add(start, builder.mul(number, step)))
        return context.make_tuple(builder, signature.return_type, addresses)

    return types.UniTuple(types.intp, OUTPUTS_AT_ONCE)(types.intp, types.intp, types.intp), generate


@njit
def multiply_tile(
    rows: Any, first: Any, num_rows: Any, address: Any, row_bytes: Any, num_outputs: Any, like: Any, sums: Any
) -> None:
    """Multiplies a few rows by the weights of a few outputs, and asks for the weights of the outputs behind them.

    Args:
        rows: [P, K] float32, or int16 for int8 weights, or bfloat16 for such weights, see `empty_rows`.
        first: The first row.
        num_rows: How many rows, see `rows_at_once`.
        address: Of the weights [.., K] of the first output.
        row_bytes: Bytes from one output to the next.
        num_outputs: How many, up to `OUTPUTS_AT_ONCE`.
        like: See `numbers.load`.
        sums: [`ROWS_AT_ONCE`, `OUTPUTS_AT_ONCE`] float32, written to; what belongs to other outputs is to be ignored.
    """
    addresses = _output_addresses(address, row_bytes, num_outputs)
    tile_bytes = row_bytes * OUTPUTS_AT_ONCE
    ahead = (BYTES_AHEAD + tile_bytes - 1) // tile_bytes * tile_bytes
    if num_rows == 4:
        _multiply_lines(rows, first, 4, addresses, ahead, like, sums)
    elif num_rows == 2:
        _multiply_lines(rows, first, 2, addresses, ahead, like, sums)
    else:
        _multiply_lines(rows, first, 1, addresses, ahead, like, sums)
    num_inputs = rows.shape[1]
    line = CACHE_LINE // like.itemsize
    for i in range(num_inputs // line * line, num_inputs):
        for output in range(OUTPUTS_AT_ONCE):
            weight = load(addresses[output], i, like)
            for row in range(num_rows):
                sums[row, output] += to_float32(rows[first + row, i]) * weight


@njit
def rows_at_once(num_rows: Any) -> Any:
    """How many of so many rows are multiplied next: 4, 2 or 1."""
    return ROWS_AT_ONCE if num_rows >= ROWS_AT_ONCE else min(num_rows, 2)


def empty_rows(shape: Any, inputs: Any, like: Any) -> Any:
    """Room for rows as `multiply_tile` takes them.

    That is int16 for inputs in bfloat16 and int8 weights, bfloat16 where both are and the processor multiplies pairs of
    them, or float32.
    """
    raise NotImplementedError("numba puts what is below in its place")


@extending.overload(empty_rows, strict=False)
def _empty_rows(shape: Any, inputs: Any, like: Any) -> Any:
    kinds = (inputs.dtype, like.dtype)
    dtype: Any = np.float32
    if kinds == (types.uint16, types.int8):
        dtype = np.int16
    elif kinds == (types.uint16, types.uint16) and HAS_PAIR_PRODUCTS:
        dtype = np.uint16
    return lambda shape, inputs, like: np.empty(shape, dtype)


def fill_row(numbers: Any, row: Any) -> Any:
    """Writes numbers [K] into a row [K] of float32, bfloat16 or int16; returns what to multiply this by."""
    raise NotImplementedError("numba puts what is below in its place")


@extending.overload(fill_row, strict=False)
def _fill_row(numbers: Any, row: Any) -> Any:
    return _round if row.dtype == types.int16 else _copy


def _copy(numbers: Any, row: Any) -> Any:
    for i in range(len(numbers)):
        row[i] = from_float32(to_float32(numbers[i]), row)
    return np.float32(1)


def _round(numbers: Any, row: Any) -> Any:
    largest = np.float32(0)
    not_a_number = np.float32(0)
    for i in range(len(numbers)):
        number = to_float32(numbers[i])
        largest = max(largest, abs(number))
        not_a_number += number * np.float32(0)  # of infinities, too
    # Long rows are rounded to fewer levels, so that no sum of products with int8 overflows.
    num_added = 2 * ((len(numbers) + 2 * LANES - 1) // (2 * LANES))
    num_levels = np.float32(min(_INT16_MAX, _INT32_MAX // (_INT8_SIZE * num_added)))
    is_finite = not_a_number == 0
    per_step = num_levels / largest if is_finite and largest > _SMALLEST_INPUT else np.float32(0)
    for i in range(len(numbers)):
        row[i] = np.int16(np.rint(to_float32(numbers[i]) * per_step))
    return largest / num_levels if is_finite else np.float32(np.nan)
