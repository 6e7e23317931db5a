"""How far a score measured on some samples may be from that on all: 95 % confidence intervals."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959964
NUM_RESAMPLES = 1000
SEED = 0


class Interval(NamedTuple):
    """A confidence interval, and the method it was computed by."""

    low: float
    high: float
    method: str


def wilson_interval(num_right: int, num_samples: int) -> Interval:
    """Interval of a share (Wilson, 1927): good for few samples and for shares near 0 and 1, too.

    Raises:
        ValueError: no samples, or more right ones than samples.
    """
    if not 0 <= num_right <= num_samples or num_samples == 0:
        raise ValueError(f"{num_right} right of {num_samples} samples is no share")
    share, squared = num_right / num_samples, Z_95**2
    middle = (share + squared / (2 * num_samples)) / (1 + squared / num_samples)
    spread = math.sqrt(share * (1 - share) / num_samples + squared / (4 * num_samples**2))
    half = Z_95 * spread / (1 + squared / num_samples)
    return Interval(max(0.0, middle - half), min(1.0, middle + half), "wilson")


def bootstrap_interval(
    rows: NDArray[np.float64], statistic: Callable[[NDArray[np.float64]], float], num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """Interval of any number computed from samples: the middle 95 % over samples drawn anew (Efron, 1979).

    The draws come from a fixed seed, so that the same rows give the same interval.

    Args:
        rows: one row a sample, [N, ...].
        statistic: rows -> number.
        num_resamples: how often to draw.

    Raises:
        ValueError: no rows.
    """
    if len(rows) == 0:
        raise ValueError("an interval needs at least one sample")
    rng = np.random.default_rng(SEED)
    drawn = [statistic(rows[rng.integers(0, len(rows), len(rows))]) for _ in range(num_resamples)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(float(low), float(high), "bootstrap")
