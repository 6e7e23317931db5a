"""The pictures that nano learns from: what a scene says is what is painted."""

import itertools
import random
from dataclasses import replace

import pytest
from PIL import Image, ImageChops

from deepseek_vl2.nano.scenes import (
    COLOR_JITTER,
    COLORS,
    HELD_OUT_WORDS,
    LARGE_SIZES,
    LETTERS,
    MARK_RGB,
    SHAPE_NAMES,
    TEXT_RGB,
    TRAIN_WORDS,
    WORDS,
    Background,
    Line,
    ObjectPlan,
    Scene,
    SceneObject,
    mark_object,
    place_objects,
    random_background,
    random_number,
    random_scene,
    random_size,
    random_word,
    small_scene,
    text_extent,
)

WHITE = Background("plain", (255, 255, 255), (255, 255, 255), True, 8)


def ink_box(picture: Image.Image, threshold: int = 24) -> tuple[int, int, int, int] | None:
    """Where a picture differs clearly from white."""
    difference = ImageChops.invert(picture).split()
    strongest = ImageChops.lighter(ImageChops.lighter(difference[0], difference[1]), difference[2])
    return strongest.point(lambda value: 255 if value > threshold else 0).getbbox()


def test_same_seed_paints_same_pixels():
    first, second = (random_scene(random.Random("a:7")) for _ in range(2))
    assert first == second
    assert first.draw().tobytes() == second.draw().tobytes()
    assert first.draw().size == first.size
    assert random_scene(random.Random("a:8")) != first


@pytest.mark.parametrize("size", [(112, 112), (224, 160), (330, 352), (448, 224)])
def test_box_is_tight_around_the_ink(size):
    """Off by a pixel at most: a star's or triangle's tip can be fainter than the rest."""
    seen = set()
    for seed in range(40):
        scene = random_scene(random.Random(seed), size=size, text_probability=0.5)
        for item in scene.objects:
            alone = replace(scene, background=WHITE, objects=(item,))
            found = ink_box(alone.draw())
            assert found == pytest.approx(item.box, abs=1.01), item
            # Nothing at all beyond the box.
            x1, y1, x2, y2 = ink_box(alone.draw(), threshold=0)
            assert x1 >= item.box[0] and y1 >= item.box[1] and x2 <= item.box[2] and y2 <= item.box[3]
            seen.add(item.name if item.kind == "shape" else item.kind)
    assert seen == {*SHAPE_NAMES, "word", "number"}


def test_shape_has_its_colour_in_the_middle():
    for name, color in itertools.product(SHAPE_NAMES, COLORS):
        item = SceneObject("shape", name, color, (20.0, 30.0, 60.0, 68.0), COLORS[color], 5.0)
        picture = Scene(100, 100, WHITE, (item,)).draw()
        assert picture.getpixel((40, 50)) == COLORS[color]


@pytest.mark.parametrize(("kind", "name"), [("shape", "square"), ("bar", "7")])
def test_square_and_bar_fill_their_box_exactly(kind, name):
    item = SceneObject(kind, name, "red", (10.0, 20.0, 40.0, 44.0), (200, 0, 0))
    for side in (100, 400):
        picture = Scene(side, side, WHITE, (item,)).draw()
        assert picture.getcolors(9) is not None
        assert sum(count for count, rgb in picture.getcolors(9) if rgb == (200, 0, 0)) == 30 * 24


@pytest.mark.parametrize("side", [100, 400])
def test_lines_lie_under_the_objects(side):
    item = SceneObject("shape", "square", "red", (10.0, 20.0, 40.0, 44.0), (200, 0, 0))
    line = Line((5.0, 30.0, 60.0, 32.0), (0, 0, 200))
    picture = Scene(side, side, WHITE, (item,), (line,)).draw()
    blue = {(x, y) for x in range(side) for y in range(side) if picture.getpixel((x, y)) == line.rgb}
    assert blue == {(x, y) for x in (*range(5, 10), *range(40, 60)) for y in (30, 31)}


