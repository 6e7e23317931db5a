"""Questions about scenes and their answers, in the words and marks of DeepSeek-VL2; dense targets for an extra loss.

Every `make_*` function takes a `random.Random` and a `Scene` and returns an `Example`, or None where the scene
has no fit question. A question never leaves open which object it means.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepseek_vl2.models.special_tokens import DET_END, DET_START, GROUNDING, REF_END, REF_START
from deepseek_vl2.models.tiling import TileGrid, letterbox, tile_boxes
from deepseek_vl2.nano.scenes import (
    COLOR_NAMES,
    SHAPE_NAMES,
    Box,
    ObjectPlan,
    Scene,
    SceneObject,
    Size,
    place_objects,
    random_background,
    random_scene,
    random_size,
)
from deepseek_vl2.serve.grounding import COORDINATE_MAX

TRAIN_SPLIT = "train"
EVAL_SPLIT = "eval"
MAX_COUNT = 6

# A label inside ref marks, as the reference's README asks for an object, and plain forms.
MARKED_LOCATE = ("{}.", "{}", "Locate {}.", "Find {}.", "Where is {}?", "Point to {}.")
PLAIN_LOCATE = ("Locate {}.", "Find {}.", "Where is {}?", "Show me {}.", "Point to {}.", "Draw a box around {}.")
LOCATE_ALL = ("Locate all {}.", "Find all {}.", "Where are the {}?", "Find every {one}.", "Locate every {one}.")
COUNT = (
    "How many {} are there?",
    "How many {} are in the picture?",
    "How many {} can you see?",
    "How many {} do you see?",
    "How many {} are there in the image?",
    "Count the {}.",
    "Count the {} in the picture.",
)
COLOR = (
    "What color is the {}?",
    "What colour is the {}?",
    "Which color is the {}?",
    "Which colour has the {}?",
    "What color does the {} have?",
    "What is the color of the {}?",
    "What is the colour of the {}?",
    "Name the color of the {}.",
)
SHAPE = (
    "What shape is the {}?",
    "Which shape is the {}?",
    "What is the shape of the {}?",
    "Which shape has the {}?",
    "Name the shape of the {}.",
)
DESCRIBE = (
    f"{GROUNDING}Describe the picture.",
    f"{GROUNDING}Describe the image.",
    f"{GROUNDING}Describe this image.",
    f"{GROUNDING}What is in the picture?",
    f"{GROUNDING}What do you see?",
    "Name every object with its box.",
    "List all objects with their boxes.",
    "Detect all objects.",
)
READ_WORD = (
    "What word is printed?",
    "Which word is printed in the picture?",
    "Read the word.",
    "What does the word say?",
    "What word is it?",
)
READ_NUMBER = (
    "What number is printed?",
    "Which number is printed in the picture?",
    "Read the number.",
    "What number do you see?",
    "What number is it?",
)
READ_TEXT = ("Read the text.", "What is written in the picture?", "What does the text say?", "What is printed?")

# Names of any shape of a colour.
ANY_SHAPE = ("object", "one", "shape")


@dataclass(frozen=True)
class Example:
    """A question about a scene.

    Attributes:
        task: A key of `TASKS`.
        question: Text of the user, without an image mark.
        answer: Text of the assistant.
        boxes: The boxes of the answer in pixels, x1, y1, x2, y2; empty where the answer holds none.
        targets: The objects that the answer is about.
        scene: The scene.
    """

    task: str
    question: str
    answer: str
    boxes: list[Box]
    targets: tuple[SceneObject, ...]
    scene: Scene


def quantize_box(box: Box, size: Size) -> tuple[int, int, int, int]:
    """Pixels of a picture of `size` (width, height) as the integers 0 to 999 of an answer."""
    x1, y1, x2, y2 = (
        min(COORDINATE_MAX, max(0, round(value / extent * COORDINATE_MAX)))
        for value, extent in zip(box, (*size, *size), strict=True)
    )
    return x1, y1, x2, y2


def format_grounding(label: str, boxes: Sequence[Box], size: Size) -> str:
    """A label and its boxes (pixels) with the marks of DeepSeek-VL2."""
    inner = ", ".join("[{}, {}, {}, {}]".format(*quantize_box(box, size)) for box in boxes)
    return f"{REF_START}{label}{REF_END}{DET_START}[{inner}]{DET_END}"


def plural(noun: str) -> str:
    """The plural of a shape's name or of "object"."""
    return noun + ("es" if noun.endswith("s") else "s")


