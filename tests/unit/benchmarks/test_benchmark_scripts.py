"""Benchmarks that are commands of their own: they start."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["api_load", "batch_ray", "batch_throughput", "checkpoints", "load_once"])
def test_it_starts(repository, name):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout.split("\n")[0]
