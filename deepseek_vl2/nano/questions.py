"""Questions about one scene and their answers, in the words and marks of DeepSeek-VL2.

Every `make_*` function takes a `random.Random` and a `Scene` and returns an `Example`, or None where the scene
has no fit question. A question never leaves open which object it means.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Literal, NamedTuple

from deepseek_vl2.models.special_tokens import DET_END, DET_START, REF_END, REF_START
from deepseek_vl2.nano import phrases
from deepseek_vl2.nano.layouts import table_cells
from deepseek_vl2.nano.phrases import described_zh, plural
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
    random_size,
)
from deepseek_vl2.serve.grounding import COORDINATE_MAX

MAX_COUNT = 6


class Target(NamedTuple):
    """An object by the number of its picture and its own number in that scene."""

    picture: int
    number: int


class Piece(NamedTuple):
    """A part of an answer.

    Attributes:
        text: What is written.
        targets: The objects that it is about.
        how: What is told about them: something of each, how many there are, or their letters one after the other.
    """

    text: str
    targets: tuple[Target, ...] = ()
    how: Literal["objects", "count", "letters"] = "objects"


@dataclass(frozen=True)
class Example:
    """A question about one or several pictures.

    Attributes:
        task: Name of the ability that it asks for.
        question: Text of the user, without image marks.
        pieces: The answer in parts.
        boxes: The boxes of the answer in pixels of the last picture, x1, y1, x2, y2; empty where the answer holds none.
        scenes: The pictures, those of earlier questions first.
        history: Earlier questions of the same conversation.
    """

    task: str
    question: str
    pieces: tuple[Piece, ...]
    boxes: tuple[Box, ...]
    scenes: tuple[Scene, ...]
    history: tuple["Example", ...] = ()

    @property
    def answer(self) -> str:
        """Text of the assistant."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def turns(self) -> tuple["Example", ...]:
        """The conversation: the earlier questions, then this one."""
        return (*self.history, self)

    def after(self, *history: "Example") -> "Example":
        """The same question later in a conversation about the same pictures."""
        return replace(self, history=history)

    def about_a_further_picture(self, *history: "Example") -> "Example":
        """The same question in a conversation about other pictures, to which its own are added only now."""
        earlier = history[-1].scenes
        pieces = tuple(
            piece._replace(
                targets=tuple(target._replace(picture=target.picture + len(earlier)) for target in piece.targets)
            )
            for piece in self.pieces
        )
        return replace(self, pieces=pieces, scenes=(*earlier, *self.scenes), history=history)


def num_new_pictures(turns: Sequence[Example]) -> list[int]:
    """How many pictures come with each turn of a conversation."""
    shown = [0, *(len(turn.scenes) for turn in turns)]
    return [after - before for before, after in pairwise(shown)]


def split_rng(split: str, index: int) -> random.Random:
    """The chance of example `index` of a split: no two splits share a stream, and it is the same on every machine."""
    return random.Random(f"{split}:{index}")


def quantize_box(box: Box, size: Size) -> tuple[int, int, int, int]:
    """Pixels of a picture of `size` (width, height) as the integers 0 to 999 of an answer."""
    x1, y1, x2, y2 = (
        min(COORDINATE_MAX, max(0, round(value / extent * COORDINATE_MAX)))
        for value, extent in zip(box, (*size, *size), strict=True)
    )
    return x1, y1, x2, y2


def find(scene: Scene, item: SceneObject, picture: int = 0) -> Target:
    """The target that an object of a scene is."""
    return Target(picture, next(number for number, other in enumerate(scene.objects) if other is item))


def grounding_pieces(
    label: str, items: Sequence[SceneObject], scene: Scene, picture: int = 0, label_targets: tuple[Target, ...] = ()
) -> Iterator[Piece]:
    """A label and the boxes of objects with the marks of DeepSeek-VL2."""
    yield Piece(REF_START)
    yield Piece(label, label_targets)
    yield Piece(f"{REF_END}{DET_START}[")
    for number, item in enumerate(items):
        yield Piece(", [" if number else "[")
        for place, value in enumerate(quantize_box(item.box, scene.size)):
            if place:
                yield Piece(", ")
            yield Piece(str(value), (find(scene, item, picture),))
        yield Piece("]")
    yield Piece(f"]{DET_END}")