def reading_order(scene: Scene) -> list[SceneObject]:
    """The objects from top to bottom by the middle of their boxes; from left to right where two are level."""
    return sorted(scene.objects, key=lambda item: (item.center[1], item.center[0]))


def _named(scene: Scene, *, name: str | None = None, color: str | None = None) -> list[SceneObject]:
    return [
        item for item in scene.shapes if (name is None or item.name == name) and (color is None or item.color == color)
    ]


def _is_only_of_color(scene: Scene, item: SceneObject) -> bool:
    """Whether "the red object" means `item`; dark text could pass for black."""
    return len(_named(scene, color=item.color)) == 1 and not (item.color == "black" and scene.texts)


def _labels(rng: random.Random, scene: Scene, item: SceneObject) -> tuple[str | None, list[str]]:
    """The full name of an object, if no other has it, and the shorter names that mean it alone."""
    if item.kind != "shape":
        same_kind = [other for other in scene.texts if other.kind == item.kind]
        is_unique = sum(other.name == item.name for other in same_kind) == 1
        return (item.description if is_unique else None), ([item.kind] if len(same_kind) == 1 else [])
    short = [item.name] if len(_named(scene, name=item.name)) == 1 else []
    if _is_only_of_color(scene, item):
        short.append(f"{item.color} {rng.choice(ANY_SHAPE)}")
    return (item.description if len(_named(scene, name=item.name, color=item.color)) == 1 else None), short


def make_locate(rng: random.Random, scene: Scene) -> Example | None:
    """Where is one object? Mostly by its full name, sometimes by a shorter one that still means it alone."""
    choices = [(item, *_labels(rng, scene, item)) for item in scene.objects]
    choices = [choice for choice in choices if choice[1] or choice[2]]
    if not choices:
        return None
    item, full, short = rng.choice(choices)
    label = rng.choice(short) if full is None or (short and rng.random() < 0.25) else full
    asked = f"the {label}" if rng.random() < 0.7 else label
    if rng.random() < 0.6:
        form = rng.choices(MARKED_LOCATE, (4, 2, 1, 1, 1, 1))[0]
        if rng.random() < 0.4:
            asked = asked[0].upper() + asked[1:]
        if rng.random() < 0.3:
            asked += "."
        question = form.format(f"{REF_START}{asked}{REF_END}")
    else:
        question = rng.choice(PLAIN_LOCATE).format(f"the {label}")
    return Example("locate", question, format_grounding(label, [item.box], scene.size), [item.box], (item,), scene)


def make_locate_all(rng: random.Random, scene: Scene) -> Example | None:
    """Where are all objects of a shape, a colour, or both? The boxes come in reading order."""
    classes = _counting_classes(scene)
    present = [(noun, items) for noun, items in classes if items]
    if not present:
        return None
    several = [choice for choice in present if len(choice[1]) > 1]
    noun, items = rng.choice(several if several and rng.random() < 0.8 else present)
    form = rng.choice(LOCATE_ALL)
    question = form.format(plural(noun), one=noun)
    ordered = [item for item in reading_order(scene) if item in items]
    boxes = [item.box for item in ordered]
    return Example("locate_all", question, format_grounding(noun, boxes, scene.size), boxes, tuple(ordered), scene)


def _counting_classes(scene: Scene) -> list[tuple[str, list[SceneObject]]]:
    """Every class that can be counted in the scene without doubt, as (noun, its objects), empty classes too."""
    classes = [(name, _named(scene, name=name)) for name in SHAPE_NAMES]
    for color in COLOR_NAMES:
        if not (color == "black" and scene.texts):
            classes.append((f"{color} object", _named(scene, color=color)))
        classes += [(f"{color} {name}", _named(scene, name=name, color=color)) for name in SHAPE_NAMES]
    classes.append(("shape", list(scene.shapes)))
    if not scene.texts:
        classes.append(("object", list(scene.shapes)))
    return classes


