"""Benchmarks that are commands of their own: they import, and explain themselves."""

import importlib

import pytest


@pytest.mark.parametrize("name", ["api_load", "batch_ray", "batch_throughput"])
def test_it_starts(capsys, name):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    assert f"python -m benchmarks.{name} " in capsys.readouterr().out
