"""Questions about two and three pictures: each answer is checked by reading the question as a person does."""

import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from deepseek_vl2.nano.phrases import plural
from deepseek_vl2.nano.questions import find, quantize_box
from deepseek_vl2.nano.scenes import COLOR_NAMES, SHAPE_NAMES, Background, Scene, SceneObject
from deepseek_vl2.nano.several import (
    NUM_COMPARED,
    beginning_of,
    compared_scenes,
    in_context_scenes,
    make_compare,
    make_in_context,
)

GROUND = Background("plain", (255, 255, 255), (255, 255, 255), True, 8)
NOUNS = {plural(name): name for name in (*SHAPE_NAMES, "object")}
BOX = re.compile(r"<\|ref\|>(.*?)<\|/ref\|><\|det\|>\[\[(\d+), (\d+), (\d+), (\d+)\]\]<\|/det\|>")


def shape_at(color, name, x, y):
    return SceneObject("shape", name, color, (x, y, x + 20.0, y + 20.0), (200, 0, 0))


def scene_of(*items):
    return Scene(200, 100, GROUND, items)


def like(scene, words):
    """The objects that have all of some names and colours."""
    return [item for item in scene.objects if set(words) - {"object"} <= {item.name, item.color}]


def compared(number=250):
    rngs = (random.Random(f"test-compare:{seed}") for seed in range(10 * number))
    found = (make_compare(rng, compared_scenes(rng)) for rng in rngs)
    return list(itertools.islice(filter(None, found), number))


def seen(example, piece):
    return [example.scenes[target.picture].objects[target.number] for target in piece.targets]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1,), "<image>"),
        ((2,), "<image>\n<image>"),
        ((3, True), "This is image_1: <image>\nThis is image_2: <image>\nThis is image_3: <image>"),
    ],
)
def test_pictures_are_introduced_line_by_line(arguments, expected):
    assert beginning_of(*arguments) == expected


def test_in_context_scenes_mark_a_kind_that_the_second_has_once():
    numbers = Counter()
    for seed in range(150):
        scenes = in_context_scenes(random.Random(seed))
        assert scenes == in_context_scenes(random.Random(seed))
        first, second = scenes
        marked = first.objects[first.marked]
        assert second.marked is None and {item.kind for item in (*first.objects, *second.objects)} == {"shape"}
        assert len(like(second, [marked.name])) == 1
        numbers[len(first.objects)] += 1
    assert set(numbers) >= {2, 3, 4} and max(numbers) == 4
    sizes = ((112, 112), (300, 200))
    scenes = in_context_scenes(random.Random(0), sizes=sizes, num_objects=(1, 1))
    assert tuple(scene.size for scene in scenes) == sizes and [len(scene.objects) for scene in scenes] == [1, 1]


def test_in_context_answers_the_box_of_the_same_kind():
    colors_differ = set()
    for seed in range(150):
        rng = random.Random(seed)
        scenes = in_context_scenes(rng)
        example = make_in_context(rng, scenes)
        marked = scenes[0].objects[scenes[0].marked]
        ((label, *box),) = BOX.findall(example.answer)
        assert label == marked.name
        (item,) = like(scenes[1], [label])
        assert tuple(map(int, box)) == quantize_box(item.box, scenes[1].size)
        assert example.scenes == scenes and example.boxes == (item.box,)
        assert example.question.startswith("<|grounding|>") and "first image" in example.question
        # The label is read off the mark in the first picture, the coordinates off the second.
        (label_piece,) = (piece for piece in example.pieces if piece.text == label)
        assert label_piece.targets == (find(scenes[0], marked, 0),)
        coordinates = [piece for piece in example.pieces if piece.text.isdigit()]
        assert [piece.targets for piece in coordinates] == [(find(scenes[1], item, 1),)] * 4
        colors_differ.add(item.color != marked.color)
    assert colors_differ == {True, False}


def test_in_context_needs_a_mark_and_one_object_of_the_kind():
    first = replace(scene_of(shape_at("red", "star", 0.0, 0.0)), marked=0)
    one, two = shape_at("blue", "star", 0.0, 0.0), shape_at("red", "star", 50.0, 0.0)
    rng = random.Random(0)
    assert make_in_context(rng, (first, scene_of(one))) is not None
    assert make_in_context(rng, (first, scene_of(one, two))) is None
    assert make_in_context(rng, (first, scene_of(shape_at("red", "cross", 0.0, 0.0)))) is None
    assert make_in_context(rng, (replace(first, marked=None), scene_of(one))) is None


