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
_ELEMENTS = {types.float32: ir.FloatType(), types.uint16: _WORD, types.int8: _BYTE}
_LANES = 16  # of 32 bits; LLVM takes shorter vectors where the processor has no such long ones


# Sums in any order, so that they run in vectors; infinities and not-a-numbers stay what they are.
_FASTMATH = {"reassoc", "contract"}

_intrinsic: Any = extending.intrinsic  # its own annotations count the first argument, which callers do not pass


def _compiled(function: Callable[..., Any], is_parallel: bool = True) -> Any:
    """Compiles at the first call; the result is kept beside the source or in the user's cache folder."""
    options: dict[str, Any] = {"parallel": is_parallel, "nogil": True, "fastmath": _FASTMATH}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError as error:  # no folder to write to
        logger.info("%s is compiled in every process: %s", function.__name__, error)
        return njit(**options)(function)


@_intrinsic
def _to_float32(typing_context: Any, number: Any) -> Any:
    """A float32 as it is, an int8, or a bfloat16 that comes as uint16: it is the upper half of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _as_float(builder, number, arguments[0])

    return types.float32(number), generate


def _as_float(builder: Any, number: Any, value: Any) -> Any:
    if number == types.float32:
        return value
    if number == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(value, _INT), _INT(16)), ir.FloatType())
    return builder.sitofp(value, ir.FloatType())


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
def _load(typing_context: Any, address: Any, index: Any, like: Any) -> Any:
    """Number of that index of those that lie at an address, of the type of an array, as a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.inttoptr(arguments[0], _ELEMENTS[like.dtype].as_pointer())
        value = builder.load(builder.gep(start, [arguments[1]]), align=like.dtype.bitwidth // 8)
        return _as_float(builder, like.dtype, value)

    return types.float32(types.intp, types.intp, like), generate


@_intrinsic
def _prefetch(typing_context: Any, address: Any) -> Any:
    """Asks for the cache line at an address; there may be nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch_line(builder, builder.inttoptr(arguments[0], _BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp), generate


def _prefetch_line(builder: Any, pointer: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # Into the second cache: in the first it would crowd out the inputs.
    is_write, locality, is_data = _INT(0), _INT(2), _INT(1)
    builder.call(function, [pointer, is_write, locality, is_data])


def _start(context: Any, builder: Any, array_type: Any, array: Any, element: Any) -> Any:
    """Pointer to an array's first element."""
    return builder.bitcast(context.make_array(array_type)(context, builder, array).data, element.as_pointer())


@njit(fastmath=_FASTMATH)
def _dot(row: Any, address: Any, like: Any) -> Any:
    """Sum of the products of a row [K] and the K numbers at an address."""
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i] * _load(address, i, like)
    return total


@njit(fastmath=_FASTMATH)
def _dot_four(rows: Any, first: Any, address: Any, like: Any) -> Any:
    """As `_dot` for four rows [P, K] from the first on, for which each number is turned into a float once."""
    total = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(rows.shape[1]):
        value = _load(address, i, like)
        total = (
            total[0] + rows[first, i] * value,
            total[1] + rows[first + 1, i] * value,
            total[2] + rows[first + 2, i] * value,
            total[3] + rows[first + 3, i] * value,
        )
    return total


@njit
def _prefetch_next(address: Any, num_bytes: Any) -> None:
    """Asks for as many bytes as are about to be read at an address, from further on."""
    for offset in range(_BYTES_AHEAD, _BYTES_AHEAD + num_bytes, _CACHE_LINE):
        _prefetch(address + offset)


@njit
def _as_float32(numbers: Any, copy: Any) -> None:
    for i in range(len(numbers)):
        copy[i] = _to_float32(numbers[i])


@njit
def _starts(matrices: Any) -> Any:
    """Where the outputs of each matrix begin among those of all, and where the last end: [S + 1]."""
    starts = np.zeros(len(matrices) + 1, np.int64)
    for matrix in range(len(matrices)):
        starts[matrix + 1] = starts[matrix] + matrices[matrix, 2]
    return starts


@njit
def _output_places(matrices: Any, spans: Any) -> Any:
    """`_starts`, and the same with the outputs of all rows counted: [S]."""
    places = np.zeros(len(matrices), np.int64)
    for matrix in range(1, len(matrices)):
        num_rows = spans[matrix - 1, 1] - spans[matrix - 1, 0]
        places[matrix] = places[matrix - 1] + num_rows * matrices[matrix - 1, 2]
    return _starts(matrices), places


