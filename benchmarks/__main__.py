"""Measures a model beside this machine's limits: `python -m benchmarks`; prints a table, then one line of JSON.

Exit codes: 0; 2 after an error that the user can mend; 130 when interrupted.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import measurements
from benchmarks.bench import Bench
from benchmarks.checkpoints import sized_config, write_checkpoint
from benchmarks.curves import check_matplotlib, draw_curves, measure_curves
from benchmarks.limits import Limits
from benchmarks.load_once import add_load_arguments, load_options, measure_load
from benchmarks.profiling import format_profile, profile
from benchmarks.results import Figure, figures_as_json, format_table
from benchmarks.turns import measure_turns
from deepseek_vl2 import __version__
from deepseek_vl2.models.cpu_features import has_fast_bfloat16
from deepseek_vl2.models.quantization import own_quantization
from deepseek_vl2.utils.command_line import OneLineParser
from deepseek_vl2.utils.errors import run_command
from deepseek_vl2.utils.hardware import use_chosen_num_threads
from deepseek_vl2.utils.io import load_pretrained_model, resolve_device, resolve_dtype
from deepseek_vl2.utils.model_size import PUBLISHED_SIZES, parameters_by_part

PROGRAM = "python -m benchmarks"
LOAD = "load"
# Those of a loaded model, in the order in which they run.
PARTS: dict[str, Callable[[Bench], list[Figure]]] = {
    "vision": measurements.measure_vision,
    "prefill": measurements.measure_prefill,
    "first_token": measurements.measure_first_token,
    "decode": measurements.measure_decode,
    "batch": measurements.measure_batch,
    "turns": measure_turns,
    "memory": measurements.measure_memory,
    "prefill_memory": measurements.measure_prefill_memory,
}
ALL_PARTS = (LOAD, *PARTS)
# It takes much memory and time, so it runs when it is asked for.
DEFAULT_PARTS = tuple(part for part in ALL_PARTS if part != "prefill_memory")
CHECKPOINTS = Path("runs/benchmarks")
MORE_MEMORY = "--quantize int8, --layers 4, or fewer --parts"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(prog=PROGRAM, description="Measure a model beside this machine's limits.")
    add_load_arguments(parser)
    parser.set_defaults(model_path=None)  # to tell what was given from what was not
    parser.add_argument("--size", choices=PUBLISHED_SIZES, help="in place of --model_path: random weights of this size")
    parser.add_argument("--layers", type=int, help="with --size: only the first so many layers of the language model")
    parser.add_argument("--folder", type=Path, help=f"with --size: where they are written; default: in {CHECKPOINTS}")
    parser.add_argument(
        "--parts", default=",".join(DEFAULT_PARTS), help=f"some of {','.join(ALL_PARTS)}; default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=5, help="times that count, of which the median; default: 5")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens to decode each time; default: 32")
    parser.add_argument("--buffer_mib", type=int, default=512, help="buffer that is read for the limit; default: 512")
    parser.add_argument(
        "--product_side", type=int, default=2048, help="side of the matrices for the limit; default: 2048"
    )
    parser.add_argument("--profile", action="store_true", help="also say where the time goes, by part of the model")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="also draw latency and memory over the prompt")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    check_arguments(parser, options)
    if options.model_path is None:
        options.model_path = "nano"
    return options


def check_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program on numbers and names that cannot work."""
    unknown = [part for part in options.parts if part not in ALL_PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: take some of {','.join(ALL_PARTS)}")
    for name, least in (("repeats", 1), ("new_tokens", 2), ("buffer_mib", 1), ("product_side", 16), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value} must be at least {least}")
    if options.size is None and (options.layers is not None or options.folder is not None):
        parser.error("--layers and --folder go with --size")
    if options.size is not None and options.model_path is not None:
        parser.error("give --size or --model_path, not both")


def find_model(options: argparse.Namespace) -> None:
    """Writes the checkpoint of random weights that `--size` asks for, and puts its folder into `model_path`."""
    if options.size is None:
        return
    name = options.size if options.layers is None else f"{options.size}-{options.layers}-layers"
    folder = options.folder or CHECKPOINTS / name
    options.model_path = str(write_checkpoint(sized_config(options.size, options.layers), folder).resolve())


def set_threads(num_threads: int | None) -> int:
    """Uses so many threads, or what suits the machine; returns the number."""
    if num_threads is None:
        return use_chosen_num_threads()
    torch.set_num_threads(num_threads)
    return num_threads


def weights_kind(quantize: str | None, model: Any) -> str:
    """How a model's weights are stored, one of `model_size.WEIGHT_KINDS`."""
    unquantized = "float32" if model.dtype == torch.float32 else "bfloat16"
    return quantize or own_quantization(model.config) or unquantized


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything that is asked for, and prints it as it comes.

    Returns:
        What the last line of the output says.

    Raises:
        ValueError: A setting that does not fit; see the modules that do the work.
        OSError: A file is missing, or the disk has no room.
        ImportError: A package for plots or checkpoints is missing.
    """
    if options.plots:
        check_matplotlib()
        # Now: a folder that cannot be is no reason to lose what was measured.
        options.plots.mkdir(parents=True, exist_ok=True)
    device = resolve_device(options.device)
    if options.dtype is not None:
        resolve_dtype(options.dtype)
    num_threads = set_threads(options.threads)
    find_model(options)
    product_dtype = torch.float32 if device.type == "cpu" and not has_fast_bfloat16() else torch.bfloat16
    limits = Limits(device, product_dtype, options.buffer_mib, options.product_side)
    figures: list[Figure] = []
    if LOAD in options.parts:
        figures += measure_load(options, limits, num_threads, options.repeats)
    loaded = load_pretrained_model(**load_options(options))
    weights = weights_kind(options.quantize, loaded.model)
    bench = Bench(loaded, weights, limits, options.repeats, options.new_tokens)
    figures += measurements.measure_limits(bench)
    for part, measure_part in PARTS.items():
        if part in options.parts:
            print(f"{PROGRAM}: {part} ...", file=sys.stderr, flush=True)
            figures += measure_part(bench)
    result = {
        "model": options.size or Path(options.model_path).name,
        "layers": bench.config.language_config.num_hidden_layers,
        "parameters": sum(parameters_by_part(bench.config).values()),
        "weights": weights,
        "machine": describe_machine(device, num_threads),
        "figures": figures_as_json(figures),
    }
    print(format_table(figures))
    return result | _extras(options, bench)


def _extras(options: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Profile and curves, if they are asked for."""
    extras: dict[str, Any] = {}
    if options.profile:
        extras["profile"] = profile(bench)
        print(f"\n{format_profile(extras['profile'])}")
    if options.plots:
        extras["curves"] = measure_curves(bench)
        files = draw_curves(extras["curves"], options.plots)
        print(f"\nThe plots are in {' and '.join(map(str, files))}.")
    return extras


def describe_machine(device: torch.device, num_threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
        "threads": num_threads,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepseek_vl2": __version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parse_arguments(arguments)
    return run_command(PROGRAM, lambda: _run_and_tell(options), MORE_MEMORY)


def _run_and_tell(options: argparse.Namespace) -> int:
    result = run(options)
    machine = result["machine"]
    given = machine["OMP_NUM_THREADS"] or "not set"
    print(f"\n{machine['threads']} threads (OMP_NUM_THREADS: {given}), {machine['device']}")
    print(json.dumps(result, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    sys.exit(main())