@pytest.mark.parametrize("size", [(112, 112), (224, 160), (640, 480)])
def test_mark_is_a_red_frame_around_its_object_alone(size):
    for seed in range(12):
        plain = random_scene(random.Random(seed), size=size, num_objects=(1, 1), text_probability=0)
        picture, marked = (scene.draw() for scene in (plain, mark_object(random.Random(seed), plain)))
        changed = ImageChops.difference(picture, marked).convert("L").point(lambda value: 255 if value else 0)
        x1, y1, x2, y2 = (int(value) for value in plain.objects[0].box)
        # Nothing of the object is painted over, and there is ground between the two.
        assert changed.crop((x1 - 1, y1 - 1, x2 + 1, y2 + 1)).getbbox() is None
        margin = 2 * max(2, round(min(size) / 80))
        frame = (max(0, x1 - margin), max(0, y1 - margin), min(size[0], x2 + margin), min(size[1], y2 + margin))
        assert changed.getbbox() == pytest.approx(frame, abs=1)
        middle = ((x1 + x2) // 2, (y1 + y2) // 2)
        if y1 >= margin:
            assert marked.getpixel((middle[0], y1 - margin + 1)) == MARK_RGB
        if x1 >= margin:
            assert marked.getpixel((x1 - margin + 1, middle[1])) == MARK_RGB


def test_only_shapes_are_marked():
    marked = set()
    for seed in range(60):
        scene = random_scene(random.Random(seed), text_probability=0.8, num_objects=(2, 4))
        found = mark_object(random.Random(seed), scene)
        if scene.shapes:
            assert scene.objects[found.marked].kind == "shape"
            assert replace(found, marked=None) == scene
            marked.add(found.marked)
    assert len(marked) > 2
    words = Scene(50, 50, WHITE, (SceneObject("word", "CAT", "dark", (5.0, 5.0, 40.0, 20.0), TEXT_RGB),))
    assert mark_object(random.Random(0), words) == words


def test_letters_are_where_their_ink_is():
    """Words whose letters do not touch: the runs of columns with ink are the letters."""
    num_compared = 0
    for word in (*WORDS, "2", "47", "380", "9256"):
        width, height = text_extent(word, 60, 600)
        item = SceneObject("word", word, "dark", (20.0, 10.0, 20.0 + width, 10.0 + height), (0, 0, 0))
        picture = Scene(width + 40, 400, WHITE, (item,)).draw().convert("L")
        columns = picture.point(lambda value: 255 if value < 128 else 0).resize((width + 40, 1), Image.Resampling.BOX)
        has_ink = [columns.getpixel((x, 0)) > 0 for x in range(width + 40)]
        edges = [x for x in range(1, width + 40) if has_ink[x] != has_ink[x - 1]]
        if len(edges) != 2 * len(word):
            continue
        num_compared += 1
        middles = [(start + end) / 2 for start, end in zip(edges[::2], edges[1::2], strict=True)]
        centers = item.letter_centers()
        assert [x for x, _ in centers] == pytest.approx(middles, abs=0.12 * height)
        assert {y for _, y in centers} == {10 + height / 2}
    assert num_compared > 60


def test_held_out_words_are_printed_on_request_only():
    assert set(HELD_OUT_WORDS) | set(TRAIN_WORDS) == set(WORDS)
    assert not set(HELD_OUT_WORDS) & set(TRAIN_WORDS)
    assert len(HELD_OUT_WORDS) == pytest.approx(len(WORDS) / 5, abs=1)
    drawn = [random_word(random.Random(seed)) for seed in range(3000)]
    assert not set(drawn) & set(HELD_OUT_WORDS)
    assert 0.4 < sum(word in TRAIN_WORDS for word in drawn) / 3000 < 0.6
    assert {len(word) for word in drawn} == {3, 4, 5, 6} and all(word.isupper() for word in drawn)
    assert {random_word(random.Random(seed), ["DOG", "COW"]) for seed in range(20)} == {"DOG", "COW"}
    for seed in range(40):
        scene = random_scene(random.Random(seed), text_probability=1, words=HELD_OUT_WORDS)
        assert all(item.name in HELD_OUT_WORDS for item in scene.texts if item.kind == "word")


def test_letters_that_are_told_apart_worst_are_printed_most():
    drawn = [random_word(random.Random(seed)) for seed in range(3000)]
    letters = "".join(word for word in drawn if word not in TRAIN_WORDS)
    counts = {letter: letters.count(letter) for letter in LETTERS}
    assert counts["I"] == max(counts.values()) == pytest.approx(5 * counts["A"], rel=0.3)
    assert min(counts.values()) > 0


def test_letters_that_make_no_word_make_no_held_out_one(monkeypatch):
    """Of two-letter words over a small alphabet half are held out: chance would print them soon."""
    held_out = ("AB", "BA")
    for name, value in {"LETTERS": "AB", "WORD_LENGTHS": (2,), "HELD_OUT_WORDS": held_out}.items():
        monkeypatch.setattr(f"deepseek_vl2.nano.scenes.{name}", value)
    drawn = {random_word(random.Random(seed)) for seed in range(200)}
    assert drawn - set(TRAIN_WORDS) == {"AA", "BB"}


def test_numbers_have_one_to_four_digits():
    numbers = [random_number(random.Random(seed)) for seed in range(400)]
    assert {len(number) for number in numbers} == {1, 2, 3, 4}
    assert all(str(int(number)) == number for number in numbers)


def test_small_scenes():
    """Also rounded to pixels, no side is above a twelfth of the picture's shorter side."""
    sizes = set()
    for seed in range(300):
        scene = small_scene(random.Random(seed))
        sizes.add(scene.size)
        assert 1 <= len(scene.objects) <= 6 and not scene.texts
        for item in scene.objects:
            width, height = item.box[2] - item.box[0], item.box[3] - item.box[1]
            assert 12 * max(width, height) <= min(scene.size)
            assert 24 * min(width, height) > min(scene.size)
    assert sizes == set(LARGE_SIZES)
    assert small_scene(random.Random(0), size=(224, 224), num_objects=(3, 3)).size == (224, 224)


def test_objects_stay_inside_and_apart():
    for seed in range(200):
        scene = random_scene(random.Random(seed), num_objects=(4, 8))
        gap = 0.02 * min(scene.size)
        for item in scene.objects:
            x1, y1, x2, y2 = item.box
            assert 0 <= x1 < x2 <= scene.width and 0 <= y1 < y2 <= scene.height
        for first, second in itertools.combinations(scene.objects, 2):
            a, b = first.box, second.box
            assert max(a[0], b[0]) - min(a[2], b[2]) >= gap or max(a[1], b[1]) - min(a[3], b[3]) >= gap


def test_sides_keep_to_the_fractions():
    for seed in range(100):
        scene = random_scene(random.Random(seed), min_side_fraction=0.2, max_side_fraction=0.3, size=(300, 200))
        for item in scene.shapes:
            width, height = item.box[2] - item.box[0], item.box[3] - item.box[1]
            assert 0.2 * 200 - 1 <= (width * height) ** 0.5 <= 0.3 * 200 + 1
            assert 0.75 <= width / height <= 1.33


def test_number_and_kind_of_objects():
    for seed in range(60):
        assert len(random_scene(random.Random(seed), num_objects=(3, 3), max_side_fraction=0.2).objects) == 3
        assert not random_scene(random.Random(seed), text_probability=0).texts
        assert random_scene(random.Random(seed), text_probability=1).texts
        pairs = [item.description for item in random_scene(random.Random(seed), unique=True, text_probability=0).shapes]
        assert len(set(pairs)) == len(pairs)
        only = random_scene(random.Random(seed), shapes=["star"], colors=["red", "blue"], text_probability=0)
        assert {item.description for item in only.objects} <= {"red star", "blue star"}


def test_crowded_scene_ends_and_leaves_objects_out():
    scene = random_scene(random.Random(1), size=(112, 112), num_objects=(80, 80))
    assert 3 < len(scene.objects) < 80


def test_first_object_always_fits():
    for word in WORDS:
        for size in ((60, 120), (112, 112), (640, 320)):
            plan = ObjectPlan("word", word, "dark")
            (item,) = place_objects(random.Random(word), [plan], size, min_side_fraction=0.4, max_side_fraction=0.9)
            assert item.box[2] <= size[0] and item.box[3] <= size[1]


def test_sizes():
    sizes = [random_size(random.Random(seed)) for seed in range(500)]
    assert all(max(size) <= 2.02 * min(size) and min(size) >= 100 and max(size) <= 672 for size in sizes)
    assert {(112, 112), (224, 224), (320, 240), (240, 320), (448, 224), (224, 448), (640, 480)} <= set(sizes)


def test_colours_stay_apart():
    """Jitter moves a channel of both colours by COLOR_JITTER at most, so a gap of more than twice that stays open."""
    for first, second in itertools.combinations(COLORS.values(), 2):
        assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 4 * COLOR_JITTER
    for seed in range(300):
        ground = random_background(random.Random(seed))
        lowest = min(*ground.first, *ground.second)
        assert lowest >= 200
        # Every colour has a channel far below any ground's.
        assert all(min(rgb) + COLOR_JITTER < lowest - 100 for rgb in COLORS.values())


@pytest.mark.parametrize("style", ["plain", "gradient", "stripes"])
@pytest.mark.parametrize("is_vertical", [True, False])
def test_backgrounds(style, is_vertical):
    ground = Background(style, (250, 250, 250), (230, 235, 240), is_vertical, 10)
    picture = Scene(60, 40, ground, ()).draw()
    across = {picture.getpixel((x, 3)) for x in range(60)}
    down = {picture.getpixel((3, y)) for y in range(40)}
    varying, constant = (down, across) if is_vertical else (across, down)
    assert len(constant) == 1
    assert (len(varying) == 1) == (style == "plain")


def test_descriptions():
    box = (0.0, 0.0, 1.0, 1.0)
    assert SceneObject("shape", "circle", "red", box, (0, 0, 0)).description == "red circle"
    assert SceneObject("word", "CAT", "dark", box, (0, 0, 0)).description == "word CAT"
    assert SceneObject("number", "42", "dark", box, (0, 0, 0)).description == "number 42"
    assert SceneObject("bar", "7", "blue", box, (0, 0, 0)).description == "blue bar"
    assert all(word.isupper() and 3 <= len(word) <= 6 for word in WORDS) and len(set(WORDS)) == len(WORDS) >= 180


def test_kinds_of_objects():
    box = (0.0, 0.0, 1.0, 1.0)
    kinds = ("shape", "word", "number", "bar")
    scene = Scene(9, 9, WHITE, tuple(SceneObject(kind, "1", "red", box, (0, 0, 0)) for kind in kinds))
    assert [item.kind for item in scene.shapes] == ["shape"]
    assert [item.kind for item in scene.texts] == ["word", "number"]
    assert [item.kind for item in scene.bars] == ["bar"]
    assert [item.is_text for item in scene.objects] == [False, True, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_objects": (3, 2)}, r"\(3, 2\)"),
        ({"num_objects": (-1, 2)}, r"\(-1, 2\)"),
        ({"min_side_fraction": 0.5, "max_side_fraction": 0.4}, "0.5 and 0.4"),
        ({"min_side_fraction": 0.0}, "0.0"),
        ({"max_side_fraction": 1.5}, "1.5"),
        ({"shapes": ["hexagon"]}, "hexagon"),
        ({"colors": ["mauve"]}, "mauve"),
        ({"shapes": []}, "shapes"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_scene(random.Random(0), **arguments)


def test_unknown_shape_is_refused():
    item = SceneObject("shape", "hexagon", "red", (0.0, 0.0, 9.0, 9.0), (200, 0, 0))
    with pytest.raises(ValueError, match="hexagon"):
        Scene(20, 20, WHITE, (item,)).draw()