def make_count(rng: random.Random, scene: Scene, count: int | None = None) -> Example | None:
    """How many objects of a class are there?

    Args:
        rng: Source of chance.
        scene: What to ask about.
        count: The answer wanted; with no class of that count the question is None. By default zero once in ten, else
            any count that occurs.
    """
    classes = _counting_classes(scene)
    if count is None:
        found = sorted({len(items) for _, items in classes})
        positive = [number for number in found if number > 0]
        count = rng.choice(positive) if positive and rng.random() >= 0.1 else 0
    fit = [(noun, items) for noun, items in classes if len(items) == count]
    if not fit:
        return None
    # One kind of class after the other, or the many pairs of colour and shape would drown the rest.
    kinds = sorted({_class_kind(noun) for noun, _ in fit})
    kind = rng.choice(kinds)
    noun, items = rng.choice([choice for choice in fit if _class_kind(choice[0]) == kind])
    question = rng.choice(COUNT).format(plural(noun))
    return Example("count", question, str(len(items)), [], tuple(items), scene)


def _class_kind(noun: str) -> int:
    first, _, second = noun.partition(" ")
    if not second:
        return 0 if first in SHAPE_NAMES else 1
    return 2 if second == "object" else 3


def counting_scene(
    rng: random.Random,
    count: int | None = None,
    *,
    size: Size | None = None,
    max_objects: int = MAX_COUNT + 3,
    min_side_fraction: float = 0.14,
    max_side_fraction: float = 0.4,
) -> Scene:
    """Draws a scene in which some class has `count` members, beside up to three other objects.

    Args:
        rng: Source of chance.
        count: Members of the class; drawn from 1 to `MAX_COUNT` if not given.
        size: Width and height in pixels; drawn if not given.
        max_objects: Most objects in all; the class keeps its `count` members even if there are more.
        min_side_fraction: Smallest object side, as a part of the picture's shorter side.
        max_side_fraction: Largest one.
    """
    count = rng.randint(1, MAX_COUNT) if count is None else count
    size = size if size is not None else random_size(rng)
    background = random_background(rng)
    shape, color = rng.choice(SHAPE_NAMES), rng.choice(COLOR_NAMES)
    other_shapes = [name for name in SHAPE_NAMES if name != shape]
    other_colors = [name for name in COLOR_NAMES if name != color]
    kind = rng.choice(("shape", "color", "both", "any"))
    plans = []
    for _ in range(count):
        is_shape_open, is_color_open = kind in ("color", "any"), kind in ("shape", "any")
        plans.append(
            ObjectPlan(
                "shape",
                rng.choice(SHAPE_NAMES) if is_shape_open else shape,
                rng.choice(COLOR_NAMES) if is_color_open else color,
            )
        )
    # Others share the colour or the shape of the class, but not what defines it.
    num_others = 0 if kind == "any" else min(rng.randint(0, 3), max_objects - count)
    for _ in range(num_others if count else max(1, num_others)):
        if kind == "shape":
            plans.append(ObjectPlan("shape", rng.choice(other_shapes), rng.choice(COLOR_NAMES)))
        elif kind == "color" or rng.random() < 0.5:
            plans.append(ObjectPlan("shape", rng.choice(SHAPE_NAMES), rng.choice(other_colors)))
        else:
            plans.append(ObjectPlan("shape", rng.choice(other_shapes), color))
    rng.shuffle(plans)
    objects = place_objects(rng, plans, size, min_side_fraction=min_side_fraction, max_side_fraction=max_side_fraction)
    return Scene(*size, background, objects)


def make_color(rng: random.Random, scene: Scene) -> Example | None:
    """What colour is the only object of a shape?"""
    fit = [item for item in scene.shapes if len(_named(scene, name=item.name)) == 1]
    if not fit:
        return None
    item = rng.choice(fit)
    return Example("color", rng.choice(COLOR).format(item.name), item.color, [], (item,), scene)


def make_shape(rng: random.Random, scene: Scene) -> Example | None:
    """What shape is the only object of a colour?"""
    fit = [item for item in scene.shapes if _is_only_of_color(scene, item)]
    if not fit:
        return None
    item = rng.choice(fit)
    asked = f"{item.color} {rng.choice(ANY_SHAPE[:2])}"
    return Example("shape", rng.choice(SHAPE).format(asked), item.name, [], (item,), scene)


def make_describe(rng: random.Random, scene: Scene) -> Example | None:
    """Every object with its box, in reading order."""
    items = reading_order(scene)
    if not items:
        return None
    answer = ", ".join(format_grounding(item.description, [item.box], scene.size) for item in items)
    return Example("describe", rng.choice(DESCRIBE), answer, [item.box for item in items], tuple(items), scene)


