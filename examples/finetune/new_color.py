"""Trains the bundled model on a colour that it does not know, brown, and measures it before and after.

    python examples/finetune/new_color.py --folder runs/brown

draws the data, fine-tunes an adapter as `config.yaml` says, merges it, and prints the scores of questions on brown
objects and of the tasks that nano knew before. It is taught to name the colour, and the shape of brown objects; where
one is, nano finds out from the other objects at times, before and after. Old questions are mixed in, so that less of
those is forgotten, and questions for other colours beside brown: without them nano calls black objects brown. Ask it:

    python inference.py --adapter runs/brown/adapter --image runs/brown/data/pictures/000000_1.png \\
        --prompt "What shape is the brown object?"
"""

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.nano.architecture import nano_processor
from deepseek_vl2.nano.batches import Make, ask
from deepseek_vl2.nano.drawing import LARGER_GRIDS, ONE_TILE, draw_scene
from deepseek_vl2.nano.evaluate import evaluate_file, write_examples
from deepseek_vl2.nano.questions import Example, make_color, make_locate, make_shape, split_rng
from deepseek_vl2.nano.scenes import COLOR_JITTER, Scene, random_scene
from deepseek_vl2.nano.tasks import EVAL_SPLIT, TASKS, TRAIN_SPLIT, example_at
from deepseek_vl2.train import read_config, train
from deepseek_vl2.train.merge import merge
from deepseek_vl2.utils.command_line import OneLineParser

CONFIG = Path(__file__).parent / "config.yaml"
NEW_COLOR = "brown"
NEW_RGB = (120, 72, 30)
# How questions are drawn, and the task of `deepseek_vl2.evaluate` that judges answers.
NEW_TASKS = {
    "new_locate": (make_locate, "refcoco"),
    "new_color": (make_color, "exact_match"),
    "new_shape": (make_shape, "exact_match"),
}
# Boxes are not taught: they would be most of what the loss is about, and colours are.
TAUGHT_TASKS = ("new_color", "new_shape")
# No answer without the new word is right, so nothing but the new ability scores here.
NEW_ABILITY = "new_color"
OLD_TASKS = ("locate", "locate_all", "count", "color", "shape", "word", "table")
# How often an old question is for the colour of an object beside one of the new colour, of a kind that is forgotten
# first (both are about where to stop; they are drawn as they are measured, as other numbers of objects would teach to
# stop elsewhere), or any.
OLD_SHARES = {"other_color": 0.2, "locate_all": 0.15, "count": 0.2, "any": 0.45}
# The old colour that looks most like the new one, and how often that object has it.
SIMILAR_COLOR = "black"
SIMILAR_SHARE = 0.5
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
    make, _ = NEW_TASKS[task]
    return _first_question(rng, make, lambda color: color == NEW_COLOR)


def other_color_example(rng: random.Random) -> Example:
    """A question for the colour of an object beside one of the new colour: else every colour would soon be new."""
    is_similar = rng.random() < SIMILAR_SHARE
    return _first_question(rng, make_color, lambda color: color == SIMILAR_COLOR if is_similar else color != NEW_COLOR)


def _first_question(rng: random.Random, make: Make, is_wanted: Callable[[str], bool]) -> Example:
    """The first question on scenes with the new colour whose answer is about objects of wanted colours alone."""
    while True:
        example = make(rng, new_scene(rng))
        if example is None:
            continue
        (scene,) = example.scenes
        if all(is_wanted(scene.objects[target.number].color) for piece in example.pieces for target in piece.targets):
            return example


def old_example(rng: random.Random, processor: DeepseekVLV2Processor) -> Example:
    """A question of the mixture that `OLD_SHARES` tells."""
    (kind,) = rng.choices(list(OLD_SHARES), list(OLD_SHARES.values()))
    if kind == "other_color":
        return other_color_example(rng)
    example = None
    while example is None:
        example = any_old_example(rng, processor) if kind == "any" else TASKS[kind].draw(rng)
    return example


