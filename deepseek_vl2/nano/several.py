"""Questions about two and three pictures."""

import random
from collections.abc import Sequence
from dataclasses import replace

from deepseek_vl2.models.special_tokens import IMAGE
from deepseek_vl2.nano import phrases
from deepseek_vl2.nano.phrases import plural
from deepseek_vl2.nano.questions import Example, Piece, find, grounding_pieces, named, reading_order
from deepseek_vl2.nano.scenes import (
    COLOR_NAMES,
    SHAPE_NAMES,
    ObjectPlan,
    Scene,
    SceneObject,
    Size,
    place_objects,
    random_background,
    random_scene,
    random_size,
)

NUM_COMPARED = 3
MAX_COMPARED_OBJECTS = 3


def beginning_of(num_pictures: int, is_numbered: bool = False) -> str:
    """The image marks in front of a question: one a line, or three as `This is image_1: ...`."""
    if is_numbered:
        return "\n".join(f"This is image_{number}: {IMAGE}" for number in range(1, num_pictures + 1))
    return "\n".join([IMAGE] * num_pictures)


def in_context_scenes(
    rng: random.Random, *, sizes: Sequence[Size] | None = None, num_objects: tuple[int, int] = (2, 4)
) -> tuple[Scene, Scene]:
    """Draws a scene with a marked shape and a second one that holds one object of that shape, of any colour.

    Args:
        rng: Source of chance.
        sizes: Of the two pictures; drawn if not given.
        num_objects: Fewest and most objects in each.
    """
    sizes = sizes if sizes is not None else (random_size(rng), random_size(rng))
    shape = rng.choice(SHAPE_NAMES)
    others = [name for name in SHAPE_NAMES if name != shape]
    scenes: list[Scene] = []
    for size in sizes:
        plans = [ObjectPlan("shape", shape, rng.choice(COLOR_NAMES))]
        # The first scene may hold more of the kind, the mark tells which is meant.
        plans += [
            ObjectPlan("shape", rng.choice(others if scenes else SHAPE_NAMES), rng.choice(COLOR_NAMES))
            for _ in range(rng.randint(*num_objects) - 1)
        ]
        background = random_background(rng)
        objects = place_objects(rng, plans, size, min_side_fraction=0.16, max_side_fraction=0.4)
        scenes.append(Scene(*size, background, objects))
    return replace(scenes[0], marked=0), scenes[1]


def make_in_context(rng: random.Random, scenes: Sequence[Scene]) -> Example | None:
    """Where in the second picture is the kind of thing that is marked in the first?"""
    first, second = scenes
    if first.marked is None:
        return None
    marked = first.objects[first.marked]
    items = named(second, name=marked.name)
    if len(items) != 1:
        return None
    label_targets = (find(first, marked, 0),)
    pieces = tuple(grounding_pieces(marked.name, items, second, picture=1, label_targets=label_targets))
    form = rng.choices(phrases.IN_CONTEXT, (2, 1, 1))[0]
    return Example("in_context", form, pieces, (items[0].box,), (first, second))


def compared_scenes(rng: random.Random, *, sizes: Sequence[Size] | None = None) -> tuple[Scene, ...]:
    """Draws three scenes of one to three shapes, often of the same colours and shapes."""
    sizes = sizes if sizes is not None else [random_size(rng) for _ in range(NUM_COMPARED)]
    colors, shapes = rng.sample(COLOR_NAMES, 4), rng.sample(SHAPE_NAMES, 4)
    return tuple(
        random_scene(
            rng,
            size=size,
            num_objects=(1, MAX_COMPARED_OBJECTS),
            text_probability=0.0,
            min_side_fraction=0.18,
            colors=colors,
            shapes=shapes,
        )
        for size in sizes
    )


def make_compare(rng: random.Random, scenes: Sequence[Scene]) -> Example | None:
    """Which picture shows something, what one of them shows, or what all of them show."""
    kinds = (_which, _how_many, _which_shape, _which_color, _everything)
    return rng.choices(kinds, (5, 3, 1, 1, 2))[0](rng, scenes)


def _names(item: SceneObject) -> tuple[str, str, str]:
    """What a shape can be called."""
    return item.description, item.name, f"{item.color} object"


def _which(rng: random.Random, scenes: Sequence[Scene]) -> Example | None:
    places: dict[str, set[int]] = {}
    for number, scene in enumerate(scenes):
        for item in scene.shapes:
            for name in _names(item):
                places.setdefault(name, set()).add(number)
    names = [name for name, pictures in places.items() if len(pictures) == 1]
    if not names:
        return None
    name = rng.choice(names)
    number = min(places[name])
    fit = [item for item in scenes[number].shapes if name in _names(item)]
    targets = tuple(find(scenes[number], item, number) for item in fit)
    question = rng.choice(phrases.COMPARE_WHICH).format(name)
    return Example("compare", question, (Piece(f"image_{number + 1}", targets),), (), tuple(scenes))


def _how_many(rng: random.Random, scenes: Sequence[Scene]) -> Example | None:
    number = rng.randrange(len(scenes))
    shown = [item.name for scene in scenes for item in scene.shapes]
    name = rng.choice(shown or SHAPE_NAMES) if rng.random() < 0.6 else "object"
    items = list(scenes[number].shapes) if name == "object" else named(scenes[number], name=name)
    targets = tuple(find(scenes[number], item, number) for item in items)
    question = rng.choice(phrases.COMPARE_COUNT).format(plural(name), number=number + 1)
    return Example("compare", question, (Piece(str(len(items)), targets, "count"),), (), tuple(scenes))


def _which_shape(rng: random.Random, scenes: Sequence[Scene]) -> Example | None:
    return _attribute(rng, scenes, "color", "name", phrases.COMPARE_SHAPE)


def _which_color(rng: random.Random, scenes: Sequence[Scene]) -> Example | None:
    return _attribute(rng, scenes, "name", "color", phrases.COMPARE_COLOR)


def _attribute(
    rng: random.Random, scenes: Sequence[Scene], asked: str, answered: str, forms: Sequence[str]
) -> Example | None:
    """Asks for one attribute ("name", "color") of a shape that the other means alone in its picture."""
    number = rng.randrange(len(scenes))
    scene = scenes[number]
    items = [item for item in scene.shapes if len(named(scene, **{asked: getattr(item, asked)})) == 1]
    if not items:
        return None
    item = rng.choice(items)
    question = rng.choice(forms).format(getattr(item, asked), number=number + 1)
    piece = Piece(getattr(item, answered), (find(scene, item, number),))
    return Example("compare", question, (piece,), (), tuple(scenes))


def _everything(rng: random.Random, scenes: Sequence[Scene]) -> Example | None:
    pieces: list[Piece] = []
    for number, scene in enumerate(scenes):
        items = [item for item in reading_order(scene) if item.kind == "shape"]
        pieces.append(Piece(("\n" if number else "") + f"image_{number + 1}:"))
        for place, item in enumerate(items):
            pieces.append(Piece(", a" if place else " a"))
            pieces.append(Piece(f" {item.description}", (find(scene, item, number),)))
        pieces.append(Piece("."))
    return Example("compare", rng.choice(phrases.COMPARE_LIST), tuple(pieces), (), tuple(scenes))