def make_read(rng: random.Random, scene: Scene) -> Example | None:
    """What is the only printed word, or number?"""
    fit = [item for item in scene.texts if sum(other.kind == item.kind for other in scene.texts) == 1]
    if not fit:
        return None
    item = rng.choice(fit)
    forms: tuple[str, ...] = READ_WORD if item.kind == "word" else READ_NUMBER
    if len(scene.texts) == 1 and rng.random() < 0.25:
        forms = READ_TEXT
    return Example("read", rng.choice(forms), item.name, [], (item,), scene)


TASKS: Mapping[str, Callable[[random.Random, Scene], Example | None]] = MappingProxyType(
    {
        "locate": make_locate,
        "locate_all": make_locate_all,
        "count": make_count,
        "color": make_color,
        "shape": make_shape,
        "describe": make_describe,
        "read": make_read,
    }
)

DEFAULT_WEIGHTS = MappingProxyType(
    {"locate": 30.0, "locate_all": 5.0, "count": 20.0, "color": 12.0, "shape": 8.0, "describe": 20.0, "read": 5.0}
)


def _scene_for(rng: random.Random, task: str, scene_kwargs: Mapping[str, Any]) -> Scene:
    if task == "read":
        return random_scene(rng, **{**scene_kwargs, "text_probability": 1.0})
    return random_scene(rng, **scene_kwargs)


def _sample_count(rng: random.Random, scene_kwargs: Mapping[str, Any]) -> Example | None:
    """A counting question with an answer drawn evenly from 1 up, and zero once in ten."""
    most = min(MAX_COUNT, scene_kwargs.get("num_objects", (1, MAX_COUNT))[1])
    wanted = rng.randint(1, most) if most and rng.random() >= 0.1 else 0
    if rng.random() < 0.25:
        return make_count(rng, random_scene(rng, **scene_kwargs), wanted)
    others = scene_kwargs.get("num_objects", (1, MAX_COUNT + 3))[1]
    passed = {
        key: scene_kwargs[key] for key in ("size", "min_side_fraction", "max_side_fraction") if key in scene_kwargs
    }
    return make_count(rng, counting_scene(rng, wanted or rng.randint(0, 3), max_objects=others, **passed), wanted)


