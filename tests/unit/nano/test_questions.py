"""Questions about scenes: every answer is checked against the scene by another way than the one that made it."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageOps

from deepseek_vl2.nano.questions import (
    CELL_CLASSES,
    DEFAULT_WEIGHTS,
    EVAL_SPLIT,
    MAX_COUNT,
    TASKS,
    TRAIN_SPLIT,
    counting_scene,
    dense_targets,
    example_at,
    format_grounding,
    make_count,
    make_describe,
    make_locate,
    make_read,
    plural,
    quantize_box,
    sample_example,
    view_rectangles,
)
from deepseek_vl2.nano.scenes import COLOR_NAMES, SHAPE_NAMES, Background, Scene, SceneObject, random_scene

GROUND = Background("plain", (255, 255, 255), (255, 255, 255), True, 8)
NOUNS = {plural(name): name for name in (*SHAPE_NAMES, "object", "shape", "one")}
PAIR = re.compile(r"<\|ref\|>(.*?)<\|/ref\|><\|det\|>\[(.*?)\]<\|/det\|>")


def shape_at(color, name, x, y, side=20.0):
    return SceneObject("shape", name, color, (x, y, x + side, y + side), (200, 0, 0))


def text_at(kind, name, x, y):
    return SceneObject(kind, name, "dark", (x, y, x + 30, y + 10), (40, 40, 40))


def scene_of(*items, size=(200, 100)):
    return Scene(*size, GROUND, items)


def members(scene, label):
    """The objects that a person would understand by a label."""
    words = label.split()
    if words[0] in ("word", "number"):
        return [item for item in scene.texts if item.kind == words[0] and words[1:] in ([], [item.name])]
    found = list(scene.objects)
    for word in words:
        if word == "shape":
            found = [item for item in found if item.kind == "shape"]
        elif word not in ("object", "one"):
            found = [item for item in found if word in (item.name, item.color)]
    return found


def parse(answer):
    pairs = []
    for label, inner in PAIR.findall(answer):
        boxes = re.findall(r"\[(\d+), (\d+), (\d+), (\d+)\]", inner)
        assert "[" + "], [".join(", ".join(box) for box in boxes) + "]" == inner
        pairs.append((label, [tuple(int(value) for value in box) for box in boxes]))
    return pairs


def examples(task, number=150):
    return [example_at("test", index, {task: 1}) for index in range(number)]


def test_locate_names_one_object_and_gives_its_box():
    questions = set()
    for example in examples("locate", 300):
        ((label, (box,)),) = parse(example.answer)
        (item,) = members(example.scene, label)
        assert example.targets == (item,) and example.boxes == [item.box]
        assert box == quantize_box(item.box, example.scene.size)
        asked = re.sub("<.*?>", "", example.question).lower()
        assert label.lower() in asked
        assert not (label.startswith("black ") and label.split()[1] not in SHAPE_NAMES and example.scene.texts)
        questions.add(example.question.replace(label, "X"))
    assert {"<|ref|>the X<|/ref|>.", "Where is the X?", "Locate the X."} <= questions
    assert any(question.startswith("<|ref|>The X.<|/ref|>") for question in questions)


def test_locate_avoids_twins():
    twins = scene_of(shape_at("red", "star", 0, 0), shape_at("red", "star", 50, 0))
    assert make_locate(random.Random(0), twins) is None
    assert make_locate(random.Random(0), scene_of()) is None
    mixed = scene_of(*twins.objects, shape_at("red", "cross", 100, 0), text_at("word", "CAT", 0, 50))
    answers = {make_locate(random.Random(seed), mixed).answer.split("<|/ref|>")[0] for seed in range(200)}
    assert answers == {"<|ref|>red cross", "<|ref|>cross", "<|ref|>word CAT", "<|ref|>word"}


def test_locate_all_gives_every_box_in_reading_order():
    for example in examples("locate_all"):
        ((label, boxes),) = parse(example.answer)
        items = members(example.scene, label)
        assert set(example.targets) == set(items) and example.boxes == [item.box for item in example.targets]
        assert boxes == [quantize_box(box, example.scene.size) for box in example.boxes]
        middles = [box[1] + box[3] for box in example.boxes]
        assert middles == sorted(middles)
        assert label in example.question or plural(label) in example.question


def test_count_agrees_with_the_scene():
    answers = Counter()
    for example in examples("count", 700):
        asked = re.match(r"(?:How many|Count the) (.*?)(?: are| can| do| in|\.)", example.question)[1]
        *color, noun = asked.split()
        assert int(example.answer) == len(members(example.scene, " ".join([*color, NOUNS[noun]]))), example.question
        assert not (noun == "objects" and example.scene.texts and color in ([], ["black"]))
        answers[int(example.answer)] += 1
    assert set(answers) == set(range(MAX_COUNT + 1))
    assert 0.05 < answers[0] / 700 < 0.2
    assert all(answers[number] / 700 > 0.07 for number in range(1, MAX_COUNT + 1))


def test_count_of_a_wanted_number():
    for seed in range(50):
        rng = random.Random(seed)
        scene = counting_scene(rng, 3, max_side_fraction=0.2)
        assert make_count(rng, scene, 3).answer == "3"
        assert make_count(rng, scene, 40) is None


@pytest.mark.parametrize(("task", "asked", "answered"), [("color", "name", "color"), ("shape", "color", "name")])
def test_color_and_shape_mean_the_only_object(task, asked, answered):
    for example in examples(task):
        (item,) = example.targets
        assert getattr(item, asked) in example.question
        assert example.answer == getattr(item, answered)
        assert [other for other in example.scene.shapes if getattr(other, asked) == getattr(item, asked)] == [item]


def test_describe_lists_everything_from_top_to_bottom():
    items = (shape_at("red", "star", 100, 60), text_at("number", "42", 0, 5), shape_at("blue", "cross", 50, 60))
    example = make_describe(random.Random(0), scene_of(*items))
    assert example.answer == (
        "<|ref|>number 42<|/ref|><|det|>[[0, 50, 150, 150]]<|/det|>, "
        "<|ref|>blue cross<|/ref|><|det|>[[250, 599, 350, 799]]<|/det|>, "
        "<|ref|>red star<|/ref|><|det|>[[500, 599, 599, 799]]<|/det|>"
    )
    assert make_describe(random.Random(0), scene_of()) is None
    for example in examples("describe"):
        assert Counter(label for label, _ in parse(example.answer)) == Counter(
            item.description for item in example.scene.objects
        )


def test_read_gives_the_text():
    kinds = set()
    for example in examples("read"):
        (item,) = example.targets
        assert example.answer == item.name
        assert item.kind in example.question or len(example.scene.texts) == 1
        kinds.add(item.kind)
    assert kinds == {"word", "number"}
    two = scene_of(text_at("word", "CAT", 0, 0), text_at("word", "DOG", 50, 0))
    assert make_read(random.Random(0), two) is None


def test_boxes_become_integers_up_to_999():
    assert quantize_box((0.0, 0.0, 640.0, 480.0), (640, 480)) == (0, 0, 999, 999)
    assert quantize_box((64.0, 120.0, 320.0, 240.0), (640, 480)) == (100, 250, 500, 500)
    assert quantize_box((-5.0, 0.0, 700.0, 480.0), (640, 480)) == (0, 0, 999, 999)
    two = format_grounding("star", [(0.0, 0.0, 5.0, 5.0), (5.0, 0.0, 10.0, 10.0)], (10, 10))
    assert two == "<|ref|>star<|/ref|><|det|>[[0, 0, 500, 500], [500, 0, 999, 999]]<|/det|>"


def test_examples_repeat_and_splits_differ():
    train = [example_at(TRAIN_SPLIT, index) for index in range(60)]
    assert train == [example_at(TRAIN_SPLIT, index) for index in range(60)]
    held_out = [example_at(EVAL_SPLIT, index) for index in range(60)]
    assert not {example.scene for example in train} & {example.scene for example in held_out}
    assert {example.task for example in train} == set(DEFAULT_WEIGHTS) == set(TASKS)


def test_scene_arguments_reach_the_scene():
    assert all(
        len(example_at("test", index, {"count": 1}, {"num_objects": (1, 2)}).scene.objects) <= 3 for index in range(50)
    )
    for task in TASKS:
        kwargs = {"size": (224, 224), "num_objects": (1, 2), "max_side_fraction": 0.3}
        for index in range(20):
            example = example_at("test", index, {task: 1}, kwargs)
            assert example.scene.size == (224, 224)


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="sing"):
        sample_example(random.Random(0), {"sing": 1})
    with pytest.raises(ValueError, match="locate"):
        sample_example(random.Random(0), {"locate": 1}, {"num_objects": (0, 0), "text_probability": 0})


@pytest.mark.parametrize("size", [(112, 112), (448, 336), (333, 250), (224, 448), (101, 170), (640, 331)])
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_view_rectangles_agree_with_letterboxing(size, columns, rows):
    """A white picture padded with black by PIL shows where it lies in each canvas."""
    rectangles = view_rectangles(*size, columns, rows, side=112)
    assert rectangles.shape == (1 + columns * rows, 4)
    white = Image.new("RGB", size, "white")
    for canvas, first, last in (((112, 112), 0, 0), ((112 * columns, 112 * rows), 1, -1)):
        padded = ImageOps.pad(white, canvas, color="black")
        scale_x = canvas[0] / (rectangles[last][2] - rectangles[first][0])
        scale_y = canvas[1] / (rectangles[last][3] - rectangles[first][1])
        left, top = -rectangles[first][0] * scale_x, -rectangles[first][1] * scale_y
        box = (left, top, left + size[0] * scale_x, top + size[1] * scale_y)
        assert padded.getbbox() == pytest.approx(box, abs=1e-6)
    steps = rectangles[1:, :2].reshape(rows, columns, 2)
    extent = (rectangles[1, 2] - rectangles[1, 0], rectangles[1, 3] - rectangles[1, 1])
    for row in range(rows):
        for column in range(columns):
            assert steps[row, column] == pytest.approx(steps[0, 0] + np.array([column, row]) * extent)


def test_dense_targets_by_hand():
    scene = scene_of(shape_at("blue", "star", 10, 0, 50.0), text_at("word", "CAT", 110, 80), size=(200, 100))
    targets = dense_targets(scene, view_rectangles(200, 100, 2, 1), tokens_per_side=4)
    assert targets.presence.shape == (3, 4, 4) and targets.boxes.shape == (3, 4, 4, 4)
    # The global view shows -50 to 150 downwards, so its cells are 50 x 50 and the picture fills the two middle rows.
    assert targets.presence[0].tolist() == [[-1] * 4, [0, 0, -1, -1], [-1, -1, -1, -1], [-1] * 4]
    # The tiles show 100 x 100 each, in cells of 25 x 25.
    assert targets.presence[1].tolist() == [[0, 0, 0, -1], [0, 0, 0, -1], [-1] * 4, [-1] * 4]
    assert targets.presence[2].tolist() == [[-1] * 4, [-1] * 4, [-1] * 4, [1, 1, -1, -1]]
    assert targets.shape_ids[1, 0, 0] == SHAPE_NAMES.index("star")
    assert targets.color_ids[1, 0, 0] == COLOR_NAMES.index("blue")
    assert targets.boxes[1, 0, 0] == pytest.approx([0.05, 0, 0.3, 0.5])
    assert CELL_CLASSES[targets.shape_ids[2, 3, 0]] == "word" and targets.color_ids[2, 3, 0] == -1
    empty = targets.presence == -1
    assert (targets.shape_ids[empty] == -1).all() and (targets.boxes[empty] == 0).all()


def test_dense_targets_agree_with_the_painted_picture():
    """The same cells, found by counting pixels of each object's box."""
    for seed in range(8):
        scene = random_scene(random.Random(seed), size=(224, 224))
        targets = dense_targets(scene, view_rectangles(224, 224, 2, 2), tokens_per_side=4)
        for index, item in enumerate(scene.objects):
            mask = Image.new("L", (224, 224))
            mask.paste(255, tuple(int(value) for value in item.box))
            share = np.asarray(mask).reshape(8, 28, 8, 28).mean(axis=(1, 3)) / 255
            tiles = targets.presence[1:].reshape(2, 2, 4, 4).transpose(0, 2, 1, 3).reshape(8, 8)
            assert (share[tiles == index] > 0.15).all()
            # A cell that it covers is its own, or belongs to another object.
            assert (tiles[share > 0.15] >= 0).all() and (tiles[share > 0.5] == index).all()


def test_dense_targets_of_nothing():
    targets = dense_targets(scene_of(), view_rectangles(200, 100, 1, 1), tokens_per_side=3)
    assert all((part == -1).all() and part.shape == (2, 3, 3) for part in targets[:3])
    assert targets.boxes.shape == (2, 3, 3, 4) and not targets.boxes.any()


def test_targets_do_not_change_the_picture():
    scene = random_scene(random.Random(3))
    before = scene.draw()
    dense_targets(scene, view_rectangles(*scene.size, 1, 1))
    assert ImageChops.difference(before, scene.draw()).getbbox() is None
