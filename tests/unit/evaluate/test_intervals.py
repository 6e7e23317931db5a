"""Confidence intervals."""

import numpy as np
import pytest

from deepseek_vl2.evaluate.intervals import bootstrap_interval, wilson_interval


@pytest.mark.parametrize(
    ("num_right", "num_samples", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval(num_right, num_samples, low, high):
    interval = wilson_interval(num_right, num_samples)
    assert interval[:2] == pytest.approx((low, high), abs=1e-4)
    assert interval.method == "wilson"


@pytest.mark.parametrize(("num_right", "num_samples"), [(0, 0), (3, 2), (-1, 2)])
def test_no_interval_of_no_share(num_right, num_samples):
    with pytest.raises(ValueError, match=f"{num_right} right of {num_samples}"):
        wilson_interval(num_right, num_samples)


def test_bootstrap_interval_is_that_of_the_mean():
    rows = np.random.default_rng(5).normal(3.0, 2.0, 400)
    interval = bootstrap_interval(rows, lambda drawn: float(drawn.mean()))
    half = 1.96 * rows.std() / np.sqrt(len(rows))  # the mean's own, by its standard error
    assert interval[:2] == pytest.approx((rows.mean() - half, rows.mean() + half), abs=half / 10)
    assert interval == bootstrap_interval(rows, lambda drawn: float(drawn.mean()))
    assert interval.method == "bootstrap"


def test_bootstrap_interval_draws_whole_rows():
    rows = np.array([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])
    assert bootstrap_interval(rows, lambda drawn: float(drawn[:, 1].sum() / drawn[:, 0].sum()))[:2] == (2.0, 2.0)


def test_bootstrap_interval_needs_samples():
    with pytest.raises(ValueError, match="at least one sample"):
        bootstrap_interval(np.zeros((0, 2)), lambda drawn: 0.0)
