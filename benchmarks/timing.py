"""Times, beside the machine's own limit measured in the same moments: shared machines change their speed."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds of some work, and its share of the machine's limit.

    Attributes:
        seconds: Median of the repeats.
        limit_rate: Median of the machine's rate (FLOP or bytes a second) before and after each repeat.
        share: Median over the repeats of the rate reached as a share of the limit beside it.
    """

    seconds: float
    limit_rate: float
    share: float


def synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes once."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def compare_with_limit(seconds: Sequence[float], limits: Sequence[float], amount: float) -> Timing:
    """Puts the times of repeats beside the limits measured between them.

    Args:
        seconds: Of each repeat.
        limits: Rates of the machine, one before the first repeat and one after each.
        amount: FLOP or bytes of one repeat.
    """
    beside = [(before + after) / 2 for before, after in pairwise(limits)]
    shares = [amount / taken / limit for taken, limit in zip(seconds, beside, strict=True)]
    return Timing(median(seconds), median(limits), median(shares))


def measure(
    work: Callable[[], float], probe: Callable[[], float], amount: float, repeats: int, num_warm_ups: int = 1
) -> Timing:
    """Repeats some work, with a probe of the machine's limit before, between and after.

    Args:
        work: Does the work once and returns its seconds.
        probe: Returns the machine's rate.
        amount: FLOP or bytes of the work.
        repeats: Times that count.
        num_warm_ups: Times before that do not count.
    """
    for _ in range(num_warm_ups):
        work()
    seconds, limits = [], [probe()]
    for _ in range(repeats):
        seconds.append(work())
        limits.append(probe())
    return compare_with_limit(seconds, limits, amount)
