"""The pictures that nano learns from: what a scene says is what is painted."""

import itertools
import random
from dataclasses import replace

import pytest
from PIL import Image, ImageChops

from deepseek_vl2.nano.scenes import (
    COLOR_JITTER,
    COLORS,
    SHAPE_NAMES,
    WORDS,
    Background,
    ObjectPlan,
    Scene,
    SceneObject,
    place_objects,
    random_background,
    random_scene,
    random_size,
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


def test_square_fills_its_box_exactly():
    item = SceneObject("shape", "square", "red", (10.0, 20.0, 40.0, 44.0), (200, 0, 0))
    for side in (100, 400):
        picture = Scene(side, side, WHITE, (item,)).draw()
        assert picture.getcolors(9) is not None
        assert sum(count for count, rgb in picture.getcolors(9) if rgb == (200, 0, 0)) == 30 * 24


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
    assert all(word.isupper() and 3 <= len(word) <= 6 for word in WORDS) and len(set(WORDS)) >= 60


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
