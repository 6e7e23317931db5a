"""Measures a model on held-out scenes: `python -m deepseek_vl2.nano.evaluate`.

Every scene, question and picture comes from the seeds of the evaluation split, which no training draws from. Questions
go the whole way that a user's go: picture, processor, `generate`, text, parser.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from deepseek_vl2.evaluate.metrics import IOU_THRESHOLD, match_boxes
from deepseek_vl2.evaluate.runner import answer_batch
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.special_tokens import ASSISTANT, IMAGE, USER
from deepseek_vl2.nano.questions import EVAL_SPLIT, TASKS, Example, example_at
from deepseek_vl2.serve.grounding import read_grounding
from deepseek_vl2.utils.io import DTYPES, load_pretrained_model

MAX_NEW_TOKENS = 160


def judge(example: Example, answer: str) -> dict[str, float]:
    """Scores of one answer.

    Returns:
        `accuracy`: for boxes whether every expected box is met with IoU of at least 0.5 and there are no others, for
        words whether the answer is the expected one. For boxes also `iou`, the mean over the expected ones.
    """
    if not example.boxes:
        return {"accuracy": float(answer.strip().rstrip(".").lower() == example.answer.lower())}
    found = [box.to_pixels(*example.scene.size) for box in read_grounding(answer).boxes]
    scores = match_boxes(found, example.boxes)
    is_right = len(found) == len(scores) and min(scores) >= IOU_THRESHOLD
    return {"accuracy": float(is_right), "iou": sum(scores) / len(scores)}


def answer_examples(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, examples: Sequence[Example]
) -> list[str]:
    """Answers questions greedily, as one batch."""
    prompts = [
        processor.process_one(
            conversations=[
                {"role": USER, "content": f"{IMAGE}\n{example.question}"},
                {"role": ASSISTANT, "content": ""},
            ],
            images=[example.scene.draw()],
        )
        for example in examples
    ]
    return answer_batch(model, processor, prompts, MAX_NEW_TOKENS)


def evaluate_task(
    model: DeepseekVLV2ForCausalLM,
    processor: DeepseekVLV2Processor,
    task: str,
    num_scenes: int,
    batch_size: int,
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """Asks one task of scenes `first` to `first + num_scenes` of the evaluation split; yields one record a scene."""
    indices = range(first, first + num_scenes)
    with tqdm(total=num_scenes, desc=task, unit="scene") as bar:
        for start in range(0, num_scenes, batch_size):
            chunk = indices[start : start + batch_size]
            examples = [example_at(EVAL_SPLIT, index, {task: 1.0}) for index in chunk]
            answers = answer_examples(model, processor, examples)
            for index, example, answer in zip(chunk, examples, answers, strict=True):
                record = {"task": task, "scene": index, "question": example.question, "expected": example.answer}
                yield record | {"answer": answer} | judge(example, answer)
            bar.update(len(chunk))


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means of all scores, by task."""
    summary: dict[str, dict[str, float]] = {}
    for task in dict.fromkeys(record["task"] for record in records):
        own = [record for record in records if record["task"] == task]
        names = [name for name in ("accuracy", "iou") if name in own[0]]
        means: dict[str, float] = {name: round(sum(record[name] for record in own) / len(own), 4) for name in names}
        summary[task] = {"scenes": len(own), **means}
    return summary


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; prints a table, then one line of JSON.

    Returns:
        The exit code: 0, or 2 after an error that the user can mend.
    """
    parser = argparse.ArgumentParser(prog="python -m deepseek_vl2.nano.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", default="nano", help="'nano' or a checkpoint folder; default: nano")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="default: all")
    parser.add_argument("--num_scenes", type=int, default=500, help="scenes a task; default: 500")
    parser.add_argument("--first_scene", type=int, default=0, help="number of the first scene; default: 0")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--output", type=Path, help="JSON lines of all answers")
    options = parser.parse_args(arguments)
    if min(options.num_scenes, options.batch_size) < 1 or options.first_scene < 0:
        parser.error("--num_scenes and --batch_size must be at least 1, --first_scene at least 0")
    try:
        loaded = load_pretrained_model(options.model_path, options.dtype, options.device)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    records: list[dict[str, Any]] = []
    for task in options.tasks:
        records += evaluate_task(
            loaded.model, loaded.processor, task, options.num_scenes, options.batch_size, options.first_scene
        )
    if options.output:
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    summary = summarize(records)
    print(f"{'task':<12} {'scenes':>6} {'accuracy':>9} {'mean IoU':>9}")
    for task, scores in summary.items():
        iou = f"{scores['iou']:9.3f}" if "iou" in scores else " " * 9
        print(f"{task:<12} {scores['scenes']:6d} {scores['accuracy']:9.3f} {iou}")
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
