"""Measures a model on a benchmark: `python -m deepseek_vl2.evaluate --model_path M --data FILE --task T --output DIR`.

Exit codes: 0; 2 after an error that the user can mend; 130 when interrupted (the same command goes on).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_vl2 import __version__
from deepseek_vl2.evaluate.predictions import PREDICTIONS_FILE
from deepseek_vl2.evaluate.readers import BOX_FORMATS, FORMATS, choose_format, read_samples
from deepseek_vl2.evaluate.report import write_report
from deepseek_vl2.evaluate.results import format_table, summarize_run
from deepseek_vl2.evaluate.runner import Asker, find_too_long, run
from deepseek_vl2.evaluate.samples import BadEntry, Sample
from deepseek_vl2.evaluate.tasks import MAX_NEW_TOKENS, TASKS, Task
from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.generation import check_chunk_size
from deepseek_vl2.models.quantization import check_quantization
from deepseek_vl2.utils.command_line import DTYPES, QUANTIZATIONS, OneLineParser
from deepseek_vl2.utils.data_files import write_whole
from deepseek_vl2.utils.errors import run_command
from deepseek_vl2.utils.hardware import use_chosen_num_threads
from deepseek_vl2.utils.io import dtype_name, load_pretrained_model, load_processor, resolve_device
from deepseek_vl2.utils.run_folder import begin_or_resume, file_digest, lock_folder, model_digest

PROGRAM = "python -m deepseek_vl2.evaluate"
RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"
INTERRUPTED = "interrupted; the same command goes on where it stopped"
MORE_MEMORY = "a smaller --batch_size, --chunk_size 512 or --device cpu"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(prog=PROGRAM, description="Measure a DeepSeek-VL2 model on a benchmark.")
    parser.add_argument("--model_path", default="nano", help="'nano', a checkpoint folder or a hub name; default: nano")
    parser.add_argument("--data", type=Path, required=True, help="file of the benchmark")
    parser.add_argument("--task", required=True, choices=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--output", type=Path, required=True, help="folder of this run; the same command goes on in it")
    parser.add_argument(
        "--format", choices=list(FORMATS), help="form of the file; default: tsv for .tsv, conversations for .jsonl"
    )
    parser.add_argument("--box_format", choices=BOX_FORMATS, help="how a refcoco_list writes boxes")
    parser.add_argument("--picture_root", type=Path, help="folder of the pictures; default: that of the file")
    parser.add_argument("--skip-bad", "--skip_bad", action="store_true", help="go on without entries that are bad")
    parser.add_argument("--limit", type=int, help="only the first so many samples")
    parser.add_argument("--batch_size", type=int, default=1, help="default: 1")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help=f"default: {MAX_NEW_TOKENS}")
    parser.add_argument("--chunk_size", type=int, default=-1, help="tokens to prefill at once; default -1: all")
    parser.add_argument(
        "--no_tiling", "--no-tiling", action="store_true", help="show pictures in one view only, to see what tiles add"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default: auto")
    parser.add_argument("--dtype", choices=DTYPES, help="default: what suits the device")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="hold the weights in 8 or 4 bits")
    parser.add_argument("--num_examples", type=int, default=60, help="in the report, the worst first; default: 60")
    options = parser.parse_args(arguments)
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    if options.num_examples < 0:
        parser.error(f"--num_examples {options.num_examples} must be at least 0")
    return options


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Reads, asks, sums up, and writes everything.

    Returns:
        The content of results.json.

    Raises:
        ValueError: bad entries, or settings that do not fit; see the modules that do the work.
        OSError: a file is missing or cannot be written.
    """
    task = TASKS[options.task]
    check_chunk_size(options.chunk_size)
    if options.quantize is not None:
        check_quantization(options.quantize, resolve_device(options.device).type)
    settings = run_settings(options)
    data = read_samples(
        options.data, settings["format"], task.prepare, options.picture_root, options.box_format, options.limit
    )
    samples, num_skipped = leave_out(data.samples, data.problems, options.skip_bad)
    with lock_folder(options.output):
        begin_or_resume(options.output, settings, PREDICTIONS_FILE)
        return _ask_and_report(options, task, settings, samples, num_skipped)


