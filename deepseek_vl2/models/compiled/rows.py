"""What is done to rows of numbers between products."""

from typing import Any

import numpy as np
from numba import njit

from .numbers import FASTMATH, from_float32, load, to_float32


@njit(fastmath=FASTMATH)
def normalize_rows(rows: Any, address: Any, like: Any, epsilon: Any, outputs: Any) -> None:
    """Root-mean-square norm.

    Args:
        rows: [P, D] numbers (see `numbers`).
        address: Of the weight, D numbers.
        like: See `products.multiply_rows`, of the same type as the rows.
        epsilon: Added to the mean square, float32.
        outputs: [P, D] numbers, written to.
    """
    width = rows.shape[1]
    for row in range(len(rows)):
        total = np.float32(0)
        for i in range(width):
            number = to_float32(rows[row, i])
            total += number * number
        factor = np.float32(1) / np.sqrt(total / np.float32(width) + epsilon)
        for i in range(width):
            # Rounded before it is multiplied by the weight, too.
            normed = to_float32(from_float32(to_float32(rows[row, i]) * factor, rows))
            outputs[row, i] = from_float32(normed * load(address, i, like), outputs)


# Loops, here and elsewhere: what numba makes of an assignment to a slice takes seconds to compile.
@njit
def spans_of_all(num_matrices: Any, num_rows: Any) -> Any:
    """Spans of matrices that all multiply the same rows."""
    spans = np.zeros((num_matrices, 2), np.int64)
    for matrix in range(num_matrices):
        spans[matrix, 1] = num_rows
    return spans


@njit
def add(first: Any, second: Any, outputs: Any) -> None:
    """Adds rows [P, D] to rows."""
    for row in range(len(outputs)):
        for i in range(outputs.shape[1]):
            outputs[row, i] = from_float32(to_float32(first[row, i]) + to_float32(second[row, i]), outputs)


@njit
def find_largest(numbers: Any) -> int:
    """Where the first of the largest numbers is."""
    place = 0
    for i in range(len(numbers)):
        if numbers[i] > numbers[place]:
            place = i
    return place
