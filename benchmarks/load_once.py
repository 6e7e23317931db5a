"""Loads a model in a process of its own and says how long it took and how much memory: see `measure_load`."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.limits import Limits
from benchmarks.memory import peak_resident_bytes, weight_bytes_by_part
from benchmarks.results import Figure
from deepseek_vl2.utils.checkpoint_files import check_weight_files
from deepseek_vl2.utils.command_line import OneLineParser
from deepseek_vl2.utils.hardware import THREAD_VARIABLES
from deepseek_vl2.utils.io import checkpoint_folder, load_pretrained_model, resolve_model_path

GB = 1e9
# Larger checkpoints are loaded once only.
LARGE_BYTES = 10_000_000_000


def load_options(options: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `load_pretrained_model` that the command line asks for."""
    keywords = {"path": options.model_path, "dtype": options.dtype, "device": options.device}
    return keywords | {"quantize": options.quantize, "pack": options.pack, "compile": options.compile}


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say what is loaded, and how."""
    parser.add_argument("--model_path", default="nano", help="'nano', a checkpoint folder or a hub name; default: nano")
    parser.add_argument("--dtype", help="type of the weights; default: what suits the device")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--quantize", choices=["int8", "int4"], help="store weights in fewer bits")
    parser.add_argument("--pack", action="store_true", help="reorder weights for the CPU, as servers and batch runs do")
    parser.add_argument("--compile", action="store_true", help="torch.compile; the warm-up then takes minutes")
    parser.add_argument("--threads", type=int, help="threads; default: what suits the machine, or OMP_NUM_THREADS")


def measure_load(options: argparse.Namespace, limits: Limits, num_threads: int, repeats: int) -> list[Figure]:
    """Loads the model in fresh processes, so that memory is that of loading alone.

    Raises:
        ValueError: Loading failed; the message is the loader's.
    """
    files = check_weight_files(Path(checkpoint_folder(resolve_model_path(options.model_path))))
    num_loads = 1 if files.num_bytes > LARGE_BYTES else repeats
    loads = [load_in_a_process(options, num_threads) for _ in range(num_loads)]
    seconds, peak, imported, stored = (
        median(load[name] for load in loads) for name in ("seconds", "peak_bytes", "import_bytes", "weight_bytes")
    )
    least = files.num_bytes / limits.read_rate()
    return [
        Figure("load", seconds, "s", least, least / seconds),
        Figure("load_peak", peak / GB, "GB", stored / GB, stored / peak),
        Figure("load_peak_over_weights", peak / stored, "x"),
        Figure("load_peak_without_libraries_over_weights", (peak - imported) / stored, "x"),
        Figure("load_libraries", imported / GB, "GB"),
    ]


def load_in_a_process(options: argparse.Namespace, num_threads: int) -> dict[str, float]:
    """Loads the model in a fresh process.

    Returns:
        `seconds`, `peak_bytes` of the process, `import_bytes` that it held before, `weight_bytes`.

    Raises:
        ValueError: Loading failed; the message is the loader's.
    """
    command = [sys.executable, "-m", "benchmarks.load_once", "--model_path", resolve_model_path(options.model_path)]
    command += ["--device", options.device, "--threads", str(num_threads)]
    for name in ("dtype", "quantize"):
        value = getattr(options, name)
        command += [f"--{name}", value] if value else []
    command += ["--pack"] if options.pack else []
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(num_threads))
    environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise ValueError(f"loading {options.model_path} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Loads once and prints one line of JSON."""
    parser = OneLineParser(prog="python -m benchmarks.load_once", description=__doc__)
    add_load_arguments(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    from deepseek_vl2.models import DeepseekVLV2ForCausalLM  # noqa: F401 - imports are no part of loading

    imported = peak_resident_bytes()
    start = time.perf_counter()
    model = load_pretrained_model(**load_options(options)).model
    seconds = time.perf_counter() - start
    stored = sum(weight_bytes_by_part(model).values())
    result = {
        "seconds": seconds,
        "import_bytes": imported,
        "peak_bytes": peak_resident_bytes(),
        "weight_bytes": stored,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