def sample_example(
    rng: random.Random,
    task_weights: Mapping[str, float] | None = None,
    scene_kwargs: Mapping[str, Any] | None = None,
) -> Example:
    """Draws a task, a scene that suits it, and a question.

    Args:
        rng: Source of chance.
        task_weights: How often each task of `TASKS` comes, in any unit; `DEFAULT_WEIGHTS` if not given.
        scene_kwargs: Passed on to `random_scene`.

    Raises:
        ValueError: If a task is unknown, or the scenes asked for never hold a fit question.
    """
    weights = dict(DEFAULT_WEIGHTS if task_weights is None else task_weights)
    unknown = sorted(set(weights) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown tasks {unknown}; known are {', '.join(TASKS)}")
    kwargs = dict(scene_kwargs or {})
    task = rng.choices(list(weights), list(weights.values()))[0]
    for _ in range(200):
        example = _sample_count(rng, kwargs) if task == "count" else TASKS[task](rng, _scene_for(rng, task, kwargs))
        if example is not None:
            return example
    raise ValueError(f"no {task!r} question fits 200 scenes drawn with {kwargs}; allow more or other objects")


def split_rng(split: str, index: int) -> random.Random:
    """The chance of example `index` of a split: no two splits share a stream, and it is the same on every machine."""
    return random.Random(f"{split}:{index}")


def example_at(
    split: str,
    index: int,
    task_weights: Mapping[str, float] | None = None,
    scene_kwargs: Mapping[str, Any] | None = None,
) -> Example:
    """Example `index` of a split (`TRAIN_SPLIT`, `EVAL_SPLIT`); see `sample_example`."""
    return sample_example(split_rng(split, index), task_weights, scene_kwargs)


# Classes of the dense targets: the shapes, then the two kinds of text.
CELL_CLASSES = (*SHAPE_NAMES, "word", "number")


class DenseTargets(NamedTuple):
    """What each cell of each view shows; -1 where nothing does.

    Attributes:
        presence: Index into `scene.objects`, [V, G, G].
        shape_ids: Index into `CELL_CLASSES`, [V, G, G].
        color_ids: Index into `COLOR_NAMES`, [V, G, G]; -1 for texts too.
        boxes: x1, y1, x2, y2 as parts of the whole picture, 0 to 1, [V, G, G, 4]; zeros where nothing is.
    """

    presence: NDArray[np.int64]
    shape_ids: NDArray[np.int64]
    color_ids: NDArray[np.int64]
    boxes: NDArray[np.float32]


def view_rectangles(width: int, height: int, columns: int, rows: int, side: int = 112) -> NDArray[np.float64]:
    """The part of a picture that each view shows, in pixels of the picture: the global view, then the tiles row by row.

    Rectangles reach beyond the picture where the view shows letterbox.

    Args:
        width: Of the picture.
        height: Of the picture.
        columns: Tiles across.
        rows: Tiles down.
        side: Of a view, in pixels.

    Returns:
        x1, y1, x2, y2 of every view, [V, 4] with V = 1 + columns * rows.
    """
    grid = TileGrid(columns, rows)
    cuts = [((side, side), (0, 0, side, side))]
    cuts += [((columns * side, rows * side), box) for box in tile_boxes(grid, side)]
    rectangles = []
    for canvas, (x1, y1, x2, y2) in cuts:
        fitted = letterbox((width, height), canvas)
        scale_x, scale_y = fitted.width / width, fitted.height / height
        rectangles.append(
            (
                (x1 - fitted.left) / scale_x,
                (y1 - fitted.top) / scale_y,
                (x2 - fitted.left) / scale_x,
                (y2 - fitted.top) / scale_y,
            )
        )
    return np.array(rectangles)


def dense_targets(
    scene: Scene, rectangles: NDArray[np.float64], tokens_per_side: int = 4, min_cover: float = 0.15
) -> DenseTargets:
    """Says for every image token of every view which object it should see.

    A cell belongs to the object whose box covers the largest part of it, if that is more than `min_cover` of its area.

    Args:
        scene: The scene.
        rectangles: The views in pixels of the picture, [V, 4], see `view_rectangles`.
        tokens_per_side: G.
        min_cover: Part of a cell, 0 to 1.
    """
    num_views, side = len(rectangles), tokens_per_side
    if not scene.objects:
        nothing = np.full((num_views, side, side), -1, np.int64)
        return DenseTargets(nothing, nothing.copy(), nothing.copy(), np.zeros((num_views, side, side, 4), np.float32))
    boxes = np.array([item.box for item in scene.objects])  # [N, 4]
    steps = np.arange(side + 1) / side
    x_edges = rectangles[:, 0, None] + steps * (rectangles[:, 2] - rectangles[:, 0])[:, None]  # [V, G + 1]
    y_edges = rectangles[:, 1, None] + steps * (rectangles[:, 3] - rectangles[:, 1])[:, None]
    overlap_x = _overlap(x_edges, boxes[:, 0], boxes[:, 2])  # [V, G, N]
    overlap_y = _overlap(y_edges, boxes[:, 1], boxes[:, 3])
    cover = overlap_y[:, :, None] * overlap_x[:, None]  # [V, G, G, N]
    presence = np.where(cover.max(-1) > min_cover, cover.argmax(-1), -1)
    # A last row of -1 is what index -1 picks.
    shapes = [CELL_CLASSES.index(item.name if item.kind == "shape" else item.kind) for item in scene.objects]
    colors = [COLOR_NAMES.index(item.color) if item.kind == "shape" else -1 for item in scene.objects]
    parts = np.concatenate([boxes / (scene.size * 2), np.zeros((1, 4))]).astype(np.float32)
    return DenseTargets(presence, np.array([*shapes, -1])[presence], np.array([*colors, -1])[presence], parts[presence])


def _overlap(edges: NDArray[np.float64], starts: NDArray[np.float64], ends: NDArray[np.float64]) -> NDArray[np.float64]:
    """Part of every cell between two edges [V, G + 1] that every interval [N] covers, [V, G, N]."""
    low, high = edges[:, :-1, None], edges[:, 1:, None]
    return np.clip(np.minimum(high, ends) - np.maximum(low, starts), 0, None) / (high - low)
