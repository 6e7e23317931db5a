"""Runs `python -m deepseek_vl2.batch --engine ray` with local workers, kills one, and compares with the local engine.

python -m benchmarks.batch_ray --folder runs/ray                              2,000 scenes, 2 workers, 1 of them killed

Linux only: the workers are found in /proc, among the processes that the run itself has started.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.batch_scenes import add_run_arguments, make_scenes, num_records, read_output, start_batch, summary_of
from deepseek_vl2.utils.command_line import OneLineParser

WORKER_NAME = "WindowWorker"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(
        prog="python -m benchmarks.batch_ray", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser, batch_size=16, window=64)
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    return parser.parse_args(arguments)


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that these have."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(status.parent.name)] = int(fields[1])
    found, front = [], [pid]
    while front:
        front = [child for child, parent in parents.items() if parent in front]
        found += front
    return found


def workers_of(pid: int) -> list[int]:
    """The workers of a run with a model each."""
    found = []
    for child in descendants(pid):
        try:
            title = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::") and WORKER_NAME.encode() in title:
            found.append(child)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; ends with one line of JSON. Returns 1 if the outputs differ or no worker could be killed."""
    options = parse_arguments(arguments)
    listing = make_scenes(options.folder / "scenes", options.count, options.num_corrupt)
    command = ["--device", "cpu", "--dtype", "float32"]
    for name in ("window", "batch_size", "max_new_tokens"):
        command += [f"--{name}", str(getattr(options, name))]
    local, spread = options.folder / "local.jsonl", options.folder / "ray.jsonl"
    local_code = start_batch(listing, local, command, options.folder / "local.log").wait()
    log = options.folder / "ray.log"
    process = start_batch(listing, spread, [*command, "--engine", "ray", "--workers", str(options.workers)], log)
    killed = None
    while process.poll() is None:
        if killed is None and num_records(spread) > 0:
            workers = workers_of(process.pid)
            if workers:
                killed = workers[0]
                os.kill(killed, signal.SIGKILL)
        time.sleep(0.1)
    is_equal = spread.exists() and read_output(spread) == read_output(local)
    results = {
        "count": options.count,
        "workers": options.workers,
        "is_worker_killed": killed is not None,
        "is_equal": is_equal,
        "exit_codes": [local_code, process.returncode],
        "local_seconds": summary_of(options.folder / "local.log")["seconds"],
        "ray_seconds": summary_of(log)["seconds"],
    }
    print(json.dumps(results))
    return int(not is_equal or killed is None)


if __name__ == "__main__":
    sys.exit(main())
