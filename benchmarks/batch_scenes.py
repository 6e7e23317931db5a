"""What the benchmarks of batch runs share: a folder of nano's scenes with their questions, and what to compare."""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from deepseek_vl2.nano.tasks import EVAL_SPLIT, example_at

TASKS = ("locate", "count", "color", "describe")


def add_run_arguments(parser: argparse.ArgumentParser, batch_size: int, window: int) -> None:
    """Options of the scenes and of the runs over them.

    Args:
        parser: of the benchmark.
        batch_size: its default.
        window: its default.
    """
    parser.add_argument("--folder", type=Path, required=True, help="for pictures and outputs; must not hold any yet")
    parser.add_argument("--count", type=int, default=2000, help="pictures; default: 2000")
    parser.add_argument("--num_corrupt", type=int, default=100, help="of them cut off; default: 100")
    parser.add_argument("--batch_size", type=int, default=batch_size, help=f"default: {batch_size}")
    parser.add_argument("--window", type=int, default=window, help=f"default: {window}")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="default: 64")


def make_scenes(folder: Path, count: int, num_corrupt: int, seed: int = 0) -> Path:
    """Draws scenes of four tasks in turn, cuts some of their files off, and lists all with their questions.

    Args:
        folder: where they go.
        count: how many.
        num_corrupt: how many of them are cut off, at random places.
        seed: of these places.

    Returns:
        The file of JSON lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    corrupt = set(rng.sample(range(count), num_corrupt))
    lines = []
    for index in tqdm(range(count), desc="Draw", unit="picture"):
        example = example_at(EVAL_SPLIT, index, TASKS[index % len(TASKS)])
        path = folder / f"{index:06}.png"
        example.scenes[0].draw().save(path)
        if index in corrupt:
            content = path.read_bytes()
            path.write_bytes(content[: rng.randrange(len(content) // 2)])
        lines.append(json.dumps({"id": index, "image": path.name, "prompt": example.question}, ensure_ascii=False))
    listing = folder / "questions.jsonl"
    listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return listing


def start_batch(listing: Path, output: Path, options: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts the command as a process of its own; what it says goes to a file."""
    command = [sys.executable, "-m", "deepseek_vl2.batch", str(listing), "--output", str(output), *options]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def num_records(output: Path) -> int:
    """Records that a run has written so far."""
    path = output.with_name(output.name + ".run") / "records.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_output(output: Path) -> list[dict[str, Any]]:
    """The records of an output, without what differs between runs."""
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def summary_of(log: Path) -> dict[str, Any]:
    """The line of JSON that the command ends with.

    Raises:
        ValueError: there is none.
    """
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith('{"num_items"')]
    if not lines:
        raise ValueError(f"the command did not end well, see {log}")
    return json.loads(lines[-1])
