"""Products of few rows with many weights, compiled by numba for the processor at hand; see `few_row_products`.

Such a product waits for memory: each weight is read once, for a row or a few. Two things make these kernels read as
fast as the memory gives. Weights are asked for well before they are used, since short rows and jumps between experts
keep ending what the processor foresees by itself. And int4 weights are taken apart in so few instructions that the
processor waits for the memory and not the other way round.

Letters: P rows [P, K] in all, those of one matrix beside each other; E matrices (experts, or one) [N, K]; g inputs a
group of int4 weights, of which b outputs lie side by side, 32 or 64 (see `quantization.packing`).
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, prange, types
from numba.core import cgutils

logger = logging.getLogger(__name__)

_INT4_CENTER = 8
_INT16_MAX = 32767
_SMALLEST_INPUT = 1e-30  # rows of nothing larger count as zero
# How far ahead of its use memory is asked for. Half as far is slower, twice as far no faster.
_BYTES_AHEAD = 5120
_CACHE_LINE = 64
_ROWS_AT_ONCE = 4
_LOWEST = np.finfo(np.float32).min  # score of a hidden token; where all are hidden, all count alike

_BYTE, _WORD, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_LANES = 16  # of 32 bits; LLVM takes shorter vectors where the processor has no such long ones


_intrinsic: Any = extending.intrinsic  # its own annotations count the first argument, which callers do not pass


def _compiled(function: Callable[..., None]) -> Any:
    """Compiles at the first call; the result is kept beside the source or in the user's cache folder."""
    # Sums in any order, so that they run in vectors; infinities and not-a-numbers stay what they are.
    options: dict[str, Any] = {"parallel": True, "nogil": True, "fastmath": {"reassoc", "contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError as error:  # no folder to write to
        logger.info("%s is compiled in every process: %s", function.__name__, error)
        return njit(**options)(function)


@_intrinsic
def _to_float32(typing_context: Any, number: Any) -> Any:
    """A float32 as it is, an int8, or a bfloat16 that comes as uint16: it is the upper half of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if number == types.float32:
            return arguments[0]
        if number == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(arguments[0], _INT), _INT(16)), ir.FloatType())
        return builder.sitofp(arguments[0], ir.FloatType())

    return types.float32(number), generate


@_intrinsic
def _from_float32(typing_context: Any, number: Any, like: Any) -> Any:
    """A float32 as it is, or rounded to the nearest bfloat16 if that is what the array `like` holds as uint16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like.dtype == types.float32:
            return arguments[0]
        bits = builder.bitcast(arguments[0], _INT)
        is_odd = builder.and_(builder.lshr(bits, _INT(16)), _INT(1))
        rounded = builder.add(bits, builder.add(is_odd, _INT(0x7FFF)))  # halves go to the even neighbour
        quiet = builder.or_(bits, _INT(0x00400000))  # rounding up would make an infinity of a not-a-number
        is_number = builder.fcmp_ordered("ord", arguments[0], arguments[0])
        return builder.trunc(builder.lshr(builder.select(is_number, rounded, quiet), _INT(16)), _WORD)

    return like.dtype(types.float32, like), generate


@_intrinsic
def _prefetch(typing_context: Any, array: Any, offset: Any) -> Any:
    """Asks for the cache line so many bytes behind an array's start; that may be memory of something else."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch_line(builder, builder.gep(_start(context, builder, array, arguments[0], _BYTE), [arguments[1]]))
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def _prefetch_line(builder: Any, pointer: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # Into the second cache: in the first it would crowd out the inputs.
    is_write, locality, is_data = _INT(0), _INT(2), _INT(1)
    builder.call(function, [pointer, is_write, locality, is_data])


def _start(context: Any, builder: Any, array_type: Any, array: Any, element: Any) -> Any:
    """Pointer to an array's first element."""
    return builder.bitcast(context.make_array(array_type)(context, builder, array).data, element.as_pointer())


@_compiled
def multiply_rows(inputs: Any, weight: Any, scales: Any, matrices: Any, ends: Any, outputs: Any) -> None:
    """Multiplies rows by float32, bfloat16 or int8 weights.

    Args:
        inputs: [P, K], here and below numbers are float32 or the bits of bfloat16 as uint16.
        weight: [E, N, K] numbers or int8.
        scales: [E, N] factors on the outputs, or None.
        matrices: [S] int64, the matrices that are used.
        ends: [S + 1] int64; matrix s multiplies the rows from `ends[s]` up to `ends[s + 1]`.
        outputs: [P, N] numbers, written to.
    """
    num_outputs, num_inputs = weight.shape[1:]
    rows = np.empty(inputs.shape, np.float32)
    for row in range(len(inputs)):
        for i in range(num_inputs):
            rows[row, i] = _to_float32(inputs[row, i])
    row_bytes = num_inputs * weight.itemsize
    for unit in prange(len(matrices) * num_outputs):
        segment = unit // num_outputs
        matrix = matrices[segment]
        output = unit % num_outputs
        start = (matrix * num_outputs + output) * row_bytes + _BYTES_AHEAD
        for offset in range(0, row_bytes, _CACHE_LINE):
            _prefetch(weight, start + offset)
        values = weight[matrix, output]
        scale = np.float32(1) if scales is None else _to_float32(scales[matrix, output])
        row, end = ends[segment], ends[segment + 1]
        while row + _ROWS_AT_ONCE <= end:  # so each weight is turned into a float once for all of them
            first, second, third, fourth = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for i in range(num_inputs):
                value = _to_float32(values[i])
                first += rows[row, i] * value
                second += rows[row + 1, i] * value
                third += rows[row + 2, i] * value
                fourth += rows[row + 3, i] * value
            outputs[row, output] = _from_float32(first * scale, outputs)
            outputs[row + 1, output] = _from_float32(second * scale, outputs)
            outputs[row + 2, output] = _from_float32(third * scale, outputs)
            outputs[row + 3, output] = _from_float32(fourth * scale, outputs)
            row += _ROWS_AT_ONCE
        while row < end:
            total = np.float32(0)
            for i in range(num_inputs):
                total += rows[row, i] * _to_float32(values[i])
            outputs[row, output] = _from_float32(total * scale, outputs)
            row += 1


def _vector(element: Any, count: int) -> Any:
    return ir.VectorType(element, count)


def _all(kind: Any, number: int) -> Any:
    return ir.Constant(kind, [number] * kind.count)


def _variable(builder: Any) -> Any:
    """Sixteen sums of 32 bits, 0 at first; LLVM keeps them in a register."""
    start = _all(_vector(_INT, _LANES), 0)
    variable = cgutils.alloca_once(builder, start.type)
    builder.store(start, variable)
    return variable


def _load(builder: Any, pointer: Any, element: Any, count: int) -> Any:
    return builder.load(builder.bitcast(pointer, _vector(element, count).as_pointer()), align=element.width // 8)


def _shuffle(builder: Any, vector: Any, places: list[int]) -> Any:
    return builder.shuffle_vector(
        vector, ir.Constant(vector.type, ir.Undefined), ir.Constant(_vector(_INT, len(places)), places)
    )


def _add_pairs(builder: Any, left: Any, right: Any) -> Any:
    """Products of 16 bits by 16 bits, those of two neighbours added."""
    wide = _vector(_INT, 2 * _LANES)
    products = builder.mul(builder.sext(left, wide), builder.sext(right, wide))
    even, odd = (_shuffle(builder, products, list(range(start, 2 * _LANES, 2))) for start in (0, 1))
    return builder.add(even, odd)


@_intrinsic(prefer_literal=True)
def _multiply_group(
    typing_context: Any,
    weight: Any,
    offset: Any,
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
        weight: Array of uint8.
        offset: Bytes to the block's first input of this group; each input has b / 2.
        levels: [P, K / g, g] int16, the inputs.
        row: The first row.
        group: Which inputs of the row.
        products: [4, b] int32, written to.
        block_rows: b, a constant.
        num_rows: How many rows, a constant.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weight_value, offset_value, levels_value, row_value, group_value, products_value, _, _ = arguments
        half_block = block_rows.literal_value // 2
        packed = builder.gep(_start(context, builder, weight, weight_value, _BYTE), [offset_value])
        num_groups, group_size = cgutils.unpack_tuple(
            builder, context.make_array(levels)(context, builder, levels_value).shape
        )[1:]
        inputs = _start(context, builder, levels, levels_value, _WORD)
        rows = []
        for number in range(num_rows.literal_value):
            groups = builder.mul(builder.add(row_value, _LONG(number)), num_groups)
            rows.append(builder.gep(inputs, [builder.mul(builder.add(groups, group_value), group_size)]))
        sums = [[_variable(builder) for _ in range(2 * half_block // _LANES)] for _ in rows]
        with cgutils.for_range(builder, builder.udiv(group_size, _LONG(2)), intp=_LONG) as loop:
            position = builder.mul(loop.index, _LONG(2))
            place = builder.gep(packed, [builder.mul(position, _LONG(half_block))])
            _prefetch_line(builder, builder.gep(place, [_LONG(_BYTES_AHEAD)]))
            nibbles = _unpack_pair(builder, _load(builder, place, _BYTE, 2 * half_block))
            for start, row_sums in zip(rows, sums, strict=True):
                pair = _load(builder, builder.gep(start, [position]), _WORD, 2)
                pairs = _shuffle(builder, pair, [0, 1] * _LANES)
                for total, words in zip(row_sums, nibbles, strict=True):
                    builder.store(builder.add(builder.load(total), _add_pairs(builder, words, pairs)), total)
        target = _start(context, builder, products, products_value, _INT)
        for number, total in enumerate(total for row_sums in sums for total in row_sums):
            place = builder.bitcast(builder.gep(target, [_LONG(number * _LANES)]), _vector(_INT, _LANES).as_pointer())
            builder.store(builder.load(total), place, align=_INT.width // 8)
        return context.get_dummy_value()

    arguments = (weight, types.intp, levels, types.intp, types.intp, products, block_rows, num_rows)
    return types.void(*arguments), generate


def _unpack_pair(builder: Any, both: Any) -> list[Any]:
    """The bytes of two inputs -> vectors of words, outputs in order, those of the two inputs in turns."""
    half_block = both.type.count // 2
    in_turns = [place for output in range(half_block) for place in (output, output + half_block)]
    mixed = _shuffle(builder, both, in_turns)
    low, high = [], []
    for start in range(0, 2 * half_block, 2 * _LANES):
        part = _shuffle(builder, mixed, list(range(start, start + 2 * _LANES)))
        words = builder.zext(part, _vector(_WORD, 2 * _LANES))
        low.append(builder.and_(words, _all(words.type, 15)))
        high.append(builder.lshr(words, _all(words.type, 4)))
    return low + high


@njit
def _round_to_int16(inputs: Any, levels: Any, group_sums: Any) -> Any:
    """Rounds inputs [K / g, g] to integers; returns what to multiply these by, and adds them up by group [K / g]."""
    largest = np.float32(0)
    not_a_number = np.float32(0)
    num_groups, group_size = inputs.shape
    for group in range(num_groups):
        for i in range(group_size):
            number = _to_float32(inputs[group, i])
            largest = max(largest, abs(number))
            not_a_number += number * np.float32(0)  # of infinities, too
    is_finite = not_a_number == 0
    per_step = np.float32(_INT16_MAX) / largest if is_finite and largest > _SMALLEST_INPUT else np.float32(0)
    for group in range(num_groups):
        total = np.int32(0)
        for i in range(group_size):
            level = np.int32(np.rint(_to_float32(inputs[group, i]) * per_step))
            levels[group, i] = level
            total += level
        group_sums[group] = total
    return largest / np.float32(_INT16_MAX) if is_finite else np.float32(np.nan)


@cache
def int4_kernel(block_rows: int) -> Any:
    """The kernel for blocks of so many outputs."""

    @_compiled
    def multiply_int4_rows(inputs: Any, weight: Any, scales: Any, matrices: Any, ends: Any, outputs: Any) -> None:
        """Multiplies rows by int4 weights.

        Each row of inputs is rounded to 65,535 levels, finer than bfloat16: products of integers take half as long.

        Args:
            inputs: [P, K / g, g] numbers, see `multiply_rows`.
            weight: [E, N / b, K, b / 2] uint8, see `quantization.packing`.
            scales: [E, K / g, N / b, b, 2] numbers, scale and offset.
            matrices: [S] int64, see `multiply_rows`.
            ends: [S + 1] int64, see `multiply_rows`.
            outputs: [P, N / b, b] numbers, written to.
        """
        num_rows, num_groups, group_size = inputs.shape
        num_blocks = weight.shape[1]
        scale_bytes = block_rows * 2 * scales.itemsize
        levels = np.empty(inputs.shape, np.int16)
        group_sums = np.empty((num_rows, num_groups), np.float32)
        steps = np.empty(num_rows, np.float32)
        for row in range(num_rows):
            steps[row] = _round_to_int16(inputs[row], levels[row], group_sums[row])
        for unit in prange(len(matrices) * num_blocks):
            segment = unit // num_blocks
            matrix = matrices[segment]
            block = unit % num_blocks
            products = np.empty((_ROWS_AT_ONCE, block_rows), np.int32)
            totals = np.empty((_ROWS_AT_ONCE, block_rows), np.float32)
            row, end = ends[segment], ends[segment + 1]
            while row < end:
                count = _ROWS_AT_ONCE if row + _ROWS_AT_ONCE <= end else 1
                totals[:] = 0
                for group in range(num_groups):
                    # Those of the next block follow; this one's have been asked for in the last.
                    next_scales = ((matrix * num_groups + group) * num_blocks + block + 1) * scale_bytes
                    for line in range(0, scale_bytes, _CACHE_LINE):
                        _prefetch(scales, next_scales + line)
                    start = ((matrix * num_blocks + block) * num_groups + group) * group_size * (block_rows // 2)
                    if count == _ROWS_AT_ONCE:
                        _multiply_group(weight, start, levels, row, group, products, block_rows, _ROWS_AT_ONCE)
                    else:
                        _multiply_group(weight, start, levels, row, group, products, block_rows, 1)
                    for number in range(count):
                        group_sum = group_sums[row + number, group]
                        for i in range(block_rows):
                            scale = _to_float32(scales[matrix, group, block, i, 0])
                            center = _to_float32(scales[matrix, group, block, i, 1])
                            product = np.float32(products[number, i]) - np.float32(_INT4_CENTER) * group_sum
                            totals[number, i] += product * scale + group_sum * center
                for number in range(count):
                    for i in range(block_rows):
                        output = totals[number, i] * steps[row + number]
                        outputs[row + number, block, i] = _from_float32(output, outputs)
                row += count

    return multiply_int4_rows


@_compiled
def attend_one_token(
    queries: Any, keys: Any, values: Any, length: int, visible: Any, scaling: Any, outputs: Any
) -> None:
    """Attention of one new token a row of the batch to those in a cache.

    Args:
        queries: [B, G, h, D] numbers (see `multiply_rows`): h heads that share keys and values.
        keys: [B, G, room, D] numbers.
        values: [B, G, room, V] numbers.
        length: How many tokens the cache holds.
        visible: [B, length] bool, or None for all.
        scaling: Factor on the scores.
        outputs: [B, G, h, V] numbers, written to.
    """
    batch_size, num_groups, num_heads, width = queries.shape
    value_width = values.shape[3]
    for unit in prange(batch_size * num_groups):
        row = unit // num_groups
        group = unit % num_groups
        query = np.empty(width, np.float32)
        scores = np.empty(length, np.float32)
        mixed = np.empty(value_width, np.float32)
        for head in range(num_heads):
            for i in range(width):
                query[i] = _to_float32(queries[row, group, head, i]) * scaling
            largest = _LOWEST
            for token in range(length):
                if visible is None or visible[row, token]:
                    key = keys[row, group, token]
                    score = np.float32(0)
                    for i in range(width):
                        score += query[i] * _to_float32(key[i])
                    scores[token] = score
                    largest = max(largest, score)
                else:
                    scores[token] = _LOWEST
            total = np.float32(0)
            mixed[:] = 0
            for token in range(length):
                weight = np.exp(scores[token] - largest)
                total += weight
                value = values[row, group, token]
                for i in range(value_width):
                    mixed[i] += weight * _to_float32(value[i])
            for i in range(value_width):
                outputs[row, group, head, i] = _from_float32(mixed[i] / total, outputs)
