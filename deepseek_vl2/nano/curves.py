"""Draws the losses of a training of nano: `python -m deepseek_vl2.nano.curves`."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_vl2.nano.train import STAGES
from deepseek_vl2.utils.command_line import OneLineParser
from deepseek_vl2.utils.errors import describe_error

PROGRAM = "python -m deepseek_vl2.nano.curves"
# What is drawn, by the name in the log.
ANSWERS = {"words": "words of answers", "coordinates": "coordinates of answers", "pointing": "where attention goes"}
TOKENS = {
    "dense_class_ids": "class",
    "dense_color_ids": "color",
    "dense_boxes": "box",
    "patch_letters": "letters of patches",
    "patch_places": "their places in texts",
    "dense_letters": "letters",
    "dense_text": "letters by place",
    "dense_first_places": "place of the first letter",
    "dense_bar_values": "value of bars",
    "dense_row_ids": "row of tables",
}
# Means over so many lines of the log; batches of one, two and three pictures are hard in different ways.
WINDOW = 5
# A line is interrupted where its loss is absent for so many batches: some stages have not all of them.
MAX_GAP = 400


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, round by round; of batches that were learnt twice after a stop the last.

    Logs of earlier editions do not tell rounds apart.

    Raises:
        ValueError: If the file holds no lines of a training.
    """
    lines: dict[tuple[int, int, int], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = {"round": 1} | json.loads(text)
        lines[line["round"], STAGES.index(line["stage"]), line["batch"]] = line
    if not lines:
        raise ValueError(f"{path} holds no lines of a training")
    return [lines[position] for position in sorted(lines)]


def _part(line: dict[str, Any]) -> tuple[int, str]:
    return line["round"], line["stage"]


def smoothed(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Places on the axis of all stages and means of a loss; batches that hold nothing of its kind are left out."""
    places, values = [], []
    for line in lines:
        if line.get(name):
            places.append(line["place"])
            values.append(line[name])
    windows = [values[max(0, end - WINDOW) : end] for end in range(1, len(values) + 1)]
    means = [sum(window) / len(window) for window in windows]
    for number in range(len(places) - 1, 0, -1):
        if places[number] - places[number - 1] > MAX_GAP:
            places.insert(number, places[number])
            means.insert(number, math.nan)
    return places, means


def draw_curves(log: Path, output: Path) -> None:
    """Draws all losses of a log, stage after stage, as a PNG.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the log is empty.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install 'deepseek_vl2[train]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(log)
    starts: dict[tuple[int, str], int] = {}
    place = 0
    for part in dict.fromkeys(_part(line) for line in lines):  # a grown edition leaves stages out
        starts[part] = place
        place += max(line["batch"] for line in lines if _part(line) == part)
    for line in lines:
        line["place"] = starts[_part(line)] + line["batch"]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), sharex=True, layout="constrained")
    for axis, names, title in ((axes[0], ANSWERS, "Answers"), (axes[1], TOKENS, "What image tokens say they see")):
        for name, label in names.items():
            axis.plot(*smoothed(lines, name), label=label, linewidth=1.4)
        for number, ((_, stage), start) in enumerate(starts.items()):
            axis.axvline(start, color="0.8", linewidth=0.8)
            height = 0.99 - 0.04 * (number % 2)  # names of short stages would overlap
            axis.text(
                start, height, f" {stage}", transform=axis.get_xaxis_transform(), va="top", fontsize=8, color="0.4"
            )
        axis.set(title=title, xlabel="batch", ylabel="loss", yscale="log")
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.15), ncols=3)
        axis.grid(alpha=0.25)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 0, or 2 after an error that the user can mend."""
    parser = OneLineParser(prog=PROGRAM, description="Draw the losses of a training of nano.")
    parser.add_argument("--log", type=Path, default=Path("runs/nano/log.jsonl"), help="default: runs/nano/log.jsonl")
    parser.add_argument("--output", type=Path, default=Path("runs/nano/curves.png"), help="a PNG")
    options = parser.parse_args(arguments)
    try:
        draw_curves(options.log, options.output)
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROGRAM}: error: {describe_error(error)}", file=sys.stderr)
        return 2
    print(f"The curves are in {options.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
