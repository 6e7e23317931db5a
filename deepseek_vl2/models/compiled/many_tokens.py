"""Attention of many tokens at once, on CPUs that multiply pairs of bfloat16.

Letters: B sequences of N tokens, H heads of D numbers, V of values. Two neighbouring numbers in bfloat16 are a pair,
read as uint32.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils

from .numbers import (
    FASTMATH,
    FLOAT,
    INT,
    LONG,
    STAMP,
    add_bfloat16_pairs,
    array_start,
    compiled,
    from_float32,
    intrinsic,
    load_vector,
)

QUERIES_AT_ONCE = 8
# Pairs that one instruction multiplies by others, and for how many times as many there are registers.
PAIRS_AT_ONCE = 16
MOST_VECTORS = 3
_SCORE_VECTORS = 2

_LOG2_E = np.float32(1.4426950408889634)
_SMALLEST_POWER = np.float32(-126)
# Of 2**x for x from -0.5 to 0.5, by powers of x: Chebyshev interpolation, off by less than 2e-7 of the result.
_POWERS_OF_TWO = tuple(
    np.float32(factor) for factor in (1.0000001, 0.69314719, 0.24022107, 0.055503571, 0.0096760319, 0.0013390863)
)
_SUMS, _PAIRS = (ir.VectorType(kind, PAIRS_AT_ONCE) for kind in (FLOAT, INT))


@intrinsic(prefer_literal=True)
def _multiply_pairs(
    typing_context: Any,
    address: Any,
    row_bytes: Any,
    num_pairs: Any,
    pairs: Any,
    column: Any,
    num_vectors: Any,
    sums: Any,
) -> Any:
    """Products of `QUERIES_AT_ONCE` rows with some columns of a matrix, sums in float32.

    Args:
        typing_context: Of numba.
        address: Of the first row of pairs.
        row_bytes: Bytes from one row to the next.
        num_pairs: P, of a row.
        pairs: [P, C] uint32: number p of a column is the pair that those of a row are multiplied by.
        column: The first column.
        num_vectors: Number of columns in `PAIRS_AT_ONCE`, a constant.
        sums: [`QUERIES_AT_ONCE`, C] float32; these columns are written to.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address_value, step, count, pairs_value, first, _, sums_value = arguments
        width = cgutils.unpack_tuple(builder, context.make_array(pairs)(context, builder, pairs_value).shape)[1]
        matrix = builder.gep(array_start(context, builder, pairs, pairs_value, INT), [first])
        rows = [
            builder.inttoptr(builder.add(address_value, builder.mul(step, LONG(row))), INT.as_pointer())
            for row in range(QUERIES_AT_ONCE)
        ]
        vectors = [LONG(number * PAIRS_AT_ONCE) for number in range(num_vectors.literal_value)]
        nothing = ir.Constant(_SUMS, None)
        totals = [[cgutils.alloca_once_value(builder, nothing) for _ in vectors] for _ in rows]
        with cgutils.for_range(builder, count, intp=LONG) as loop:
            line = builder.gep(matrix, [builder.mul(loop.index, width)])
            columns = [load_vector(builder, builder.gep(line, [vector]), INT, PAIRS_AT_ONCE) for vector in vectors]
            for row, row_totals in zip(rows, totals, strict=True):
                pair = builder.load(builder.gep(row, [loop.index]), align=4)
                repeated = builder.insert_element(ir.Constant(_PAIRS, ir.Undefined), pair, INT(0))
                everywhere = ir.Constant(_PAIRS, None)
                repeated = builder.shuffle_vector(repeated, ir.Constant(_PAIRS, ir.Undefined), everywhere)
                for vector, total in zip(columns, row_totals, strict=True):
                    builder.store(add_bfloat16_pairs(builder, builder.load(total), repeated, vector), total)
        target = builder.gep(array_start(context, builder, sums, sums_value, FLOAT), [first])
        for row, row_totals in enumerate(totals):
            for vector, total in zip(vectors, row_totals, strict=True):
                place = builder.gep(target, [builder.add(builder.mul(width, LONG(row)), vector)])
                builder.store(builder.load(total), builder.bitcast(place, _SUMS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, pairs, types.intp, num_vectors, sums), generate


@intrinsic
def _times_power_of_two(typing_context: Any, number: Any, power: Any) -> Any:
    """A float32 times two to the power of a whole number, a float32 of at least -126."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        exponent = builder.shl(builder.fptosi(arguments[1], INT), INT(23))
        return builder.bitcast(builder.add(builder.bitcast(arguments[0], INT), exponent), FLOAT)

    return types.float32(types.float32, types.float32), generate


@njit(fastmath=FASTMATH)
def _exponential(number: Any) -> Any:
    """e to the power of a number that is not above 0; written so that LLVM computes many at once."""
    binary = max(number * _LOG2_E, _SMALLEST_POWER)
    power = np.rint(binary)
    rest = binary - power
    result = _POWERS_OF_TWO[5]
    result = result * rest + _POWERS_OF_TWO[4]
    result = result * rest + _POWERS_OF_TWO[3]
    result = result * rest + _POWERS_OF_TWO[2]
    result = result * rest + _POWERS_OF_TWO[1]
    result = result * rest + _POWERS_OF_TWO[0]
    return _times_power_of_two(result, power) if number == number else number  # not a number stays that


@njit(fastmath=FASTMATH)
def _largest(numbers: Any, count: Any) -> Any:
    largest = numbers[0]
    for i in range(count):
        largest = max(largest, numbers[i])
    return largest


@njit(fastmath=FASTMATH)
def _weigh(scores: Any, count: Any, scaling: Any, weights: Any) -> Any:
    """Writes weights for scores, not yet divided by their sum, which is returned."""
    largest = _largest(scores, count)
    total = np.float32(0)
    for i in range(count):
        weight = _exponential((scores[i] - largest) * scaling)
        total += weight
        weights[i] = from_float32(weight, weights)
    return total


@intrinsic
def _load_pair(typing_context: Any, address: Any, number: Any) -> Any:
    """Pair of that number of those that lie at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.inttoptr(arguments[0], INT.as_pointer())
        return builder.load(builder.gep(start, [arguments[1]]), align=4)

    return types.uint32(types.intp, types.intp), generate


@njit
def _pack_keys(address: Any, token_bytes: Any, num_tokens: Any, num_pairs: Any, keys: Any) -> None:
    """Copies keys, so that a pair of each of many tokens is beside that of the next."""
    for token in range(num_tokens):
        for pair in range(num_pairs):
            keys[pair, token] = _load_pair(address + token * token_bytes, pair)


@njit
def _pack_values(address: Any, token_bytes: Any, num_tokens: Any, num_pairs: Any, values: Any) -> None:
    """Copies values, so that numbers of two tokens are a pair."""
    half, lower, upper = np.uint32(16), np.uint32(0xFFFF), np.uint32(0xFFFF0000)
    for token in range(0, num_tokens, 2):
        for pair in range(num_pairs):
            first, second = _load_pair(address + token * token_bytes, pair), np.uint32(0)
            if token + 1 < num_tokens:
                second = _load_pair(address + (token + 1) * token_bytes, pair)
            values[token // 2, 2 * pair] = (first & lower) | (second << half)
            values[token // 2, 2 * pair + 1] = (first >> half) | (second & upper)


def _many_tokens_kernel() -> Any:
    stamp = STAMP

    @compiled
    def attend_many_tokens(
        num_threads: Any,
        places: Any,
        num_pairs: Any,
        heads_a_group: Any,
        is_causal: Any,
        scaling: Any,
        outputs: Any,
    ) -> int:
        """Attention of each token to all of its sequence, or to those up to itself.

        Args:
            num_threads: See `products.multiply_rows`.
            places: [3, 4] int64 of queries, keys and values: address, and bytes from one sequence, one head and one
                token to the next.
            num_pairs: D / 2.
            heads_a_group: How many heads of queries share one of keys and values.
            is_causal: Whether a token looks at none behind it.
            scaling: Factor on the scores, above 0.
            outputs: [B, N, H, V] numbers in bfloat16, written to; N is at least `QUERIES_AT_ONCE`.
        """
        num_sequences, num_tokens, num_heads, width = outputs.shape
        score_columns = _SCORE_VECTORS * PAIRS_AT_ONCE
        num_keys = (num_tokens + score_columns - 1) // score_columns * score_columns
        value_width = (width + PAIRS_AT_ONCE - 1) // PAIRS_AT_ONCE * PAIRS_AT_ONCE
        num_blocks = (num_tokens + QUERIES_AT_ONCE - 1) // QUERIES_AT_ONCE
        num_units = num_sequences * num_heads * num_blocks
        weight_bytes = num_keys * 2
        for part in prange(num_threads):
            keys = np.zeros((num_pairs, num_keys), np.uint32)
            values = np.zeros((num_keys // 2, value_width), np.uint32)
            scores = np.empty((QUERIES_AT_ONCE, num_keys), np.float32)
            weights = np.empty((QUERIES_AT_ONCE, num_keys), np.uint16)
            mixed = np.empty((QUERIES_AT_ONCE, value_width), np.float32)
            totals = np.empty(QUERIES_AT_ONCE, np.float32)
            packed = -1
            for unit in range(part * num_units // num_threads, (part + 1) * num_units // num_threads):
                block = unit % num_blocks
                sequence, head = unit // num_blocks // num_heads, unit // num_blocks % num_heads
                group = head // heads_a_group
                if sequence * num_heads + group != packed:
                    packed = sequence * num_heads + group
                    own_keys = places[1, 0] + sequence * places[1, 1] + group * places[1, 2]
                    _pack_keys(own_keys, places[1, 3], num_tokens, num_pairs, keys)
                    own_values = places[2, 0] + sequence * places[2, 1] + group * places[2, 2]
                    _pack_values(own_values, places[2, 3], num_tokens, width // 2, values)
                # The last block begins earlier, so that it is full; what another one computes is not written.
                first = min(block * QUERIES_AT_ONCE, num_tokens - QUERIES_AT_ONCE)
                num_seen = first + QUERIES_AT_ONCE if is_causal else num_tokens
                end = (num_seen + score_columns - 1) // score_columns * score_columns
                queries = places[0, 0] + sequence * places[0, 1] + head * places[0, 2] + first * places[0, 3]
                for column in range(0, end, score_columns):
                    _multiply_pairs(queries, places[0, 3], num_pairs, keys, column, _SCORE_VECTORS, scores)
                for query in range(QUERIES_AT_ONCE):
                    count = first + query + 1 if is_causal else num_tokens
                    totals[query] = _weigh(scores[query], count, scaling, weights[query])
                    for token in range(count, end):
                        weights[query, token] = 0
                column = 0
                while column < value_width:
                    count = min(MOST_VECTORS, (value_width - column) // PAIRS_AT_ONCE)
                    start = weights.ctypes.data
                    if count == 3:
                        _multiply_pairs(start, weight_bytes, end // 2, values, column, 3, mixed)
                    elif count == 2:
                        _multiply_pairs(start, weight_bytes, end // 2, values, column, 2, mixed)
                    else:
                        _multiply_pairs(start, weight_bytes, end // 2, values, column, 1, mixed)
                    column += count * PAIRS_AT_ONCE
                for query in range(block * QUERIES_AT_ONCE - first, QUERIES_AT_ONCE):
                    for i in range(width):
                        output = mixed[query, i] / totals[query]
                        outputs[sequence, first + query, head, i] = from_float32(output, outputs)
        return stamp

    return attend_many_tokens


attend_many_tokens = _many_tokens_kernel()