def any_old_example(rng: random.Random, processor: DeepseekVLV2Processor) -> Example | None:
    """A question as in nano's own training; None if the scene has no fit one."""
    scene = draw_scene(rng, processor, rng.choice((ONE_TILE, *LARGER_GRIDS)), (1, 6))
    *_, last = None, *ask(rng, scene, 1)
    return last


def training_examples(num_new: int, num_old: int) -> Iterator[Example]:
    """Questions to learn, new and old."""
    for number in range(num_new):
        yield new_example(split_rng(f"{TRAIN_SPLIT}-{NEW_COLOR}", number), TAUGHT_TASKS[number % len(TAUGHT_TASKS)])
    processor = nano_processor()
    for number in range(num_old):
        yield old_example(split_rng(f"{TRAIN_SPLIT}-{NEW_COLOR}-old", number), processor)


def measure(model_path: str, folder: Path, num_scenes: int, run: str) -> dict[str, float]:
    """Score of each task, 0 to 1, on scenes that no training has seen."""
    scores = {}
    for task in (*NEW_TASKS, *OLD_TASKS):
        if task in NEW_TASKS:
            judge = NEW_TASKS[task][1]
            examples = [new_example(split_rng(f"{EVAL_SPLIT}-{NEW_COLOR}", index), task) for index in range(num_scenes)]
        else:
            judge = TASKS[task].judge
            examples = [example_at(EVAL_SPLIT, index, task) for index in range(num_scenes)]
        path = write_examples(examples, folder / task)
        arguments = ["--model_path", model_path, "--batch_size", str(BATCH_SIZE)]
        scores[task] = evaluate_file(path, judge, folder / task / run, arguments)["overall"]["score"] / 100
    return scores


def merge_anew(model_path: str, adapter: str, folder: Path) -> None:
    """Merges an adapter into a folder that an earlier run of the same command may have filled, or half filled."""
    draft = folder.with_name(f"{folder.name}.tmp")
    for old in (draft, folder):
        if old.exists():
            shutil.rmtree(old)
    merge(model_path, adapter, draft)
    draft.rename(folder)


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; prints a table, then one line of JSON."""
    parser = OneLineParser(prog="new_color.py", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/brown"), help="default: runs/brown")
    parser.add_argument("--num_new", type=int, default=1500, help="questions on the new colour; default: 1500")
    parser.add_argument("--num_old", type=int, default=6000, help="old questions mixed in; default: 6000")
    parser.add_argument("--num_scenes", type=int, default=200, help="measured scenes a task; default: 200")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as in training")
    options = parser.parse_args(arguments)
    if min(options.num_new, options.num_scenes) < 1 or options.num_old < 0:
        parser.error("--num_new and --num_scenes must be at least 1, --num_old at least 0")
    try:
        num_examples = options.num_new + options.num_old
        drawn = tqdm(training_examples(options.num_new, options.num_old), "Draw", num_examples, unit="picture")
        train_file = write_examples(drawn, options.folder / "data")
        paths = [
            f"train_file={json.dumps(str(train_file))}",
            f"output_dir={json.dumps(str(options.folder / 'adapter'))}",
        ]
        config = read_config(CONFIG, [*paths, *options.set])
        measured = options.folder / "measured"
        before = measure(config.model_path, measured, options.num_scenes, "before")
        result = train(config)
        merged = options.folder / "merged"
        merge_anew(config.model_path, config.output_dir, merged)
        after = measure(str(merged), measured, options.num_scenes, "after")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"{'task':<12} {'before':>7} {'after':>7}")
    for task, accuracy in before.items():
        print(f"{task:<12} {accuracy:7.3f} {after[task]:7.3f}")
    losses = {task: before[task] - after[task] for task in OLD_TASKS}
    summary = {
        "steps": result.num_steps,
        "new_ability": {"task": NEW_ABILITY, "before": before[NEW_ABILITY], "after": after[NEW_ABILITY]},
        "largest_loss": max(losses.values()),
    }
    print(json.dumps({**summary, "before": before, "after": after}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
