"""Questions about scenes: every answer is checked against the scene by another way than the one that made it."""

import itertools
import random
import re
from collections import Counter

import pytest

from deepseek_vl2.nano.layouts import ROW_NAMES, chart_scene, reading_scene, table_scene, text_scene
from deepseek_vl2.nano.phrases import plural
from deepseek_vl2.nano.questions import (
    MAX_COUNT,
    Piece,
    Target,
    all_phrases,
    counting_scene,
    find,
    format_grounding,
    make_bar,
    make_color,
    make_count,
    make_describe,
    make_follow_up,
    make_ground,
    make_locate,
    make_locate_all,
    make_locate_zh,
    make_parts,
    make_read,
    make_read_all,
    make_shape,
    make_table,
    place_in_words,
    quantize_box,
    split_rng,
)
from deepseek_vl2.nano.scenes import COLOR_NAMES, SHAPE_NAMES, Background, Scene, SceneObject, random_scene

GROUND = Background("plain", (255, 255, 255), (255, 255, 255), True, 8)
NOUNS = {plural(name): name for name in (*SHAPE_NAMES, "object", "shape", "one")}
PAIR = re.compile(r"<\|ref\|>(.*?)<\|/ref\|><\|det\|>\[(.*?)\]<\|/det\|>")
# As a speaker of Chinese reads the labels.
CHINESE = {
    **{"红色": "red", "橙色": "orange", "黄色": "yellow", "绿色": "green", "青色": "cyan", "蓝色": "blue"},
    **{"紫色": "purple", "黑色": "black", "图形": "object"},
    **{
        "圆形": "circle",
        "正方形": "square",
        "三角形": "triangle",
        "五角星": "star",
        "十字": "cross",
        "菱形": "diamond",
    },
}
# What each wish can only mean.
WISHED = {
    **{"can roll": "circle", "four equal sides": "square", "three corners": "triangle"},
    **{"shines at night": "star", "a plus": "cross", "a kite": "diamond"},
}


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
    found = [item for item in scene.objects if not item.is_text]
    for word in words:
        if word in ("shape", "bar"):
            found = [item for item in found if item.kind == word]
        elif word not in ("object", "one"):
            found = [item for item in found if word in (item.name, item.color)]
    return found


def is_doubtful(scene, label):
    """Whether dark text could be taken for what the label says."""
    words = label.split()
    return bool(scene.texts) and words[-1] in ("object", "one", "shape", "objects") and words[0] in ("black", "objects")


def parse(answer):
    pairs = []
    for label, inner in PAIR.findall(answer):
        boxes = re.findall(r"\[(\d+), (\d+), (\d+), (\d+)\]", inner)
        assert "[" + "], [".join(", ".join(box) for box in boxes) + "]" == inner
        pairs.append((label, [tuple(int(value) for value in box) for box in boxes]))
    return pairs


def examples(make, draw=random_scene, number=120):
    """The first questions that fit, each about a scene of its own."""
    rngs = (random.Random(f"test-questions:{seed}") for seed in range(50 * number))
    found = list(itertools.islice(filter(None, (make(rng, draw(rng)) for rng in rngs)), number))
    assert len(found) == number
    return found


def seen(example, piece):
    """The objects that a piece is about."""
    return [example.scenes[target.picture].objects[target.number] for target in piece.targets]


def about(example):
    """All objects that an answer is about, each once, in order."""
    targets = dict.fromkeys(target for piece in example.pieces for target in piece.targets)
    return [example.scenes[target.picture].objects[target.number] for target in targets]