def format_grounding(label: str, items: Sequence[SceneObject], scene: Scene) -> str:
    """The text of `grounding_pieces`."""
    return "".join(piece.text for piece in grounding_pieces(label, items, scene))


def reading_order(scene: Scene) -> list[SceneObject]:
    """The objects as a person reads: upper, middle and lower third of the picture, in each from left to right."""
    return sorted(scene.objects, key=lambda item: (third(item.center[1], scene.height), item.center))


def third(position: float, extent: float) -> int:
    """In which third of an extent a position lies: 0, 1 or 2."""
    return min(2, int(3 * position / extent))


def named(scene: Scene, *, name: str | None = None, color: str | None = None) -> list[SceneObject]:
    """The shapes of a scene with a name, a colour, or both."""
    return [
        item for item in scene.shapes if (name is None or item.name == name) and (color is None or item.color == color)
    ]


def _is_only_of_color(scene: Scene, item: SceneObject) -> bool:
    """Whether "the red object" means `item`; dark text could pass for black."""
    return len(named(scene, color=item.color)) == 1 and not (item.color == "black" and scene.texts)


def _is_only_of_both(scene: Scene, item: SceneObject) -> bool:
    return len(named(scene, name=item.name, color=item.color)) == 1


def _labels(rng: random.Random, scene: Scene, item: SceneObject) -> tuple[str | None, list[str]]:
    """The full name of an object, if no other has it, and the shorter names that mean it alone."""
    if item.is_text:
        # Which word or number it is belongs to reading.
        return None, [item.kind] if sum(other.kind == item.kind for other in scene.texts) == 1 else []
    if item.kind == "bar":
        return item.description, []
    short = [item.name] if len(named(scene, name=item.name)) == 1 else []
    if _is_only_of_color(scene, item):
        short.append(f"{item.color} {rng.choice(phrases.ANY_SHAPE)}")
    return (item.description if _is_only_of_both(scene, item) else None), short


def _located(task: str, question: str, label: str, items: Sequence[SceneObject], scene: Scene) -> Example:
    pieces = tuple(grounding_pieces(label, items, scene))
    return Example(task, question, pieces, tuple(item.box for item in items), (scene,))


def _told(task: str, question: str, answer: str, items: Sequence[SceneObject], scene: Scene) -> Example:
    """An answer in words about objects."""
    targets = tuple(find(scene, item) for item in items)
    return Example(task, question, (Piece(answer, targets),), (), (scene,))


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
        form = rng.choices(phrases.MARKED_LOCATE, (4, 2, 1, 1, 1, 1))[0]
        if rng.random() < 0.4:
            asked = asked[0].upper() + asked[1:]
        if rng.random() < 0.3:
            asked += "."
        question = form.format(f"{REF_START}{asked}{REF_END}")
    else:
        question = rng.choice(phrases.PLAIN_LOCATE).format(f"the {label}")
    return _located("locate", question, label, [item], scene)


def make_locate_zh(rng: random.Random, scene: Scene) -> Example | None:
    """Where is one shape? In Chinese, and so is the label of the answer."""
    choices = []
    for item in scene.shapes:
        labels = [described_zh(item.color, item.name)] * 3 if _is_only_of_both(scene, item) else []
        if len(named(scene, name=item.name)) == 1:
            labels.append(phrases.SHAPES_ZH[item.name])
        if _is_only_of_color(scene, item):
            labels.append(described_zh(item.color, None))
        if labels:
            choices.append((item, labels))
    if not choices:
        return None
    item, labels = rng.choice(choices)
    label = rng.choice(labels)
    if rng.random() < 0.6:
        question = rng.choice(phrases.MARKED_LOCATE_ZH).format(f"{REF_START}{label}{REF_END}")
    else:
        question = rng.choice(phrases.PLAIN_LOCATE_ZH).format(label)
    return _located("locate_zh", question, label, [item], scene)