@_compiled
def multiply_rows(
    num_threads: Any, inputs: Any, matrices: Any, spans: Any, weight_like: Any, scale_like: Any, outputs: Any
) -> None:
    """Multiplies rows by float32, bfloat16 or int8 weights.

    Args:
        num_threads: How many threads there are.
        inputs: [P, K], here and below numbers are float32 or the bits of bfloat16 as uint16.
        matrices: [S, 4] int64: addresses of a matrix and of its scales, N, and N' of int4 scales (see
            `streamed_weights.StreamedWeight`).
        spans: [S, 2] int64; matrix s multiplies the rows from `spans[s, 0]` up to `spans[s, 1]`.
        weight_like: An array of the type of the weights, numbers or int8; only the type counts.
        scale_like: The same of scales; None if there are none.
        outputs: Numbers, written to: for each matrix in turn its rows' outputs, a row after the other.
    """
    num_inputs = inputs.shape[1]
    row_bytes = num_inputs * weight_like.itemsize
    rows = np.empty(inputs.shape, np.float32)
    for row in range(len(inputs)):
        _as_float32(inputs[row], rows[row])
    starts, places = _output_places(matrices, spans)
    for part in prange(num_threads):
        matrix = 0
        for unit in range(part * starts[-1] // num_threads, (part + 1) * starts[-1] // num_threads):
            while unit >= starts[matrix + 1]:
                matrix += 1
            num_outputs = matrices[matrix, 2]
            output = unit - starts[matrix]
            address = matrices[matrix, 0] + output * row_bytes
            _prefetch_next(address, row_bytes)
            scale = np.float32(1) if scale_like is None else _load(matrices[matrix, 1], output, scale_like)
            row, end = spans[matrix]
            place = places[matrix] + output
            while row + _ROWS_AT_ONCE <= end:
                for total in _dot_four(rows, row, address, weight_like):
                    outputs[place] = _from_float32(total * scale, outputs)
                    place += num_outputs
                row += _ROWS_AT_ONCE
            while row < end:
                outputs[place] = _from_float32(_dot(rows[row], address, weight_like) * scale, outputs)
                place += num_outputs
                row += 1


@njit
def _silu(number: Any) -> Any:
    return number / (np.float32(1) + np.exp(-number))


@_compiled
def run_gated_layers(
    num_threads: Any,
    inputs: Any,
    layers: Any,
    factors: Any,
    weight_like: Any,
    scale_like: Any,
    outputs: Any,
) -> None:
    """Runs one token through gated feed-forward layers with SiLU of float32, bfloat16 or int8, and adds these up.

    Args:
        num_threads: See `multiply_rows`.
        inputs: [K] numbers.
        layers: [S, 3, 4] int64, the matrices of each layer: gate, up and down, see `multiply_rows`.
        factors: [S] float32, what the outputs of each layer are multiplied by.
        weight_like: See `multiply_rows`.
        scale_like: See `multiply_rows`.
        outputs: [N] numbers, written to.
    """
    row = np.empty(len(inputs), np.float32)
    _as_float32(inputs, row)
    starts = _starts(layers[:, 0])
    activations = np.empty(starts[-1], np.float32)
    row_bytes = len(inputs) * weight_like.itemsize
    for part in prange(num_threads):
        layer = 0
        for unit in range(part * starts[-1] // num_threads, (part + 1) * starts[-1] // num_threads):
            while unit >= starts[layer + 1]:
                layer += 1
            number = unit - starts[layer]
            gate_address = layers[layer, 0, 0] + number * row_bytes
            up_address = layers[layer, 1, 0] + number * row_bytes
            _prefetch_next(gate_address, row_bytes)
            _prefetch_next(up_address, row_bytes)
            gate, up = _dot(row, gate_address, weight_like), _dot(row, up_address, weight_like)
            if scale_like is not None:
                gate *= _load(layers[layer, 0, 1], number, scale_like)
                up *= _load(layers[layer, 1, 1], number, scale_like)
            activations[unit] = _silu(gate) * up
    for part in prange(num_threads):
        for output in range(part * len(outputs) // num_threads, (part + 1) * len(outputs) // num_threads):
            total = np.float32(0)
            for layer in range(len(layers)):
                width = starts[layer + 1] - starts[layer]
                down_address = layers[layer, 2, 0] + output * width * weight_like.itemsize
                _prefetch_next(down_address, width * weight_like.itemsize)
                factor = factors[layer]
                if scale_like is not None:
                    factor *= _load(layers[layer, 2, 1], output, scale_like)
                total += factor * _dot(activations[starts[layer] : starts[layer + 1]], down_address, weight_like)
            outputs[output] = _from_float32(total, outputs)


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


def _load_vector(builder: Any, pointer: Any, element: Any, count: int) -> Any:
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
        packed = builder.inttoptr(address_value, _BYTE.as_pointer())
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
            nibbles = _unpack_pair(builder, _load_vector(builder, place, _BYTE, 2 * half_block))
            for start, row_sums in zip(rows, sums, strict=True):
                pair = _load_vector(builder, builder.gep(start, [position]), _WORD, 2)
                pairs = _shuffle(builder, pair, [0, 1] * _LANES)
                for total, words in zip(row_sums, nibbles, strict=True):
                    builder.store(builder.add(builder.load(total), _add_pairs(builder, words, pairs)), total)
        target = _start(context, builder, products, products_value, _INT)
        for number, total in enumerate(total for row_sums in sums for total in row_sums):
            place = builder.bitcast(builder.gep(target, [_LONG(number * _LANES)]), _vector(_INT, _LANES).as_pointer())
            builder.store(builder.load(total), place, align=_INT.width // 8)
        return context.get_dummy_value()

    arguments = (types.intp, levels, types.intp, types.intp, products, block_rows, num_rows)
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


@njit
def _rounded_rows(inputs: Any, group_size: Any) -> Any:
    """Rows [P, K] to integers of 16 bits: levels [P, K / g, g], their sums by group, and the steps [P]."""
    num_rows, num_inputs = inputs.shape
    num_groups = num_inputs // group_size
    levels = np.empty((num_rows, num_groups, group_size), np.int16)
    group_sums = np.empty((num_rows, num_groups), np.float32)
    steps = np.empty(num_rows, np.float32)
    for row in range(num_rows):
        grouped = inputs[row].reshape(num_groups, group_size)
        steps[row] = _round_to_int16(grouped, levels[row], group_sums[row])
    return levels, group_sums, steps


def _int4_block(block_rows: int) -> Any:
    """What multiplies rows by a block of so many outputs."""

    @njit(fastmath=_FASTMATH)
    def multiply_block(
        levels: Any, group_sums: Any, row: Any, count: Any, matrix: Any, block: Any, scale_like: Any, totals: Any
    ) -> None:
        """Multiplies four rows or one, in steps of their rounding.

        Args:
            levels: [P, K / g, g] int16.
            group_sums: [P, K / g].
            row: The first row.
            count: How many rows, 4 or 1.
            matrix: [4] int64, see `multiply_rows`.
            block: Number of the block.
            scale_like: See `multiply_rows`.
            totals: [4, b] float32, written to.
        """
        num_groups, group_size = levels.shape[1:]
        group_bytes = group_size * (block_rows // 2)
        scale_bytes = 2 * block_rows * scale_like.itemsize
        products = np.empty((_ROWS_AT_ONCE, block_rows), np.int32)
        totals[:] = 0
        for group in range(num_groups):
            address = matrix[0] + (block * num_groups + group) * group_bytes
            scale_address = matrix[1] + (group * matrix[3] + block * block_rows) * 2 * scale_like.itemsize
            # Those of the next block follow; this one's have been asked for in the last.
            for line in range(scale_bytes, 2 * scale_bytes, _CACHE_LINE):
                _prefetch(scale_address + line)
            if count == _ROWS_AT_ONCE:
                _multiply_group(address, levels, row, group, products, block_rows, _ROWS_AT_ONCE)
            else:
                _multiply_group(address, levels, row, group, products, block_rows, 1)
            for number in range(count):
                group_sum = group_sums[row + number, group]
                for i in range(block_rows):
                    scale = _load(scale_address, 2 * i, scale_like)
                    center = _load(scale_address, 2 * i + 1, scale_like)
                    product = np.float32(products[number, i]) - np.float32(_INT4_CENTER) * group_sum
                    totals[number, i] += product * scale + group_sum * center

    return multiply_block


# By name, since kernels that close over other functions are compiled in every process.
_multiply_block_of_32, _multiply_block_of_64 = _int4_block(32), _int4_block(64)


@njit
def _multiply_block(
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

    @_compiled
    def multiply_int4_rows(
        num_threads: Any, inputs: Any, matrices: Any, spans: Any, group_size: Any, scale_like: Any, outputs: Any
    ) -> None:
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
        levels, group_sums, steps = _rounded_rows(inputs, group_size)
        starts, places = _output_places(matrices, spans)
        num_blocks = starts[-1] // block_rows
        for part in prange(num_threads):
            totals = np.empty((_ROWS_AT_ONCE, block_rows), np.float32)
            matrix = 0
            for unit in range(part * num_blocks // num_threads, (part + 1) * num_blocks // num_threads):
                while unit * block_rows >= starts[matrix + 1]:
                    matrix += 1
                num_outputs = matrices[matrix, 2]
                output = unit * block_rows - starts[matrix]
                row, end = spans[matrix]
                place = places[matrix] + output
                while row < end:
                    count = _ROWS_AT_ONCE if row + _ROWS_AT_ONCE <= end else 1
                    block = output // block_rows
                    current = matrices[matrix]
                    _multiply_block(block_rows, levels, group_sums, row, count, current, block, scale_like, totals)
                    for number in range(count):
                        for i in range(block_rows):
                            outputs[place + i] = _from_float32(totals[number, i] * steps[row + number], outputs)
                        place += num_outputs
                    row += count

    return multiply_int4_rows


@cache
def int4_gated_kernel(block_rows: int) -> Any:
    """As `run_gated_layers`, for int4 weights in blocks of so many outputs."""

    @_compiled
    def run_gated_int4_layers(
        num_threads: Any,
        inputs: Any,
        layers: Any,
        factors: Any,
        group_sizes: Any,
        scale_like: Any,
        outputs: Any,
    ) -> None:
        """Runs one token through gated feed-forward layers with SiLU of int4 weights, and adds these up.

        Args:
            num_threads: See `multiply_rows`.
            inputs: See `run_gated_layers`.
            layers: See `run_gated_layers`; widths and N are multiples of b.
            factors: See `run_gated_layers`.
            group_sizes: [2] int64, g of gate and up, and of down.
            scale_like: See `multiply_rows`.
            outputs: See `run_gated_layers`.
        """
        levels, group_sums, steps = _rounded_rows(inputs.reshape(1, len(inputs)), group_sizes[0])
        starts = _starts(layers[:, 0])
        activations = np.empty(starts[-1], np.float32)
        num_blocks = starts[-1] // block_rows
        for part in prange(num_threads):
            gates = np.empty((_ROWS_AT_ONCE, block_rows), np.float32)
            ups = np.empty((_ROWS_AT_ONCE, block_rows), np.float32)
            layer = 0
            for unit in range(part * num_blocks // num_threads, (part + 1) * num_blocks // num_threads):
                first = unit * block_rows
                while first >= starts[layer + 1]:
                    layer += 1
                block = (first - starts[layer]) // block_rows
                _multiply_block(block_rows, levels, group_sums, 0, 1, layers[layer, 0], block, scale_like, gates)
                _multiply_block(block_rows, levels, group_sums, 0, 1, layers[layer, 1], block, scale_like, ups)
                for i in range(block_rows):
                    activations[first + i] = _silu(gates[0, i] * steps[0]) * ups[0, i] * steps[0]
        group_size = group_sizes[1]
        levels = np.empty((1, starts[-1] // group_size, group_size), np.int16)
        group_sums = np.empty((1, starts[-1] // group_size), np.float32)
        steps = np.empty(len(layers), np.float32)
        for layer in range(len(layers)):
            first, end = starts[layer] // group_size, starts[layer + 1] // group_size
            grouped = activations[starts[layer] : starts[layer + 1]].reshape(end - first, group_size)
            steps[layer] = _round_to_int16(grouped, levels[0, first:end], group_sums[0, first:end])
            steps[layer] *= factors[layer]
        num_blocks = len(outputs) // block_rows
        for part in prange(num_threads):
            totals = np.empty((_ROWS_AT_ONCE, block_rows), np.float32)
            sums = np.empty(block_rows, np.float32)
            for block in range(part * num_blocks // num_threads, (part + 1) * num_blocks // num_threads):
                sums[:] = 0
                for layer in range(len(layers)):
                    first, end = starts[layer] // group_size, starts[layer + 1] // group_size
                    own_levels, own_sums = levels[:, first:end], group_sums[:, first:end]
                    _multiply_block(block_rows, own_levels, own_sums, 0, 1, layers[layer, 2], block, scale_like, totals)
                    for i in range(block_rows):
                        sums[i] += totals[0, i] * steps[layer]
                for i in range(block_rows):
                    outputs[block * block_rows + i] = _from_float32(sums[i], outputs)

    return run_gated_int4_layers


@_compiled
def attend_one_token(
    num_threads: Any,
    queries: Any,
    keys: Any,
    values: Any,
    length: int,
    visible: Any,
    scaling: Any,
    outputs: Any,
) -> None:
    """Attention of one new token a row of the batch to those in a cache.

    Args:
        num_threads: See `multiply_rows`.
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
