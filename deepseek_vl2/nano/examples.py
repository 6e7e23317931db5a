"""The pictures in `images/`, which the README asks about: `python -m deepseek_vl2.nano.examples images`."""

import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from deepseek_vl2.nano.layouts import chart_scene, table_scene
from deepseek_vl2.nano.scenes import ObjectPlan, Scene, Size, place_objects, random_background
from deepseek_vl2.utils.command_line import OneLineParser

JPEG_QUALITY = 95


def _shape(color: str, name: str) -> ObjectPlan:
    return ObjectPlan("shape", name, color)


# File name: seed, size, what is in it, and which object a red rectangle marks.
EXAMPLES: Mapping[str, tuple[int, Size, tuple[ObjectPlan, ...], int | None]] = {
    "visual_grounding_1.jpeg": (
        4,
        (640, 480),
        (_shape("red", "star"), _shape("blue", "circle"), _shape("green", "square"), _shape("yellow", "triangle")),
        None,
    ),
    "visual_grounding_2.jpeg": (
        2,
        (480, 360),
        (_shape("purple", "diamond"), _shape("cyan", "circle"), _shape("black", "cross"), _shape("red", "square")),
        None,
    ),
    "visual_grounding_3.jpeg": (
        24,
        (448, 336),
        (_shape("green", "circle"), _shape("green", "circle"), _shape("orange", "star"), _shape("blue", "square")),
        None,
    ),
    "grounding_conversation_1.jpeg": (
        10,
        (448, 336),
        (_shape("orange", "circle"), _shape("blue", "square"), _shape("green", "triangle"), _shape("purple", "star")),
        None,
    ),
    "vqa_1.jpeg": (
        11,
        (480, 360),
        (_shape("green", "triangle"), _shape("red", "circle"), _shape("black", "star"), _shape("blue", "cross")),
        None,
    ),
    "multi_image_1.jpeg": (6, (320, 240), (_shape("red", "circle"), _shape("red", "circle")), None),
    "multi_image_2.jpeg": (14, (320, 240), (_shape("blue", "square"),), None),
    "multi_image_3.jpeg": (6, (320, 240), (_shape("yellow", "star"), _shape("purple", "triangle")), None),
    "incontext_visual_grounding_1.jpeg": (7, (448, 336), (_shape("blue", "star"), _shape("orange", "circle")), 0),
    "icl_vg_2.jpeg": (
        8,
        (448, 336),
        (_shape("green", "star"), _shape("red", "square"), _shape("black", "diamond")),
        None,
    ),
    "printed_word.jpeg": (9, (448, 336), (ObjectPlan("word", "SHIP", "dark"), _shape("cyan", "square")), None),
}
# The same for scenes with an order of their own: seed, size, and how they are drawn.
LAYOUTS: Mapping[str, tuple[int, Size, Callable[..., Scene]]] = {
    "table_1.jpeg": (12, (448, 336), table_scene),
    "chart_1.jpeg": (13, (448, 336), chart_scene),
}
NAMES = (*EXAMPLES, *LAYOUTS)


def example_scene(name: str) -> Scene:
    """The scene of an example picture.

    Raises:
        ValueError: If there is no such example.
    """
    if name in LAYOUTS:
        seed, size, draw = LAYOUTS[name]
        return draw(random.Random(seed), size=size)
    if name not in EXAMPLES:
        raise ValueError(f"There is no example {name!r}. Choose one of {', '.join(NAMES)}.")
    seed, size, plans, marked = EXAMPLES[name]
    rng = random.Random(seed)
    background = random_background(rng)
    objects = place_objects(rng, plans, size, min_side_fraction=0.22, max_side_fraction=0.4)
    return Scene(*size, background, objects, marked=marked)


def write_examples(folder: Path) -> None:
    """Writes all pictures, and what is in them to `scenes.json`: label and box x1, y1, x2, y2 in pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {}
    for name in NAMES:
        example_scene(name).draw().save(folder / name, quality=JPEG_QUALITY)
        content[name] = [{"label": item.description, "box": item.box} for item in example_scene(name).objects]
    (folder / "scenes.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    parser = OneLineParser(prog="python -m deepseek_vl2.nano.examples", description="Draw the examples.")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    write_examples(parser.parse_args(arguments).folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