def counting_classes(scene: Scene) -> list[tuple[str, list[SceneObject]]]:
    """Every class that can be counted in the scene without doubt, as (noun, its objects), empty classes too."""
    classes = [(name, named(scene, name=name)) for name in SHAPE_NAMES]
    for color in COLOR_NAMES:
        if not (color == "black" and scene.texts):
            classes.append((f"{color} object", named(scene, color=color)))
        classes += [(f"{color} {name}", named(scene, name=name, color=color)) for name in SHAPE_NAMES]
    classes.append(("shape", list(scene.shapes)))
    if not scene.texts:
        classes.append(("object", list(scene.shapes)))
    return classes


def make_locate_all(rng: random.Random, scene: Scene) -> Example | None:
    """Where are all objects of a shape, a colour, or both? The boxes come in reading order."""
    present = [(noun, items) for noun, items in counting_classes(scene) if items]
    if not present:
        return None
    several = [choice for choice in present if len(choice[1]) > 1]
    noun, items = rng.choice(several if several and rng.random() < 0.8 else present)
    question = rng.choice(phrases.LOCATE_ALL).format(plural(noun), one=noun)
    ordered = [item for item in reading_order(scene) if any(item is own for own in items)]
    return _located("locate_all", question, noun, ordered, scene)


def wanted_count(rng: random.Random) -> int:
    """Draws the answer of a counting question, evenly from 1 up, and zero once in ten."""
    return 0 if rng.random() < 0.1 else rng.randint(1, MAX_COUNT)


def make_count(rng: random.Random, scene: Scene, count: int | None = None) -> Example | None:
    """How many objects of a class are there?

    Args:
        rng: Source of chance.
        scene: What to ask about.
        count: The answer wanted; with no class of that count the question is None. By default zero once in ten, else
            any count that occurs.
    """
    classes = counting_classes(scene)
    if count is None:
        found = sorted({len(items) for _, items in classes})
        positive = [number for number in found if number > 0]
        count = rng.choice(positive) if positive and rng.random() >= 0.1 else 0
    fit = [(noun, items) for noun, items in classes if len(items) == count]
    if not fit:
        return None
    # One kind of class after the other, or the many pairs of colour and shape would drown the rest.
    kind = rng.choice(sorted({_class_kind(noun) for noun, _ in fit}))
    noun, items = rng.choice([choice for choice in fit if _class_kind(choice[0]) == kind])
    targets = tuple(find(scene, item) for item in items)
    question = rng.choice(phrases.COUNT).format(plural(noun))
    return Example("count", question, (Piece(str(len(items)), targets, "count"),), (), (scene,))


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
    fit = [item for item in scene.shapes if len(named(scene, name=item.name)) == 1]
    if not fit:
        return None
    item = rng.choice(fit)
    return _told("color", rng.choice(phrases.COLOR).format(item.name), item.color, [item], scene)


def make_shape(rng: random.Random, scene: Scene) -> Example | None:
    """What shape is the only object of a colour?"""
    fit = [item for item in scene.shapes if _is_only_of_color(scene, item)]
    if not fit:
        return None
    item = rng.choice(fit)
    asked = f"{item.color} {rng.choice(phrases.ANY_SHAPE[:2])}"
    return _told("shape", rng.choice(phrases.SHAPE).format(asked), item.name, [item], scene)


def make_describe(rng: random.Random, scene: Scene) -> Example | None:
    """Every object with its box, in reading order."""
    items = reading_order(scene)
    if not items:
        return None
    pieces: list[Piece] = []
    for number, item in enumerate(items):
        if number:
            pieces.append(Piece(", "))
        label = item.kind if item.is_text else item.description
        pieces += grounding_pieces(label, [item], scene, label_targets=(find(scene, item),))
    boxes = tuple(item.box for item in items)
    return Example("describe", rng.choice(phrases.DESCRIBE), tuple(pieces), boxes, (scene,))