def _ask_and_report(
    options: argparse.Namespace, task: Task, settings: dict[str, Any], samples: list[Sample], num_skipped: int
) -> dict[str, Any]:
    def load_model() -> DeepseekVLV2ForCausalLM:
        use_chosen_num_threads()
        how = {"dtype": settings["dtype"], "device": options.device, "quantize": options.quantize, "pack": True}
        return load_pretrained_model(options.model_path, **how).model

    numbers = (options.max_new_tokens, options.chunk_size)
    asker = Asker(*load_processor(options.model_path), load_model, task, *numbers, use_tiling=not options.no_tiling)
    samples, num_too_long = leave_out(samples, find_too_long(asker, samples), options.skip_bad)
    records = run(asker, samples, options.output, options.batch_size)
    results = {"task": options.task, "metric": task.metric, **summarize_run(records, is_circular=task.is_circular)}
    results |= {"num_skipped": num_skipped + num_too_long, "settings": settings}
    write_whole(options.output / RESULTS_FILE, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_report(options.output / REPORT_FILE, results, samples, records, options.num_examples)
    return results


def run_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What decides about the answers; a run goes on only with the same.

    Raises:
        ValueError: no such device, or the kind of file is not known.
        OSError: the data file or the model is not there.
    """
    return {
        "task": options.task,
        "model": options.model_path,
        "model_digest": model_digest(options.model_path),
        "data_digest": file_digest(options.data),
        "format": choose_format(options.data, options.format),
        "box_format": options.box_format,
        "picture_root": _other_root(options),
        "limit": options.limit,
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "chunk_size": options.chunk_size,
        "no_tiling": options.no_tiling,
        "device": resolve_device(options.device).type,
        "dtype": options.dtype or dtype_name(options.model_path, options.device, options.quantize),
        "quantize": options.quantize,
        "version": __version__,
    }


def _other_root(options: argparse.Namespace) -> str | None:
    """Where pictures are, if not beside the data: that folder moves with them."""
    if options.picture_root is None or options.picture_root.resolve() == options.data.parent.resolve():
        return None
    return str(options.picture_root.resolve())


def leave_out(samples: Sequence[Sample], problems: Sequence[BadEntry], skip_bad: bool) -> tuple[list[Sample], int]:
    """Names every bad entry, and leaves the samples of those entries out if that is wanted.

    Returns:
        The samples, and how many entries are bad.

    Raises:
        ValueError: there are bad entries and they are not to be skipped, or nothing is left.
    """
    for problem in problems:
        print(f"{PROGRAM}: {problem}", file=sys.stderr)
    places = {problem.where for problem in problems}
    rest = [sample for sample in samples if sample.where not in places]
    if problems and not (skip_bad and rest):
        way_out = "mend them, or go on without them: --skip-bad" if rest else "none is left to ask"
        raise ValueError(f"{len(problems)} bad of {len(problems) + len(rest)} entries; {way_out}")
    if problems:
        print(f"{PROGRAM}: {len(problems)} bad entries are left out, {len(rest)} remain", file=sys.stderr)
    return rest, len(problems)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; prints a table, then one line of JSON. Returns the exit code."""
    options = parse_arguments(arguments)
    return run_command(PROGRAM, lambda: _evaluate_and_tell(options), MORE_MEMORY, INTERRUPTED)


def _evaluate_and_tell(options: argparse.Namespace) -> int:
    results = evaluate(options)
    print(f"{results['task']}: {results['metric']}, report in {options.output / REPORT_FILE}")
    print(format_table(results))
    summary = {"task": results["task"], "metric": results["metric"], **results["overall"]}
    print(json.dumps(summary | {"num_skipped": results["num_skipped"]}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
