"""Teaches the bundled model a colour that it does not know, brown, and measures it before and after.

    python examples/finetune/new_color.py --folder runs/brown

draws the data, fine-tunes an adapter as `config.yaml` says, and prints accuracy for questions on brown objects and for
the tasks that nano knew before. Old questions are mixed in, so that those are not forgotten. Then ask it:

    python inference.py --adapter runs/brown/adapter --image runs/brown/0.png --prompt "What is the brown object?"
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from deepseek_vl2.models.special_tokens import ASSISTANT, IMAGE, USER
from deepseek_vl2.nano.evaluate import answer_examples, judge
from deepseek_vl2.nano.questions import (
    EVAL_SPLIT,
    TRAIN_SPLIT,
    Example,
    example_at,
    make_color,
    make_locate,
    make_shape,
    split_rng,
)
from deepseek_vl2.nano.scenes import COLOR_JITTER, Scene, random_scene
from deepseek_vl2.train import read_config, train
from deepseek_vl2.utils.io import load_pretrained_model

CONFIG = Path(__file__).parent / "config.yaml"
NEW_COLOR = "brown"
NEW_RGB = (120, 72, 30)
NEW_TASKS = {"new locate": make_locate, "new color": make_color, "new shape": make_shape}
OLD_TASKS = ("locate", "locate_all", "count", "color", "shape", "describe", "read")
BATCH_SIZE = 25


def new_scene(rng: random.Random) -> Scene:
    """A scene in which one shape, or two of them, have the new colour."""
    scene = random_scene(rng, num_objects=(2, 5))
    shapes = [number for number, item in enumerate(scene.objects) if item.kind == "shape"]
    objects = list(scene.objects)
    for number in rng.sample(shapes, min(len(shapes), rng.choice((1, 1, 1, 2)))):
        red, green, blue = (value + rng.randint(-COLOR_JITTER, COLOR_JITTER) for value in NEW_RGB)
        objects[number] = replace(objects[number], color=NEW_COLOR, rgb=(red, green, blue))
    return replace(scene, objects=tuple(objects))


def new_example(rng: random.Random, task: str) -> Example:
    """A question whose answer is about an object of the new colour."""
    while True:
        example = NEW_TASKS[task](rng, new_scene(rng))
        if example is not None and example.targets[0].color == NEW_COLOR:
            return example


def training_examples(num_new: int, num_old: int) -> list[Example]:
    """Questions to learn, new and old."""
    tasks = list(NEW_TASKS)
    new = [
        new_example(split_rng(f"{TRAIN_SPLIT}-{NEW_COLOR}", number), tasks[number % len(tasks)])
        for number in range(num_new)
    ]
    return new + [example_at(f"{TRAIN_SPLIT}-{NEW_COLOR}-old", number) for number in range(num_old)]


def write_examples(examples: Sequence[Example], folder: Path) -> Path:
    """Draws pictures and writes the JSON lines that `deepseek_vl2.train` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, example in enumerate(tqdm(examples, desc="Draw", unit="picture")):
            name = f"{number}.png"
            example.scene.draw().save(folder / name)
            question = {"role": USER, "content": f"{IMAGE}\n{example.question}", "images": [name]}
            conversation = [question, {"role": ASSISTANT, "content": example.answer}]
            file.write(json.dumps({"conversations": conversation}, ensure_ascii=False) + "\n")
    return path


def measure(model_path: str, adapter: str | None, num_scenes: int) -> dict[str, float]:
    """Accuracy of each task on scenes that no training has seen."""
    _, processor, model = load_pretrained_model(model_path, adapter=adapter)
    makers: dict[str, Callable[[int], Example]] = {
        task: lambda number, task=task: new_example(split_rng(f"{EVAL_SPLIT}-{NEW_COLOR}", number), task)
        for task in NEW_TASKS
    }
    makers |= {task: lambda number, task=task: example_at(EVAL_SPLIT, number, {task: 1.0}) for task in OLD_TASKS}
    accuracies = {}
    for task, make in tqdm(makers.items(), desc="Measure", unit="task"):
        examples = [make(number) for number in range(num_scenes)]
        right = 0.0
        for start in range(0, num_scenes, BATCH_SIZE):
            chunk = examples[start : start + BATCH_SIZE]
            answers = answer_examples(model, processor, chunk)
            right += sum(judge(*pair)["accuracy"] for pair in zip(chunk, answers, strict=True))
        accuracies[task] = right / num_scenes
    return accuracies


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; prints a table, then one line of JSON."""
    parser = argparse.ArgumentParser(prog="new_color.py", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/brown"), help="default: runs/brown")
    parser.add_argument("--num_new", type=int, default=3000, help="questions on the new colour; default: 3000")
    parser.add_argument("--num_old", type=int, default=3000, help="old questions mixed in; default: 3000")
    parser.add_argument("--num_scenes", type=int, default=200, help="measured scenes a task; default: 200")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as in training")
    options = parser.parse_args(arguments)
    if min(options.num_new, options.num_scenes) < 1 or options.num_old < 0:
        parser.error("--num_new and --num_scenes must be at least 1, --num_old at least 0")
    try:
        train_file = write_examples(training_examples(options.num_new, options.num_old), options.folder)
        paths = [
            f"train_file={json.dumps(str(train_file))}",
            f"output_dir={json.dumps(str(options.folder / 'adapter'))}",
        ]
        config = read_config(CONFIG, [*paths, *options.set])
        before = measure(config.model_path, None, options.num_scenes)
        result = train(config)
        after = measure(config.model_path, config.output_dir, options.num_scenes)
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"{'task':<12} {'before':>7} {'after':>7}")
    for task, accuracy in before.items():
        print(f"{task:<12} {accuracy:7.3f} {after[task]:7.3f}")
    print(json.dumps({"steps": result.num_steps, "before": before, "after": after}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