def assert_reading_order(scene, items):
    """Upper third of the picture, middle, lower; in each from left to right."""
    places = [(item.center[1] * 3 // scene.height, item.center[0]) for item in items]
    assert places == sorted(places)


def is_of(scene, items):
    return all(any(item is own for own in scene.objects) for item in items)


def test_locate_names_one_object_and_gives_its_box():
    asked = set()
    for draw in (random_scene, text_scene):
        for example in examples(make_locate, draw, 250):
            (scene,) = example.scenes
            ((label, (box,)),) = parse(example.answer)
            (item,) = members(scene, label)
            assert about(example) == [item] and example.boxes == (item.box,)
            assert box == quantize_box(item.box, scene.size)
            assert label.lower() in re.sub("<.*?>", "", example.question).lower()
            assert not is_doubtful(scene, label)
            asked.add(example.question.replace(label, "X"))
    assert {"<|ref|>the X<|/ref|>.", "Where is the X?", "Locate the X."} <= asked
    assert any(question.startswith("<|ref|>The X.<|/ref|>") for question in asked)


def test_locate_avoids_twins_and_does_not_read():
    twins = scene_of(shape_at("red", "star", 0, 0), shape_at("red", "star", 50, 0))
    for make in (make_locate, make_locate_zh, make_color, make_shape, make_ground, make_follow_up):
        assert make(random.Random(0), twins) is None
        assert make(random.Random(0), scene_of()) is None
    mixed = scene_of(*twins.objects, shape_at("red", "cross", 100, 0), text_at("word", "CAT", 0, 50))
    labels = {parse(make_locate(random.Random(seed), mixed).answer)[0][0] for seed in range(200)}
    assert labels == {"red cross", "cross", "word"}
    two_words = scene_of(text_at("word", "CAT", 0, 50), text_at("word", "DOG", 50, 50))
    assert make_locate(random.Random(0), two_words) is None


def test_bars_are_located_by_their_colour():
    for example in examples(make_locate, chart_scene, 30):
        ((label, _),) = parse(example.answer)
        assert label.split()[1] == "bar" and members(example.scenes[0], label) == about(example)


def test_locate_in_chinese_means_one_object():
    labels = set()
    for example in examples(make_locate_zh, number=400):
        (scene,) = example.scenes
        ((label, (box,)),) = parse(example.answer)
        words = " ".join(CHINESE[word] for word in label.split("的"))
        (item,) = members(scene, words)
        assert about(example) == [item] and box == quantize_box(item.box, scene.size)
        assert label in example.question and not re.search("[A-Za-z]{4}", re.sub("<.*?>", "", example.question))
        assert not is_doubtful(scene, words)
        labels |= set(label.split("的"))
    assert labels == set(CHINESE)


def test_locate_all_gives_every_box_in_reading_order():
    numbers = set()
    for example in examples(make_locate_all):
        (scene,) = example.scenes
        ((label, boxes),) = parse(example.answer)
        items = members(scene, label)
        assert Counter(example.boxes) == Counter(item.box for item in items)
        assert boxes == [quantize_box(box, scene.size) for box in example.boxes]
        assert_reading_order(scene, about(example))
        assert label in example.question or plural(label) in example.question
        assert not is_doubtful(scene, label)
        numbers.add(len(items))
    assert {1, 2, 3} <= numbers


def test_count_agrees_with_the_scene():
    kinds = set()
    for example in examples(make_count, number=400):
        (scene,) = example.scenes
        asked = re.match(r"(?:How many|Count the) (.*?)(?: are| can| do| in|\.)", example.question)[1]
        *color, noun = asked.split()
        items = members(scene, " ".join([*color, NOUNS[noun]]))
        (piece,) = example.pieces
        assert piece.how == "count" and int(example.answer) == len(items), example.question
        assert Counter(map(id, seen(example, piece))) == Counter(map(id, items)) and example.boxes == ()
        assert not is_doubtful(scene, asked)
        kinds.add((len(color), noun in ("objects", "shapes"), bool(items)))
    # Shapes, colours, both, and everything; there and not there.
    assert kinds >= {(0, False, True), (1, True, True), (1, False, True), (0, True, True), (0, False, False)}


def test_count_of_a_wanted_number():
    for seed in range(50):
        rng = random.Random(seed)
        scene = counting_scene(rng, 3, max_side_fraction=0.2)
        assert make_count(rng, scene, 3).answer == "3"
        assert make_count(rng, scene, 40) is None
    numbers = Counter(len(counting_scene(random.Random(seed), size=(300, 300)).objects) for seed in range(200))
    assert max(numbers) <= MAX_COUNT + 3 and set(range(1, MAX_COUNT + 3)) <= set(numbers)


@pytest.mark.parametrize(("make", "asked", "answered"), [(make_color, "name", "color"), (make_shape, "color", "name")])
def test_color_and_shape_mean_the_only_object(make, asked, answered):
    for example in examples(make):
        (scene,) = example.scenes
        (item,) = about(example)
        assert getattr(item, asked) in example.question
        assert example.answer == getattr(item, answered) and example.boxes == ()
        assert [other for other in scene.shapes if getattr(other, asked) == getattr(item, asked)] == [item]
        assert not (asked == "color" and item.color == "black" and scene.texts)


def test_describe_lists_everything_from_top_to_bottom():
    items = (shape_at("red", "star", 100, 60), text_at("number", "42", 0, 5), shape_at("blue", "cross", 50, 60))
    example = make_describe(random.Random(0), scene_of(*items))
    # What a text says is for reading; here it is a word or a number.
    assert example.answer == (
        "<|ref|>number<|/ref|><|det|>[[0, 50, 150, 150]]<|/det|>, "
        "<|ref|>blue cross<|/ref|><|det|>[[250, 599, 350, 799]]<|/det|>, "
        "<|ref|>red star<|/ref|><|det|>[[500, 599, 599, 799]]<|/det|>"
    )
    assert make_describe(random.Random(0), scene_of()) is None
    for example in examples(make_describe):
        (scene,) = example.scenes
        assert Counter(label for label, _ in parse(example.answer)) == Counter(
            item.kind if item.is_text else f"{item.color} {item.name}" for item in scene.objects
        )
        assert [box for _, (box,) in parse(example.answer)] == [quantize_box(box, scene.size) for box in example.boxes]
        assert Counter(example.boxes) == Counter(item.box for item in scene.objects)


def test_parts_say_in_which_ninth_each_object_is():
    places = set()
    for example in examples(make_parts):
        (scene,) = example.scenes
        assert not scene.texts
        parts = re.findall(r"(Top|Middle|Bottom) (left|center|right): a (\w+) (\w+)\.", example.answer)
        assert " ".join(f"{row} {column}: a {color} {name}." for row, column, color, name in parts) == example.answer
        for (row, column, color, name), item in zip(parts, about(example), strict=True):
            assert (color, name) == (item.color, item.name)
            x, y = item.center
            is_left, is_right = 3 * x < scene.width, 3 * x >= 2 * scene.width
            is_top, is_bottom = 3 * y < scene.height, 3 * y >= 2 * scene.height
            assert (column == "left", column == "right") == (is_left, is_right)
            assert (row == "Top", row == "Bottom") == (is_top, is_bottom)
            places.add((row, column))
        assert len(parts) == len(scene.objects)
        assert_reading_order(scene, about(example))
    assert len(places) == 9
    assert place_in_words((0.0, 0.0), (90, 60)) == "Top left"
    assert place_in_words((45.0, 59.0), (90, 60)) == "Bottom center"
    assert place_in_words((90.0, 30.0), (90, 60)) == "Middle right"
    for items in ((), (text_at("word", "CAT", 0, 0), shape_at("red", "star", 50, 0))):
        assert make_parts(random.Random(0), scene_of(*items)) is None
    assert make_parts(random.Random(0), chart_scene(random.Random(0))) is None


def test_read_gives_the_only_text_of_its_kind():
    kinds, has_other = set(), set()
    for example in examples(make_read, lambda rng: reading_scene(rng, rng.choice(("word", "number")))):
        (scene,) = example.scenes
        (item,) = about(example)
        assert [other for other in scene.objects if other.kind == item.kind] == [item]
        assert example.answer == item.name and example.task == item.kind and example.boxes == ()
        others = {"word", "number"} - {item.kind}
        assert item.kind in example.question or len(scene.texts) == 1
        assert not any(other in example.question for other in others)
        kinds.add(item.kind)
        has_other.add((len(scene.texts), item.kind in example.question))
    assert kinds == {"word", "number"} and has_other == {(1, True), (1, False), (2, True)}
    two = scene_of(text_at("word", "CAT", 0, 0), text_at("word", "DOG", 50, 0), text_at("number", "7", 100, 0))
    assert {make_read(random.Random(seed), two).answer for seed in range(20)} == {"7"}
    assert make_read(random.Random(0), two, "word") is None and make_read(random.Random(0), scene_of()) is None


def test_read_all_gives_every_text_line_by_line():
    for example in examples(make_read_all, text_scene):
        (scene,) = example.scenes
        lines = example.answer.split("\n")
        assert Counter(lines) == Counter(item.name for item in scene.texts)
        assert_reading_order(scene, about(example))
        assert [item.name for item in about(example)] == lines
    assert make_read_all(random.Random(0), scene_of(shape_at("red", "star", 0, 0))) is None


def test_table_cells_are_found_by_row_and_column():
    """The cell is looked for in the picture: level with the name of its row, below the letter of its column."""
    for example in examples(make_table, table_scene):
        (scene,) = example.scenes
        (row,) = re.findall(r"\b(Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b", example.question)
        (column,) = re.findall(r"column ([A-F])\b", example.question)
        headers = {item.name: item for item in scene.objects if item.kind == "word"}
        level, below = headers[row.upper()].center[1], headers[column].center[0]
        (found,) = (
            item
            for item in scene.objects
            if item.kind == "number" and abs(item.center[1] - level) < 2 and abs(item.center[0] - below) < 2
        )
        assert example.answer == found.name and about(example) == [found]
    assert make_table(random.Random(0), scene_of(shape_at("red", "star", 0, 0))) is None


def test_bars_are_named_by_colour_or_letter():
    """The value is read from the picture: the part of the axis from 0 to 10 that the bar reaches."""
    named_by = set()
    for example in examples(make_bar, chart_scene):
        (scene,) = example.scenes
        axis = {item.name: item.center[1] for item in scene.objects if item.kind == "number"}
        letter = re.search(r"\bbar ([A-F])\b", example.question)
        if letter:
            (below,) = (item for item in scene.objects if item.kind == "word" and item.name == letter[1])
            (bar,) = (bar for bar in scene.bars if bar.box[0] < below.center[0] < bar.box[2])
        else:
            (bar,) = (bar for bar in scene.bars if f"the {bar.color} bar" in example.question)
        assert round(10 * (axis["0"] - bar.box[1]) / (axis["0"] - axis["10"])) == int(example.answer)
        # The bar and its letter, which is told the value as well.
        assert [item.kind for item in about(example)] == ["bar", "word"] and about(example)[0] is bar
        assert about(example)[1].center[0] == pytest.approx(bar.center[0], abs=1.01)
        named_by.add(bool(letter))
    assert named_by == {True, False}
    assert make_bar(random.Random(0), scene_of(shape_at("red", "star", 0, 0))) is None


def test_ground_takes_the_only_thing_that_meets_the_wish():
    wishes = set()
    for example in examples(make_ground, number=300):
        (scene,) = example.scenes
        ((label, (box,)),) = parse(example.answer)
        found = [name for words, name in WISHED.items() if words in example.question]
        (wish,) = found or [word for word in re.findall("[a-z]+", example.question) if word in COLOR_NAMES]
        (item,) = members(scene, wish)
        assert label == f"{item.color} {item.name}" and box == quantize_box(item.box, scene.size)
        assert example.answer.startswith("Take the <|ref|>") and example.answer.endswith("<|/det|>.")
        assert example.question.startswith("<|grounding|>") and example.boxes == (item.box,)
        assert not is_doubtful(scene, f"{wish} object")
        wishes.add(wish)
    assert wishes == set(CHINESE.values()) - {"object"}


def test_follow_up_is_about_the_object_of_the_first_question():
    kinds = Counter()
    for example in examples(make_follow_up, number=300):
        (scene,), (first,) = example.scenes, example.history
        assert first.scenes == example.scenes and example.turns == (first, example) and not first.history
        (item,) = about(example)
        assert about(first) == [item]
        # What the first question and its answer call it means this object alone.
        names = {"locate": f"{item.color} {item.name}", "color": item.name, "shape": f"{item.color} object"}
        assert names[first.task] in first.question and members(scene, names[first.task]) == [item]
        assert members(scene, f"{item.color} {item.name}") == [item]
        assert re.search(r"\b(it|its)\b", example.question)
        if example.boxes:
            ((label, (box,)),) = parse(example.answer)
            assert members(scene, label) == [item] and box == quantize_box(item.box, scene.size)
            kinds[first.task, "box"] += 1
            continue
        word = "shape" if "shape" in example.question else "color"
        assert example.answer == (item.name if word == "shape" else item.color)
        kinds[first.task, word] += 1
    assert set(kinds) == {("locate", "color"), ("locate", "shape"), ("color", "box"), ("shape", "box")}


MAKERS = {
    random_scene: (
        make_locate,
        make_locate_zh,
        make_locate_all,
        make_count,
        make_color,
        make_shape,
        make_describe,
        make_parts,
        make_ground,
        make_follow_up,
    ),
    text_scene: (make_locate, make_read, make_read_all, make_describe, make_color),
    table_scene: (make_table,),
    chart_scene: (make_bar, make_locate),
}


@pytest.mark.parametrize(("draw", "make"), [(draw, make) for draw, makers in MAKERS.items() for make in makers])
def test_pieces_are_about_what_they_say(draw, make):
    for example in examples(make, draw, 40):
        (scene,) = example.scenes
        assert "".join(piece.text for piece in example.pieces) == example.answer
        coordinates = []
        for piece in example.pieces:
            assert isinstance(piece, Piece) and piece.text
            items = seen(example, piece)
            assert is_of(scene, items)
            if piece.how == "count":
                assert piece.text == str(len(items))
            elif piece.how == "letters":
                assert [item.name for item in items] == [piece.text]
            elif piece.text.isdigit() and example.boxes:
                coordinates.append((items, int(piece.text)))
            elif re.search("[a-z]{3}", piece.text) and not piece.text.startswith(("<", "Take", "]")):
                # A label; that of a question is known and need not be told, that of an answer is.
                assert all(set(piece.text.split()) & {item.color, item.name, item.kind} for item in items) or (
                    make is make_parts
                )
                assert items or example.task in ("locate", "locate_zh", "locate_all")
        assert len(coordinates) == 4 * len(example.boxes)
        for number, (items, value) in enumerate(coordinates):
            (item,) = items
            assert item.box == example.boxes[number // 4]
            assert quantize_box(item.box, scene.size)[number % 4] == value


def test_equal_objects_are_told_apart():
    """Twins are equal in all but their place in the scene; a target is that place."""
    twin = shape_at("red", "star", 0, 0)
    copy = shape_at("red", "star", 0, 0)
    assert twin == copy
    assert [find(scene_of(twin, copy), item, 2) for item in (twin, copy)] == [Target(2, 0), Target(2, 1)]


def test_boxes_become_integers_up_to_999():
    assert quantize_box((0.0, 0.0, 640.0, 480.0), (640, 480)) == (0, 0, 999, 999)
    assert quantize_box((64.0, 120.0, 320.0, 240.0), (640, 480)) == (100, 250, 500, 500)
    assert quantize_box((-5.0, 0.0, 700.0, 480.0), (640, 480)) == (0, 0, 999, 999)
    items = (shape_at("red", "star", 0.0, 0.0, 5.0), shape_at("red", "star", 5.0, 0.0, 5.0))
    two = format_grounding("star", items, scene_of(*items, size=(10, 10)))
    assert two == "<|ref|>star<|/ref|><|det|>[[0, 0, 500, 500], [500, 0, 999, 500]]<|/det|>"


def test_streams_of_splits_differ():
    assert split_rng("train", 3).random() == split_rng("train", 3).random()
    drawn = {split_rng(split, index).random() for split in ("train", "eval", "train-views") for index in range(50)}
    assert len(drawn) == 150


def test_all_phrases_hold_every_word():
    """The tokenizer learns its words from them."""
    known = set(re.findall("[a-z]+", " ".join(all_phrases()).lower())) | {day.lower() for day in ROW_NAMES}
    for draw, makers in MAKERS.items():
        for make in makers:
            for example in examples(make, draw, 25):
                for turn in example.turns:
                    text = re.sub(r"<\|.*?\|>|\b[A-Z]{2,}\b", " ", f"{turn.question} {turn.answer}")
                    assert set(re.findall("[a-z]{2,}", text.lower())) <= known
