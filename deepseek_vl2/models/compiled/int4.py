"""Products of few rows with int4 weights; see `products` for letters."""

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils

from .numbers import (
    BYTE,
    CACHE_LINE,
    FASTMATH,
    INT,
    LANES,
    LONG,
    STAMP,
    WORD,
    add_pairs,
    array_start,
    compiled,
    from_float32,
    intrinsic,
    load,
    load_vector,
    prefetch,
    prefetch_line,
    shuffle,
    splat,
)
from .products import multiply_rows, output_places
from .tiles import BYTES_AHEAD, ROWS_AT_ONCE, fill_row, rows_at_once

_CENTER = 8


@intrinsic(prefer_literal=True)
def _multiply_group(
    typing_context: Any,
    address: Any,
    levels: Any,
    row: Any,
    group: Any,
    products: Any,
    block_rows: Any,
    num_rows: Any,
) -> Any:
    """Multiplies a group of inputs by the nibbles of a block of outputs, in integers.

    Written for LLVM's vectors, since numba does not find this way itself: two inputs beside each other are multiplied
    and added in one instruction, once the nibbles of these two lie beside each other, too.

    Args:
        typing_context: Of numba.
        address: Of the weights of the block's first input of this group; each input has b / 2 bytes.
        levels: [P, K / g, g] int16, the inputs.
        row: The first row.
        group: Which inputs of the row.
        products: [4, b] int32, written to.
        block_rows: b, a constant.
        num_rows: How many rows, a constant.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address_value, levels_value, row_value, group_value, products_value, _, _ = arguments
        half_block = block_rows.literal_value // 2
        packed = builder.inttoptr(address_value, BYTE.as_pointer())
        num_groups, group_size = cgutils.unpack_tuple(
            builder, context.make_array(levels)(context, builder, levels_value).shape
        )[1:]
        inputs = array_start(context, builder, levels, levels_value, WORD)
        rows = []
        for number in range(num_rows.literal_value):
            groups = builder.mul(builder.add(row_value, LONG(number)), num_groups)
            rows.append(builder.gep(inputs, [builder.mul(builder.add(groups, group_value), group_size)]))
        nothing = ir.Constant(ir.VectorType(INT, LANES), None)
        num_vectors = 2 * half_block // LANES
        sums = [[cgutils.alloca_once_value(builder, nothing) for _ in range(num_vectors)] for _ in rows]
        with cgutils.for_range(builder, builder.udiv(group_size, LONG(2)), intp=LONG) as loop:
            position = builder.mul(loop.index, LONG(2))
            place = builder.gep(packed, [builder.mul(position, LONG(half_block))])
            prefetch_line(builder, builder.gep(place, [LONG(BYTES_AHEAD)]))
            nibbles = _unpack_pair(builder, load_vector(builder, place, BYTE, 2 * half_block))
            for start, row_sums in zip(rows, sums, strict=True):
                pair = load_vector(builder, builder.gep(start, [position]), WORD, 2)
                pairs = shuffle(builder, pair, [0, 1] * LANES)
                for total, words in zip(row_sums, nibbles, strict=True):
                    builder.store(builder.add(builder.load(total), add_pairs(builder, words, pairs)), total)
        target = array_start(context, builder, products, products_value, INT)
        for number, total in enumerate(total for row_sums in sums for total in row_sums):
            place = builder.bitcast(builder.gep(target, [LONG(number * LANES)]), ir.VectorType(INT, LANES).as_pointer())
            builder.store(builder.load(total), place, align=INT.width // 8)
        return context.get_dummy_value()

    arguments = (types.intp, levels, types.intp, types.intp, products, block_rows, num_rows)
    return types.void(*arguments), generate


def _unpack_pair(builder: Any, both: Any) -> list[Any]:
    """The bytes of two inputs -> vectors of words, outputs in order, those of the two inputs in turns."""
    half_block = both.type.count // 2
    in_turns = [place for output in range(half_block) for place in (output, output + half_block)]
    mixed = shuffle(builder, both, in_turns)
    low, high = [], []
    for start in range(0, 2 * half_block, 2 * LANES):
        part = shuffle(builder, mixed, list(range(start, start + 2 * LANES)))
        words = builder.zext(part, ir.VectorType(WORD, 2 * LANES))
        low.append(builder.and_(words, splat(words.type, 15)))
        high.append(builder.lshr(words, splat(words.type, 4)))
    return low + high


@njit
def round_row(numbers: Any, levels: Any, group_sums: Any) -> Any:
    """Rounds numbers [K] to levels [K / g, g], and adds these up by group [K / g]; returns the step between levels."""
    step = fill_row(numbers, levels.reshape(-1))
    for group in range(levels.shape[0]):
        total = np.int32(0)
        for i in range(levels.shape[1]):
            total += levels[group, i]
        group_sums[group] = total
    return step


@njit
def round_rows(inputs: Any, group_size: Any) -> Any:
    """Rounds rows [P, K]: levels [P, K / g, g] int16, their sums by group [P, K / g], and the steps [P]."""
    num_rows, num_inputs = inputs.shape
    num_groups = num_inputs // group_size
    levels = np.empty((num_rows, num_groups, group_size), np.int16)
    group_sums = np.empty((num_rows, num_groups), np.float32)
    steps = np.empty(num_rows, np.float32)
    for row in range(num_rows):
        steps[row] = round_row(inputs[row], levels[row], group_sums[row])
    return levels, group_sums, steps


def _int4_block(block_rows: int) -> Any:
    """What multiplies rows by a block of so many outputs."""

    @njit(fastmath=FASTMATH)
    def multiply_block(
        levels: Any, group_sums: Any, row: Any, count: Any, matrix: Any, block: Any, scale_like: Any, totals: Any
    ) -> None:
        """Multiplies a few rows, in steps of their rounding.

        Args:
            levels: [P, K / g, g] int16.
            group_sums: [P, K / g].
            row: The first row.
            count: How many rows, see `tiles.rows_at_once`.
            matrix: [4] int64, see `multiply_rows`.
            block: Number of the block.
            scale_like: See `multiply_rows`.
            totals: [4, b] float32, written to.
        """
        num_groups, group_size = levels.shape[1:]
        group_bytes = group_size * (block_rows // 2)
        scale_bytes = 2 * block_rows * scale_like.itemsize
        products = np.empty((ROWS_AT_ONCE, block_rows), np.int32)
        totals[:] = 0
        for group in range(num_groups):
            address = matrix[0] + (block * num_groups + group) * group_bytes
            scale_address = matrix[1] + (group * matrix[3] + block * block_rows) * 2 * scale_like.itemsize
            # Those of the next block follow; this one's have been asked for in the last.
            for line in range(scale_bytes, 2 * scale_bytes, CACHE_LINE):
                prefetch(scale_address + line)
            if count == 4:
                _multiply_group(address, levels, row, group, products, block_rows, 4)
            elif count == 2:
                _multiply_group(address, levels, row, group, products, block_rows, 2)
            else:
                _multiply_group(address, levels, row, group, products, block_rows, 1)
            for number in range(count):
                group_sum = group_sums[row + number, group]
                for i in range(block_rows):
                    scale = load(scale_address, 2 * i, scale_like)
                    center = load(scale_address, 2 * i + 1, scale_like)
                    product = np.float32(products[number, i]) - np.float32(_CENTER) * group_sum
                    totals[number, i] += product * scale + group_sum * center

    return multiply_block


# By name, since kernels that close over other functions are compiled in every process.
_multiply_block_of_32, _multiply_block_of_64 = _int4_block(32), _int4_block(64)


@njit
def multiply_block(
    block_rows: Any,
    levels: Any,
    group_sums: Any,
    row: Any,
    count: Any,
    matrix: Any,
    block: Any,
    scale_like: Any,
    totals: Any,
) -> None:
    """That of blocks of so many outputs, see `_int4_block`."""
    if block_rows == 64:
        _multiply_block_of_64(levels, group_sums, row, count, matrix, block, scale_like, totals)
    else:
        _multiply_block_of_32(levels, group_sums, row, count, matrix, block, scale_like, totals)


@cache
def int4_rows_kernel(block_rows: int) -> Any:
    """As `multiply_rows`, for int4 weights in blocks of so many outputs."""
    stamp = STAMP

    @compiled
    def multiply_int4_rows(
        num_threads: Any, inputs: Any, matrices: Any, spans: Any, group_size: Any, scale_like: Any, outputs: Any
    ) -> int:
        """Multiplies rows by int4 weights.

        Each row of inputs is rounded to 65,535 levels, finer than bfloat16: products of integers take half as long.

        Args:
            num_threads: See `multiply_rows`.
            inputs: See `multiply_rows`.
            matrices: See `multiply_rows`; N is a multiple of b.
            spans: See `multiply_rows`.
            group_size: g.
            scale_like: See `multiply_rows`.
            outputs: See `multiply_rows`.
        """
        levels, group_sums, steps = round_rows(inputs, group_size)
        starts, places = output_places(matrices, spans)
        num_blocks = starts[-1] // block_rows
        for part in prange(num_threads):
            totals = np.empty((ROWS_AT_ONCE, block_rows), np.float32)
            matrix = 0
            for unit in range(part * num_blocks // num_threads, (part + 1) * num_blocks // num_threads):
                while unit * block_rows >= starts[matrix + 1]:
                    matrix += 1
                num_outputs = matrices[matrix, 2]
                output = unit * block_rows - starts[matrix]
                row, end = spans[matrix]
                place = places[matrix] + output
                while row < end:
                    count = rows_at_once(end - row)
                    block = output // block_rows
                    current = matrices[matrix]
                    multiply_block(block_rows, levels, group_sums, row, count, current, block, scale_like, totals)
                    for number in range(count):
                        for i in range(block_rows):
                            outputs[place + i] = from_float32(totals[number, i] * steps[row + number], outputs)
                        place += num_outputs
                    row += count
        return stamp

    return multiply_int4_rows


# By name, see above.
_multiply_int4_rows_32, _multiply_int4_rows_64 = int4_rows_kernel(32), int4_rows_kernel(64)


@njit(inline="always")
def project(
    block_rows: Any,
    num_threads: Any,
    inputs: Any,
    places: Any,
    spans: Any,
    weight_type: Any,
    scale_like: Any,
    outputs: Any,
) -> None:
    """Multiplies rows by weights whose kind is known when this is compiled: 0, or outputs of int4 side by side."""
    if block_rows == 0:
        multiply_rows(num_threads, inputs, places, spans, weight_type, scale_like, outputs)
    elif block_rows == 64:
        _multiply_int4_rows_64(num_threads, inputs, places, spans, weight_type, scale_like, outputs)
    else:
        _multiply_int4_rows_32(num_threads, inputs, places, spans, weight_type, scale_like, outputs)
