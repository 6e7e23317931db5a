"""Measures a model on held-out scenes: `python -m deepseek_vl2.nano.evaluate`.

Draws the questions of every ability of nano from the seeds of the evaluation split, which no training draws from,
writes them as files and runs `python -m deepseek_vl2.evaluate` on each. `--card` puts the numbers into a model card.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from deepseek_vl2.evaluate.__main__ import RESULTS_FILE
from deepseek_vl2.evaluate.__main__ import main as run_evaluation
from deepseek_vl2.evaluate.judges import plain_answer
from deepseek_vl2.models.special_tokens import ASSISTANT, USER
from deepseek_vl2.nano.questions import Example, num_new_pictures
from deepseek_vl2.nano.several import beginning_of
from deepseek_vl2.nano.tasks import EVAL_SPLIT, TASKS, example_at
from deepseek_vl2.utils.command_line import DTYPES, OneLineParser
from deepseek_vl2.utils.errors import USER_ERRORS, run_command

PROGRAM = "python -m deepseek_vl2.nano.evaluate"
MAX_NEW_TOKENS = 200
QUESTIONS_FILE = "questions.jsonl"
# The same questions, asked with the global view alone.
UNTILED_TASK = "small"
UNTILED_TITLE = "the same with the global view alone"
_ROW = re.compile(r"\| (\w+): ")
TABLE_START, TABLE_END = "<!-- nano-accuracy -->", "<!-- /nano-accuracy -->"


def messages_of(example: Example, pictures: Sequence[str], is_numbered: bool = False) -> list[dict[str, Any]]:
    """The conversation of an example, its answer last.

    Args:
        example: The question.
        pictures: Where its pictures are.
        is_numbered: Whether several pictures are introduced by number, see `beginning_of`.
    """
    messages: list[dict[str, Any]] = []
    left = list(pictures)
    for turn, num_new in zip(example.turns, num_new_pictures(example.turns), strict=True):
        message: dict[str, Any] = {"role": USER, "content": turn.question}
        if num_new:
            message["content"] = f"{beginning_of(num_new, is_numbered)}\n{turn.question}"
            message["images"], left = left[:num_new], left[num_new:]
        messages += [message, {"role": ASSISTANT, "content": turn.answer}]
    return messages


def write_examples(examples: Iterable[Example], folder: Path) -> Path:
    """Writes questions, their answers and pictures as files.

    Returns:
        The file of questions, which `deepseek_vl2.train` and `deepseek_vl2.evaluate` read.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    path = folder / QUESTIONS_FILE
    with path.open("w", encoding="utf-8") as file:
        for index, example in enumerate(examples):
            names = []
            for number, scene in enumerate(example.scenes, start=1):
                names.append(f"pictures/{index:06d}_{number}.png")
                scene.draw().save(folder / names[-1])
            # Three pictures are introduced by number half of the time.
            messages = messages_of(example, names, is_numbered=len(names) > 2 and index % 2 == 0)
            record: dict[str, Any] = {"id": f"{example.task}-{index}", "conversations": messages}
            # As the evaluation reads answers: without a full stop at the end.
            record["answer"] = plain_answer(example.answer)
            if example.boxes:
                record["boxes"] = [list(box) for box in example.boxes]
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def evaluate_file(path: Path, judge: str, folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs `deepseek_vl2.evaluate` on a file of questions; returns the content of its results.json.

    Args:
        path: The questions.
        judge: Task of the evaluation.
        folder: Of the run; one that was stopped goes on.
        arguments: Others for the command.

    Raises:
        RuntimeError: If the evaluation failed; it has said why.
    """
    known = ["--data", str(path), "--task", judge, "--output", str(folder), "--max_new_tokens", str(MAX_NEW_TOKENS)]
    code = run_evaluation([*known, *arguments])
    if code:
        raise RuntimeError(f"the evaluation of {path} ended with exit code {code}")
    return json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))


def measure(options: argparse.Namespace, task: str) -> dict[str, dict[str, Any]]:
    """Draws the questions of one task and runs its evaluation; that of small objects also with the global view alone.

    Returns:
        Results by name, see `format_rows`.

    Raises:
        RuntimeError: If an evaluation failed; it has said why.
    """
    folder = options.output / task
    indices = range(options.first_scene, options.first_scene + options.num_scenes)
    drawing = tqdm(indices, desc=f"drawing {task}", unit="scene")
    path = write_examples((example_at(EVAL_SPLIT, index, task) for index in drawing), folder)
    arguments = ["--model_path", options.model_path, "--batch_size", str(options.batch_size)]
    arguments += ["--device", options.device, *(["--dtype", options.dtype] if options.dtype else [])]
    judge = TASKS[task].judge
    results = {task: evaluate_file(path, judge, folder / "run", arguments)}
    if task == UNTILED_TASK:
        name = f"{task}_untiled"
        results[name] = evaluate_file(path, judge, folder / "run_untiled", [*arguments, "--no_tiling"])
    return results


def format_rows(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of a model card.

    Args:
        results: For each task, and for `UNTILED_TASK` + "_untiled", the content of results.json.
    """
    lines = ["| task | measured by | score | 95 % interval | mean IoU |", "|---|---|---|---|---|"]
    for name, result in results.items():
        numbers = result["overall"]
        title = TASKS[name].title if name in TASKS else UNTILED_TITLE
        interval = "{low:.3f} to {high:.3f}".format(
            **{bound: numbers["interval"][bound] / 100 for bound in ("low", "high")}
        )
        iou = f"{numbers['mean_iou'] / 100:.3f}" if "mean_iou" in numbers else ""
        lines.append(f"| {name}: {title} | {result['metric']} | {numbers['score'] / 100:.3f} | {interval} | {iou} |")
    return "\n".join(lines)


def update_card(path: Path, table: str) -> None:
    """Puts a table between the marks of a card; rows of tasks that it lacks stay.

    Raises:
        ValueError: If the file has no marks.
    """
    text = path.read_text(encoding="utf-8")
    before, found_start, rest = text.partition(TABLE_START)
    old, found_end, after = rest.partition(TABLE_END)
    if not (found_start and found_end):
        raise ValueError(f"{path} has no place for the table: {TABLE_START} and {TABLE_END}")
    head = [line for line in table.splitlines() if not _ROW.match(line)]
    merged = "\n".join([*head, *(_rows_by_task(old) | _rows_by_task(table)).values()])
    path.write_text(f"{before}{TABLE_START}\n{merged}\n{TABLE_END}{after}", encoding="utf-8")


def _rows_by_task(table: str) -> dict[str, str]:
    return {match[1]: line for line in table.splitlines() if (match := _ROW.match(line))}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model_path", default="nano", help="'nano' or a checkpoint folder; default: nano")
    parser.add_argument("--output", type=Path, default=Path("runs/nano_evaluation"), help="questions, answers, reports")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="default: all")
    parser.add_argument("--num_scenes", type=int, default=500, help="scenes a task; default: 500")
    parser.add_argument("--first_scene", type=int, default=0, help="number of the first scene; default: 0")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, help="default: what suits the device")
    parser.add_argument("--card", type=Path, nargs="*", default=[], help="Markdown files to put the numbers into")
    options = parser.parse_args(arguments)
    if min(options.num_scenes, options.batch_size) < 1 or options.first_scene < 0:
        parser.error("--num_scenes and --batch_size must be at least 1, --first_scene at least 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; prints a table, then one line of JSON.

    Returns:
        The exit code: 0, 2 after an error that the user can mend, 130 when interrupted.
    """
    options = parse_arguments(arguments)
    return run_command(PROGRAM, lambda: _measure_and_tell(options), errors=(*USER_ERRORS, RuntimeError))


def _measure_and_tell(options: argparse.Namespace) -> int:
    results: dict[str, dict[str, Any]] = {}
    for task in options.tasks:
        results |= measure(options, task)
    for card in options.card:
        update_card(card, format_rows(results))
    print(format_rows(results))
    print(json.dumps({name: result["overall"] for name, result in results.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