def test_compared_scenes():
    for seed in range(60):
        scenes = compared_scenes(random.Random(seed))
        assert scenes == compared_scenes(random.Random(seed)) and len(scenes) == NUM_COMPARED == 3
        items = [item for scene in scenes for item in scene.objects]
        assert all(1 <= len(scene.objects) <= 3 for scene in scenes) and {item.kind for item in items} == {"shape"}
        assert len({item.name for item in items}) <= 4 and len({item.color for item in items}) <= 4
    sizes = ((112, 112), (300, 200), (200, 300))
    assert tuple(scene.size for scene in compared_scenes(random.Random(0), sizes=sizes)) == sizes


def test_comparisons_agree_with_the_pictures():
    kinds = Counter()
    for example in compared():
        question, scenes = example.question, example.scenes
        assert example.boxes == () and example.task == "compare"
        words = re.findall("[a-z]+", question)
        named = [word for word in words if word in (*SHAPE_NAMES, *COLOR_NAMES)]
        asked = re.search(r"image_(\d)", question)
        if question.startswith("How many"):
            (noun,) = (NOUNS[word] for word in words if word in NOUNS)
            (piece,) = example.pieces
            items = like(scenes[int(asked[1]) - 1], [noun])
            assert example.answer == str(len(items)) and piece.how == "count"
            assert Counter(map(id, seen(example, piece))) == Counter(map(id, items))
            kinds["count", noun == "object", bool(items)] += 1
        elif asked:
            (item,) = like(scenes[int(asked[1]) - 1], named)
            (name,) = named
            assert example.answer == (item.name if name == item.color else item.color)
            assert ("shape" if name == item.color else "color") in words
            assert [seen(example, piece) for piece in example.pieces] == [[item]]
            kinds["shape" if name == item.color else "color"] += 1
        elif named:
            (number,) = (number for number, scene in enumerate(scenes) if like(scene, named))
            assert example.answer == f"image_{number + 1}"
            (piece,) = example.pieces
            assert Counter(map(id, seen(example, piece))) == Counter(map(id, like(scenes[number], named)))
            kinds["which", len(named), "object" in words] += 1
        else:
            check_list(example)
            kinds["list"] += 1
    assert set(kinds) == {
        *(("count", is_any, True) for is_any in (True, False)),
        ("count", False, False),
        *("shape", "color", "list"),
        *(("which", 2, False), ("which", 1, False), ("which", 1, True)),
    }


def third_of(item, scene):
    return item.center[1] * 3 // scene.height


def check_list(example):
    lines = example.answer.split("\n")
    assert len(lines) == 3
    for number, (line, scene) in enumerate(zip(lines, example.scenes, strict=True)):
        told = re.findall(r"[:,] a (\w+) (\w+)", line)
        assert line == f"image_{number + 1}: " + ", ".join(f"a {color} {name}" for color, name in told) + "."
        assert Counter(told) == Counter((item.color, item.name) for item in scene.objects)
    pieces = [piece for piece in example.pieces if piece.targets]
    items = [seen(example, piece) for piece in pieces]
    assert all(piece.text == f" {item.color} {item.name}" for piece, (item,) in zip(pieces, items, strict=True))
    pictures = [piece.targets[0].picture for piece in pieces]
    assert pictures == sorted(pictures)
    for (first, a), (second, b) in itertools.pairwise(zip(pictures, (item for (item,) in items), strict=True)):
        scene = example.scenes[first]
        assert first < second or [third_of(a, scene), a.center[0]] <= [third_of(b, scene), b.center[0]]


def test_the_picture_that_shows_it_is_named_in_full():
    """Shapes, colours and both tell the pictures apart, each only where it means one picture."""
    scenes = (
        scene_of(shape_at("red", "star", 0.0, 0.0)),
        scene_of(shape_at("red", "cross", 0.0, 0.0), shape_at("blue", "star", 50.0, 0.0)),
        scene_of(shape_at("red", "star", 0.0, 0.0), shape_at("red", "cross", 50.0, 0.0)),
    )
    found = {}
    for seed in range(300):
        example = make_compare(random.Random(seed), scenes)
        if example is not None and example.answer.startswith("image_") and "\n" not in example.answer:
            found.setdefault(re.search(r" a (.*)\?", example.question)[1], set()).add(example.answer)
    assert found == {"blue object": {"image_2"}, "blue star": {"image_2"}}