def place_in_words(center: tuple[float, float], size: Size) -> str:
    """Where a point is: "Top left", "Middle center", "Bottom right" and so on, by thirds of the picture."""
    column, row = (third(value, extent) for value, extent in zip(center, size, strict=True))
    return f"{phrases.ROW_PLACES[row]} {phrases.COLUMN_PLACES[column]}"


def make_parts(rng: random.Random, scene: Scene) -> Example | None:
    """What is in each part of the picture, in reading order and in words."""
    items = reading_order(scene)
    if not items or scene.texts or scene.bars:
        return None
    pieces: list[Piece] = []
    for item in items:
        target = (find(scene, item),)
        pieces += [Piece(" ")] if pieces else []
        place = place_in_words(item.center, scene.size)
        pieces += [Piece(place, target), Piece(": a"), Piece(f" {item.description}", target), Piece(".")]
    return Example("parts", rng.choice(phrases.PARTS), tuple(pieces), (), (scene,))


def make_read(rng: random.Random, scene: Scene, kind: str | None = None) -> Example | None:
    """What is the only printed word, or number?

    Args:
        rng: Source of chance.
        scene: What to ask about.
        kind: "word" or "number"; either if not given.
    """
    fit = [
        item
        for item in scene.texts
        if kind in (None, item.kind) and sum(other.kind == item.kind for other in scene.texts) == 1
    ]
    if not fit:
        return None
    item = rng.choice(fit)
    forms: tuple[str, ...] = phrases.READ_WORD if item.kind == "word" else phrases.READ_NUMBER
    if len(scene.texts) == 1 and rng.random() < 0.25:
        forms = phrases.READ_TEXT
    piece = Piece(item.name, (find(scene, item),), "letters")
    return Example(item.kind, rng.choice(forms), (piece,), (), (scene,))


def make_read_all(rng: random.Random, scene: Scene) -> Example | None:
    """All printed texts in reading order."""
    items = [item for item in reading_order(scene) if item.is_text]
    if not items:
        return None
    pieces: list[Piece] = []
    for item in items:
        pieces += [Piece("\n")] if pieces else []
        pieces.append(Piece(item.name, (find(scene, item),), "letters"))
    return Example("read_all", rng.choice(phrases.READ_ALL), tuple(pieces), (), (scene,))


def make_table(rng: random.Random, scene: Scene) -> Example | None:
    """What stands in a row and a column of a table?"""
    cells = table_cells(scene)
    if not cells:
        return None
    item = rng.choice(cells)
    question = rng.choice(phrases.TABLE).format(row=phrases.row_in_words(item.row), column=item.column)
    return Example("table", question, (Piece(item.name, (find(scene, item),), "letters"),), (), (scene,))


def make_bar(rng: random.Random, scene: Scene) -> Example | None:
    """What is the value of a bar, named by its colour or its letter?"""
    if not scene.bars:
        return None
    item = rng.choice(scene.bars)
    asked = f"the {item.description}" if rng.random() < 0.5 else f"bar {item.column}"
    # The letter under the bar knows its value, too.
    own = [other for other in scene.objects if other.column == item.column]
    return _told("bar", rng.choice(phrases.BAR).format(asked), item.name, own, scene)


def make_ground(rng: random.Random, scene: Scene) -> Example | None:
    """A wish that one object alone meets; the answer names it with its box."""
    choices: list[tuple[SceneObject, str]] = []
    for item in scene.shapes:
        if _is_only_of_color(scene, item):
            choices.append((item, rng.choice(phrases.WISH_COLOR).format(item.color)))
        if len(named(scene, name=item.name)) == 1:
            choices.append((item, rng.choice(phrases.WISH_SHAPE).format(phrases.WISHES[item.name])))
    if not choices:
        return None
    item, question = rng.choice(choices)
    before, after = phrases.WISH_ANSWER
    grounded = grounding_pieces(item.description, [item], scene, label_targets=(find(scene, item),))
    return Example("ground", question, (Piece(before), *grounded, Piece(after)), (item.box,), (scene,))


