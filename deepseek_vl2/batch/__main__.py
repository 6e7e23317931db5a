"""Answers a question about many pictures: `python -m deepseek_vl2.batch INPUT --output FILE`.

The same command goes on where a run was stopped, however it was. Exit codes: 0, all items have an answer; 1, some have
an error instead; 2, an error that the user can mend; 70, a fault of the program, with its traceback; 130, interrupted.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from deepseek_vl2 import __version__
from deepseek_vl2.batch.answering import AnswerOptions, ModelOptions
from deepseek_vl2.batch.engines import Job, run_here
from deepseek_vl2.batch.output import check_output, write_output
from deepseek_vl2.batch.pdf import DEFAULT_DPI
from deepseek_vl2.batch.preparing import BatchLimits
from deepseek_vl2.batch.ray_engine import ClusterOptions, run_on_ray
from deepseek_vl2.batch.record_file import RECORDS_FILE, RecordFile, drop_failed
from deepseek_vl2.batch.sources import Source, open_source
from deepseek_vl2.models.generation import check_chunk_size
from deepseek_vl2.models.quantization import check_quantization
from deepseek_vl2.serve.inference import sampling_options
from deepseek_vl2.utils.command_line import DTYPES, QUANTIZATIONS, OneLineParser
from deepseek_vl2.utils.errors import end_faults_with_own_code, run_command
from deepseek_vl2.utils.io import dtype_name, resolve_device
from deepseek_vl2.utils.run_folder import SETTINGS_FILE, begin_or_resume, folder_digest, lock_folder, model_digest

PROGRAM = "python -m deepseek_vl2.batch"
RUN_FOLDER_SUFFIX = ".run"
INTERRUPTED = "interrupted; the same command goes on where it stopped"
MORE_MEMORY = "a smaller --batch_size or --token_budget, or --chunk_size 512; the run goes on where it stopped"
_AT_LEAST_ONE = ("batch_size", "token_budget", "window", "readers", "pdf_dpi", "workers", "max_workers", "limit")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(prog=PROGRAM, description="Ask a DeepSeek-VL2 model about many pictures.")
    parser.add_argument(
        "input", help="a folder, a pattern in quotes ('scans/**/*.png'), a PDF, a picture, JSON lines or Parquet"
    )
    parser.add_argument("--output", type=Path, required=True, help="file of the answers, .jsonl or .parquet")
    _add_questions(parser)
    _add_model(parser)
    _add_resources(parser)
    options = parser.parse_args(arguments)
    for name in _AT_LEAST_ONE:
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    return options


def _add_questions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("questions")
    group.add_argument(
        "--prompt",
        help="the question, with fields such as {name}, {page} or {a_column}; default: describe it, with boxes",
    )
    group.add_argument("--image_column", help="field of the pictures; default: image or images")
    group.add_argument("--picture_root", type=Path, help="folder of the pictures; default: that of the input file")
    group.add_argument("--pdf_dpi", type=int, default=DEFAULT_DPI, help=f"pixels an inch; default: {DEFAULT_DPI}")
    group.add_argument("--limit", type=int, help="only the first so many items")
    group.add_argument("--retry_failed", action="store_true", help="ask items again that have an error")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model_path", default="nano", help="'nano', a checkpoint folder or a hub name; default: nano")
    group.add_argument("--adapter", metavar="FOLDER", help="what fine-tuning made of that model with LoRA")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default: auto")
    group.add_argument("--dtype", choices=DTYPES, help="default: what suits the device")
    group.add_argument("--quantize", choices=QUANTIZATIONS, help="hold the weights in 8 or 4 bits: less memory")
    group.add_argument("--max_new_tokens", type=int, default=512, help="length of an answer; default: 512")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, at best up to 0.7; default: 0")
    group.add_argument("--top_p", type=float, default=0.9, help="used with a temperature; default: 0.9")
    group.add_argument("--repetition_penalty", type=float, default=1.0, help="default: 1, none")
    group.add_argument("--seed", type=int, default=0, help="of sampling; each item has its own from it; default: 0")
    group.add_argument("--no_tiling", action="store_true", help="show pictures in one view only")


def _add_resources(parser: argparse.ArgumentParser) -> None:
    limits = BatchLimits()
    group = parser.add_argument_group("resources", "They may change when a run goes on.")
    group.add_argument("--batch_size", type=int, default=limits.batch_size, help=f"default: {limits.batch_size}")
    group.add_argument(
        "--token_budget",
        type=int,
        default=limits.token_budget,
        help=f"most tokens of a batch, with padding and room for answers; default: {limits.token_budget}",
    )
    group.add_argument(
        "--window", type=int, default=limits.window, help=f"items sorted by length together; default: {limits.window}"
    )
    group.add_argument(
        "--readers", type=int, default=limits.num_readers, help=f"threads that read; default: {limits.num_readers}"
    )
    group.add_argument("--chunk_size", type=int, default=-1, help="tokens to prefill at once; default -1: all")
    group.add_argument("--engine", choices=["local", "ray"], default="local", help="default: local, in this process")
    group.add_argument("--workers", type=int, default=1, help="of Ray, one model each; default: 1")
    group.add_argument("--max_workers", type=int, help="let Ray start up to so many; default: as --workers")
    group.add_argument("--gpus_per_worker", type=float, help="default: 1 if the cluster has GPUs")
    group.add_argument("--cpus_per_worker", type=float, default=1, help="default: 1")
    group.add_argument("--ray_address", help="of a cluster; default: RAY_ADDRESS, else one is started here")


def check_options(options: argparse.Namespace) -> None:
    """Refuses what cannot work before anything is read.

    Raises:
        ValueError: a number is out of range, the device is not there, or the output cannot be written.
        ImportError: a package for the output is not installed.
    """
    sampling_options(options.max_new_tokens, options.temperature, options.top_p, options.repetition_penalty)
    check_chunk_size(options.chunk_size)
    if options.engine == "local":
        device = resolve_device(options.device)
        if options.quantize is not None:
            check_quantization(options.quantize, device.type)
    check_output(options.output)


def make_job(options: argparse.Namespace) -> Job:
    """Opens the input.

    Raises:
        ValueError: see `open_source`; so are the other errors.
    """
    source = open_source(options.input, options.prompt, options.image_column, options.picture_root, options.pdf_dpi)
    model = ModelOptions(options.model_path, options.dtype, options.device, options.adapter, options.quantize)
    answers = AnswerOptions(
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.repetition_penalty,
        options.seed,
        not options.no_tiling,
        options.chunk_size,
    )
    limits = BatchLimits(options.batch_size, options.token_budget, options.window, options.readers)
    return Job(source, model, answers, limits)


def run_settings(options: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What decides about the answers; a run goes on only with the same.

    Raises:
        OSError: the model is not there.
    """
    names = ("prompt", "image_column", "pdf_dpi", "limit", "dtype", "quantize", "max_new_tokens", "temperature")
    settings = {name: getattr(options, name) for name in (*names, "top_p", "repetition_penalty", "seed", "no_tiling")}
    return {
        # The digest is one of names (or lines) that are relative: in another folder they mean other pictures.
        "input": os.path.abspath(Path(options.input).expanduser()),  # noqa: PTH100 - also of a pattern, without ".."
        "input_digest": source.digest,
        "picture_root": None if options.picture_root is None else str(options.picture_root.resolve()),
        "model": options.model_path,
        "model_digest": model_digest(options.model_path),
        "adapter_digest": None if options.adapter is None else folder_digest(Path(options.adapter)),
        **settings,
        "version": __version__,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Answers all items and writes the output.

    Returns:
        Counts.

    Raises:
        ValueError: an option, the input or what is in the folder of the run does not fit.
        OSError: a file is missing or cannot be written.
        ImportError: a package is not installed.
    """
    started = time.perf_counter()
    check_options(options)
    folder = options.output.with_name(options.output.name + RUN_FOLDER_SUFFIX)
    if options.dtype is None:
        options.dtype = _default_dtype(options, folder)
    job = make_job(options)
    num_items = min(len(job.source), options.limit or len(job.source))
    with lock_folder(folder):
        if options.output.exists() and not (folder / SETTINGS_FILE).exists():
            raise ValueError(f"{options.output} is there already, and not of a run that could go on; take another name")
        begin_or_resume(folder, run_settings(options, job.source), RECORDS_FILE)
        if options.retry_failed:
            drop_failed(folder)
        with RecordFile(folder, num_items) as file:
            num_before = file.num_done
            if options.engine == "ray":
                cluster = ClusterOptions(
                    options.ray_address,
                    options.workers,
                    options.max_workers,
                    options.gpus_per_worker,
                    options.cpus_per_worker,
                )
                run_on_ray(job, file, cluster)
            else:
                run_here(job, file)
            write_output(file.in_order(), options.output, folder)
    seconds = time.perf_counter() - started
    return {
        "num_items": num_items,
        "num_failed": file.num_failed,
        "num_done_before": num_before,
        "seconds": round(seconds, 2),
        "items_per_second": round((num_items - num_before) / seconds, 3),
        "output": str(options.output),
    }


def _default_dtype(options: argparse.Namespace, folder: Path) -> str | None:
    """The type of the run in the folder, if there is one: it goes on with it, whatever the engine. Else what suits.

    Only Ray's workers know what suits their devices; `None` leaves it to them.
    """
    try:
        noted = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        noted = None  # there is no run, or `begin_or_resume` says what is wrong with it
    if isinstance(noted, dict) and "dtype" in noted:
        dtype: str | None = noted["dtype"]
        return dtype
    return dtype_name(options.model_path, options.device, options.quantize) if options.engine == "local" else None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; prints one line of JSON. Returns the exit code."""
    options = parse_arguments(arguments)
    return run_command(PROGRAM, lambda: _run_and_tell(options), MORE_MEMORY, INTERRUPTED)


def _run_and_tell(options: argparse.Namespace) -> int:
    summary = run(options)
    print(json.dumps(summary, ensure_ascii=False))
    if summary["num_failed"]:
        print(
            f"{PROGRAM}: {summary['num_failed']} of {summary['num_items']} items failed; {options.output} says why, "
            "and --retry_failed asks them again",
            file=sys.stderr,
        )
        return 1
    return 0


def command() -> NoReturn:
    """Runs the command as a process of its own, and ends it."""
    end_faults_with_own_code()
    sys.exit(main())


if __name__ == "__main__":
    command()
