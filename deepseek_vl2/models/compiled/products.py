"""Products of few rows with many weights, compiled by numba for the processor at hand; see `few_row_products`.

Such a product waits for memory: each weight is read once, for a row or a few. Two things make these kernels read as
fast as the memory gives. Weights are asked for well before they are used, since short rows and jumps between experts
keep ending what the processor foresees by itself. And they are multiplied in so few instructions that the processor
waits for the memory and not the other way round.

Letters: P rows [P, K] in all, those of one matrix beside each other; E matrices (experts, or one) [N, K]; g inputs a
group of int4 weights, of which b outputs lie side by side, 32 or 64 (see `quantization.packing`).
"""

from typing import Any

import numpy as np
from numba import njit, prange

from .numbers import STAMP, compiled, from_float32, load
from .tiles import OUTPUTS_AT_ONCE, ROWS_AT_ONCE, empty_rows, fill_row, multiply_tile, rows_at_once


@njit
def first_outputs(matrices: Any) -> Any:
    """Where the outputs of each matrix begin among those of all, and where the last end: [S + 1]."""
    starts = np.zeros(len(matrices) + 1, np.int64)
    for matrix in range(len(matrices)):
        starts[matrix + 1] = starts[matrix] + matrices[matrix, 2]
    return starts


@njit
def output_places(matrices: Any, spans: Any) -> Any:
    """`first_outputs`, and the same with the outputs of all rows counted: [S]."""
    places = np.zeros(len(matrices), np.int64)
    for matrix in range(1, len(matrices)):
        num_rows = spans[matrix - 1, 1] - spans[matrix - 1, 0]
        places[matrix] = places[matrix - 1] + num_rows * matrices[matrix - 1, 2]
    return first_outputs(matrices), places


def _rows_kernel() -> Any:
    stamp = STAMP

    @compiled
    def multiply_rows(
        num_threads: Any, inputs: Any, matrices: Any, spans: Any, weight_like: Any, scale_like: Any, outputs: Any
    ) -> int:
        """Multiplies rows by float32, bfloat16 or int8 weights.

        Args:
            num_threads: How many threads there are.
            inputs: [P, K] numbers.
            matrices: [S, 4] int64: addresses of a matrix and of its scales, N, and N' of int4 scales (see
                `streamed_weights.StreamedWeight`).
            spans: [S, 2] int64; matrix s multiplies the rows from `spans[s, 0]` up to `spans[s, 1]`.
            weight_like: An array of the type of the weights, numbers or int8; only the type counts.
            scale_like: The same of scales; None if there are none.
            outputs: Numbers, written to: for each matrix in turn its rows' outputs, a row after the other.
        """
        num_inputs = inputs.shape[1]
        row_bytes = num_inputs * weight_like.itemsize
        rows = empty_rows(inputs.shape, inputs, weight_like)
        steps = np.empty(len(inputs), np.float32)
        for row in range(len(inputs)):
            steps[row] = fill_row(inputs[row], rows[row])
        starts, places = output_places(matrices, spans)
        for part in prange(num_threads):
            sums = np.empty((ROWS_AT_ONCE, OUTPUTS_AT_ONCE), np.float32)
            matrix = 0
            unit, end_unit = part * starts[-1] // num_threads, (part + 1) * starts[-1] // num_threads
            while unit < end_unit:
                while unit >= starts[matrix + 1]:
                    matrix += 1
                num_outputs = matrices[matrix, 2]
                count = min(OUTPUTS_AT_ONCE, min(end_unit, starts[matrix + 1]) - unit)
                output = unit - starts[matrix]
                address = matrices[matrix, 0] + output * row_bytes
                row, end = spans[matrix]
                place = places[matrix] + output
                while row < end:
                    num_rows = rows_at_once(end - row)
                    multiply_tile(rows, row, num_rows, address, row_bytes, count, weight_like, sums)
                    for number in range(num_rows):
                        for i in range(count):
                            total = sums[number, i] * steps[row + number]
                            if scale_like is not None:
                                total *= load(matrices[matrix, 1], output + i, scale_like)
                            outputs[place + i] = from_float32(total, outputs)
                        place += num_outputs
                    row += num_rows
                unit += count
        return stamp

    return multiply_rows


multiply_rows = _rows_kernel()
