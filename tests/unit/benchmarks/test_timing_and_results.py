"""Shares of limits, tables, memory of this process."""

import json
import sys

import pytest
import torch

from benchmarks.limits import Limits
from benchmarks.memory import cache_bytes, peak_resident_bytes, reset_peak, resident_bytes, weight_bytes_by_part
from benchmarks.results import Figure, figures_as_json, format_table
from benchmarks.timing import compare_with_limit, measure

CPU = torch.device("cpu")


def test_shares_are_formed_within_each_repeat():
    """The machine halves its speed: the shares stay, while medians of rates alone would hide it."""
    timing = compare_with_limit(seconds=[1.0, 4 / 3, 2.0], limits=[200.0, 200.0, 100.0, 100.0], amount=100.0)
    assert timing.share == pytest.approx(0.5)
    assert timing.seconds == 4 / 3
    assert timing.limit_rate == 150.0


def test_warm_ups_do_not_count():
    seconds = iter([100.0, 50.0, 1.0, 3.0, 2.0])
    timing = measure(lambda: next(seconds), lambda: 10.0, amount=10.0, repeats=3, num_warm_ups=2)
    assert timing == (2.0, 10.0, 0.5)


def test_limits_are_rates_of_this_machine():
    limits = Limits(CPU, torch.bfloat16, buffer_mib=4, side=64)
    assert 1e7 < limits.read_rate() < 1e13
    assert 1e6 < limits.product_rate() < 1e15


def test_table_is_aligned_and_leaves_out_what_is_not_there():
    figures = [Figure("vision_views", 1.23456, "views/s", 2.0, 0.61728), Figure("prompt", 1036, "tokens")]
    assert format_table(figures).splitlines() == [
        "figure        value  unit     limit   share",
        "vision_views  1.235  views/s      2  61.7 %",
        "prompt         1036  tokens",
    ]


def test_json_holds_the_figures_by_name():
    figures = [Figure("decode", 21.987654, "tokens/s", 38.0, 0.5786), Figure("prompt", 1036, "tokens")]
    assert json.loads(json.dumps(figures_as_json(figures))) == {
        "decode": {"value": 21.988, "unit": "tokens/s", "limit": 38.0, "share": 0.5786},
        "prompt": {"value": 1036, "unit": "tokens"},
    }


def test_peak_shows_what_was_freed_since_the_reset():
    """Linux lets a process begin its peak again; elsewhere that is said."""
    is_linux = sys.platform == "linux"
    assert reset_peak() == is_linux
    if not is_linux:
        return
    before = peak_resident_bytes()
    torch.ones(10_000_000)  # 40 MB, freed at once
    assert 30e6 < peak_resident_bytes() - before < 60e6
    assert reset_peak()
    assert peak_resident_bytes() - before < 20e6
    assert resident_bytes() <= peak_resident_bytes()


def test_bytes_of_weights_and_buffers_by_part():
    model = torch.nn.Module()
    model.vision = torch.nn.Linear(3, 5)
    model.language = torch.nn.Module()
    model.language.register_buffer("norm", torch.zeros(7, dtype=torch.bfloat16))
    counts = weight_bytes_by_part(model)
    assert counts["vision"] == 4 * 20
    assert counts["norms"] == 14
    assert sum(counts.values()) == 94


def test_bytes_of_a_cache():
    class Layer:
        keys, values = torch.zeros(2, 3), torch.zeros(4, dtype=torch.bfloat16)

    class Empty:
        keys = None

    cache = type("Cache", (), {"layers": [Layer(), Empty()]})()
    assert cache_bytes(cache) == 24 + 8