def make_follow_up(rng: random.Random, scene: Scene) -> Example | None:
    """A second question about the object of a first one, which it calls "it"."""
    item = rng.choice(scene.shapes) if scene.shapes else None
    if item is None or not _is_only_of_both(scene, item):
        return None
    firsts = ["locate"]
    if len(named(scene, name=item.name)) == 1:
        firsts.append("color")
    if _is_only_of_color(scene, item):
        firsts.append("shape")
    kind = rng.choice(firsts)
    if kind == "locate":
        question = rng.choice(phrases.PLAIN_LOCATE).format(f"the {item.description}")
        first = _located("locate", question, item.description, [item], scene)
        seconds = ["color", "shape"]
    elif kind == "color":
        first = _told("color", rng.choice(phrases.COLOR).format(item.name), item.color, [item], scene)
        seconds = ["locate"]
    else:
        asked = f"{item.color} {phrases.ANY_SHAPE[0]}"
        first = _told("shape", rng.choice(phrases.SHAPE).format(asked), item.name, [item], scene)
        seconds = ["locate"]
    second = rng.choice(seconds)
    if second == "locate":
        pieces = tuple(grounding_pieces(item.description, [item], scene, label_targets=(find(scene, item),)))
        boxes: tuple[Box, ...] = (item.box,)
        question = rng.choice(phrases.FOLLOW_LOCATE)
    else:
        answer, forms = (item.color, phrases.FOLLOW_COLOR) if second == "color" else (item.name, phrases.FOLLOW_SHAPE)
        pieces, boxes, question = (Piece(answer, (find(scene, item),)),), (), rng.choice(forms)
    return Example("follow_up", question, pieces, boxes, (scene,), (first,))


def all_phrases() -> Iterator[str]:
    """Every form of a question with every name that can stand in it, and the names by themselves."""
    nouns = [*SHAPE_NAMES, *phrases.ANY_SHAPE, "word", "number", "bar"]
    names = [f"{color} {noun}" for color in COLOR_NAMES for noun in nouns] + nouns
    for name in names:
        yield from (name, f"the {name}", f"the {plural(name)}", name.capitalize(), f"The {name}", f" a {name}")
    for form in chain(
        phrases.MARKED_LOCATE, phrases.PLAIN_LOCATE, phrases.COLOR, phrases.SHAPE, phrases.COMPARE_WHICH, phrases.BAR
    ):
        yield form.format("the circle")
    for form in chain(phrases.LOCATE_ALL, phrases.COUNT, phrases.COMPARE_COUNT, phrases.COMPARE_SHAPE):
        yield form.format("circles", one="circle", number=1)
    for form in phrases.COMPARE_COLOR:
        yield form.format("circle", number=1)
    for form in phrases.TABLE:
        yield form.format(row="Mon", column="A")
    for form in chain(phrases.WISH_COLOR, phrases.WISH_SHAPE):
        for wish in phrases.WISHES.values():
            yield form.format(wish).split("|>")[-1]
    for form in chain(phrases.DESCRIBE, phrases.IN_CONTEXT):
        yield form.split("|>")[-1]
    yield from chain(phrases.PARTS, phrases.READ_WORD, phrases.READ_NUMBER, phrases.READ_TEXT, phrases.READ_ALL)
    yield from chain(phrases.COMPARE_LIST, phrases.FOLLOW_LOCATE, phrases.FOLLOW_COLOR, phrases.FOLLOW_SHAPE)
    yield from (f"{row} {column}:" for row in phrases.ROW_PLACES for column in phrases.COLUMN_PLACES)
    yield from phrases.WISH_ANSWER
