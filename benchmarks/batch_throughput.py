"""Measures `python -m deepseek_vl2.batch` against a loop that asks one picture after the other, and disturbs it.

python -m benchmarks.batch_throughput --folder runs/batch                2,000 scenes, 100 of them cut off, 10 kills

In turn: a loop over the first pictures; a run that nothing disturbs, with its memory; a run that is killed (SIGKILL) at
random moments and started again each time. The outputs of both must be equal. Linux only: memory is read from /proc.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.batch_scenes import add_run_arguments, make_scenes, num_records, read_output, start_batch, summary_of
from deepseek_vl2.utils.command_line import OneLineParser
from deepseek_vl2.utils.io import load_image, load_pretrained_model

MIB = 2**20
SAMPLE_SECONDS = 0.2
GOAL_SPEED_UP = 3.0
MAX_GROWTH = 0.1


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(
        prog="python -m benchmarks.batch_throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser, batch_size=64, window=512)
    parser.add_argument("--kills", type=int, default=10, help="default: 10")
    parser.add_argument("--loop_count", type=int, default=200, help="pictures of the loop; default: 200")
    parser.add_argument("--dtype", default="float32", help="default: float32, as nano is stored")
    parser.add_argument("--model_path", default="nano", help="default: nano")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills; default: 0")
    return parser.parse_args(arguments)


@torch.inference_mode()
def time_loop(options: argparse.Namespace, listing: Path) -> dict[str, Any]:
    """Asks one picture after the other, as the README's quick start does.

    Returns:
        Answers by index, and seconds a picture, loading of the model not counted.
    """
    _, processor, model = load_pretrained_model(options.model_path, options.dtype, "cpu")
    entries = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()[: options.loop_count]]
    answers: dict[int, str] = {}
    start = time.perf_counter()
    for entry in entries:
        question = [{"role": "<|User|>", "content": f"<image>\n{entry['prompt']}"}]
        try:
            pictures = [load_image(listing.parent / entry["image"])]
        except (ValueError, OSError):
            continue
        inputs: Any = processor(conversations=question, images=pictures)
        inputs.to(model.device, dtype=model.dtype)
        ids = model.generate(
            **inputs, max_new_tokens=options.max_new_tokens, do_sample=False, pad_token_id=processor.pad_id
        )
        new = ids[0, inputs.input_ids.shape[1] :].tolist()
        end = new.index(processor.eos_id) if processor.eos_id in new else len(new)
        answers[entry["id"]] = processor.decode(new[:end])
    return {"answers": answers, "seconds": (time.perf_counter() - start) / len(entries)}


def memory_of(process: subprocess.Popen[bytes]) -> int | None:
    """Bytes of a process in memory; `None` when it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    kib = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")]
    return kib[0] * 1024 if kib else None


def run_whole(listing: Path, output: Path, command: list[str], log: Path) -> tuple[int, list[tuple[int, int]]]:
    """Runs the command to its end.

    Returns:
        Its exit code; pairs of records written and bytes in memory.
    """
    process = start_batch(listing, output, command, log)
    samples = []
    while process.poll() is None:
        used = memory_of(process)
        if used is not None:
            samples.append((num_records(output), used))
        time.sleep(SAMPLE_SECONDS)
    return process.wait(), samples


def run_killed(
    listing: Path, output: Path, command: list[str], log: Path, moments: list[int], rng: random.Random
) -> int:
    """Runs the command, kills it when so many records are written, and starts it again, each time; then to its end.

    Returns:
        The exit code of the last start.

    Raises:
        RuntimeError: it ended before it was to be killed.
    """
    for moment in moments:
        process = start_batch(listing, output, command, log)
        try:
            while num_records(output) < moment:
                if process.poll() is not None:
                    raise RuntimeError(f"the run ended before record {moment}, see {log}")
                time.sleep(0.005)
            time.sleep(rng.random() * 0.3)  # within a batch, too
        finally:
            process.kill()
            process.wait()
    return start_batch(listing, output, command, log).wait()


def memory_growth(samples: list[tuple[int, int]], count: int) -> float:
    """How much more memory the last third takes than the second, as a share."""
    second = [used for done, used in samples if count / 3 <= done < 2 * count / 3]
    last = [used for done, used in samples if done >= 2 * count / 3]
    return statistics.median(last) / statistics.median(second) - 1 if second and last else 0.0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; see the top of the file."""
    rng = random.Random(options.seed)
    listing = make_scenes(options.folder / "scenes", options.count, options.num_corrupt, options.seed)
    loop = time_loop(options, listing)
    names = ("batch_size", "window", "max_new_tokens", "dtype", "model_path")
    command = ["--device", "cpu"]
    for name in names:
        command += [f"--{name}", str(getattr(options, name))]
    whole, killed = options.folder / "whole.jsonl", options.folder / "killed.jsonl"
    code, samples = run_whole(listing, whole, command, options.folder / "whole.log")
    moments = sorted(rng.randrange(options.count * 9 // 10) for _ in range(options.kills))
    killed_code = run_killed(listing, killed, command, options.folder / "killed.log", moments, rng)
    records, after_kills = read_output(whole), read_output(killed)
    seconds = summary_of(options.folder / "whole.log")["seconds"] / options.count
    answers = {record["index"]: record["text"] for record in records}
    num_loop_equal = sum(answers[index] == answer for index, answer in loop["answers"].items())
    return {
        "count": options.count,
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "loop_seconds_a_picture": round(loop["seconds"], 4),
        "batch_seconds_a_picture": round(seconds, 4),
        "batch_pictures_a_second": round(1 / seconds, 2),
        "speed_up": round(loop["seconds"] / seconds, 2),
        "memory_mib_peak": max((used for _, used in samples), default=0) // MIB,
        "memory_growth": round(memory_growth(samples, options.count), 4),
        "num_failed": sum(record["error"] is not None for record in records),
        "exit_codes": [code, killed_code],
        "killed_at": moments,
        "is_complete": [record["index"] for record in after_kills] == list(range(options.count)),
        "is_equal_after_kills": after_kills == records,
        "loop_answers_equal": f"{num_loop_equal} of {len(loop['answers'])}",
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; prints a table, then one line of JSON. Returns 1 if something is not as it must be."""
    options = parse_arguments(arguments)
    results = measure(options)
    for name, value in results.items():
        print(f"{name:26} {value}")
    wrong = []
    if not (results["is_complete"] and results["is_equal_after_kills"]):
        wrong.append("the killed run's output is another")
    if results["num_failed"] != options.num_corrupt or results["exit_codes"] != [int(options.num_corrupt > 0)] * 2:
        wrong.append("not exactly the pictures that are cut off have failed")
    if results["memory_growth"] > MAX_GROWTH:
        wrong.append("memory grows")
    if results["speed_up"] < GOAL_SPEED_UP:
        print(f"below the goal of {GOAL_SPEED_UP:g} times the loop", file=sys.stderr)
    for reason in wrong:
        print(reason, file=sys.stderr)
    print(json.dumps(results))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
