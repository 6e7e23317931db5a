"""Texts, tables and charts: order is where the names say, and bars are as high as their values."""

import itertools
import random
from collections import Counter

import pytest

from deepseek_vl2.nano.layouts import (
    AXIS_LABELS,
    COLUMN_NAMES,
    LINE_RGB,
    MAX_BAR,
    ROW_NAMES,
    chart_scene,
    page_scene,
    reading_scene,
    table_cells,
    table_scene,
    text_scene,
)
from deepseek_vl2.nano.scenes import HELD_OUT_WORDS, TRAIN_WORDS, Background, Scene, SceneObject

NUM_SCENES = 60


def scenes(draw, *args, number=NUM_SCENES, **kwargs):
    return [draw(random.Random(seed), *args, **kwargs) for seed in range(number)]


def overlap(first, second):
    """Whether two boxes share area."""
    return max(first[0], second[0]) < min(first[2], second[2]) and max(first[1], second[1]) < min(first[3], second[3])


@pytest.mark.parametrize(
    "draw",
    [text_scene, table_scene, chart_scene, page_scene, lambda rng: reading_scene(rng, "word")],
    ids=["text", "table", "chart", "page", "word"],
)
def test_scenes_repeat_and_objects_stay_inside_and_apart(draw):
    found = scenes(draw)
    assert found[:10] == scenes(draw, number=10)
    assert len(set(found)) == NUM_SCENES
    for scene in found:
        for item in scene.objects:
            x1, y1, x2, y2 = item.box
            assert 0 <= x1 < x2 <= scene.width and 0 <= y1 < y2 <= scene.height, item
        for first, second in itertools.combinations(scene.objects, 2):
            assert not overlap(first.box, second.box), (first, second)
        assert scene.draw().size == scene.size


def test_text_scenes():
    found = scenes(text_scene, size=(400, 300))
    assert {len(scene.texts) for scene in found} == {2, 3, 4, 5}
    assert {len(scene.shapes) for scene in found} == {0, 1}
    assert {item.kind for scene in found for item in scene.texts} == {"word", "number"}
    assert {scene.size for scene in found} == {(400, 300)}
    held_out = scenes(text_scene, num_texts=(2, 2), words=HELD_OUT_WORDS)
    assert max(len(scene.texts) for scene in held_out) == 2
    printed = {item.name for scene in held_out for item in scene.texts if item.kind == "word"}
    assert len(printed) > 10 and printed <= set(HELD_OUT_WORDS)


def test_pages_are_full_of_text():
    found = scenes(page_scene, size=(112, 112))
    assert all(scene.texts == scene.objects for scene in found)
    heights = [max((item.box[3] - item.box[1] for item in scene.objects), default=0) for scene in found]
    assert min(heights) < 14.5 and max(heights) > 24
    assert max(sum(len(item.name) for item in scene.objects) for scene in found) > 20


@pytest.mark.parametrize(("kind", "other"), [("word", "number"), ("number", "word")])
def test_reading_scenes_have_one_text_of_a_kind(kind, other):
    counts = Counter()
    for scene in scenes(reading_scene, kind, words=TRAIN_WORDS):
        kinds = Counter(item.kind for item in scene.objects)
        assert kinds[kind] == 1 and kinds[other] <= 1 and kinds["shape"] <= 3 and not kinds["bar"]
        assert all(item.name in TRAIN_WORDS for item in scene.texts if item.kind == "word")
        counts[kinds[other] > 0, kinds["shape"]] += 1
    assert {has_other for has_other, _ in counts} == {True, False}
    assert {num_shapes for _, num_shapes in counts} == {0, 1, 2, 3}


def test_tables_are_grids_of_numbers():
    shapes = set()
    for scene in scenes(table_scene):
        cells = table_cells(scene)
        headers = [item for item in scene.objects if not any(item is cell for cell in cells)]
        rows = [item.name for item in headers if item.row]
        columns = [item.name for item in headers if item.column]
        assert rows == [item.row for item in headers if item.row] and len(set(rows)) == len(rows)
        assert columns == list(COLUMN_NAMES[: len(columns)]) and set(rows) <= set(ROW_NAMES)
        assert len(rows) + len(columns) == len(headers)
        assert {item.kind for item in headers} == {"word"} and {item.kind for item in cells} == {"number"}
        assert Counter((item.row, item.column) for item in cells) == Counter(itertools.product(rows, columns))
        assert all(0 <= int(item.name) < 100 for item in cells)
        shapes.add((len(rows), len(columns)))
    assert shapes == set(itertools.product((2, 3, 4), (2, 3)))
    assert table_cells(text_scene(random.Random(0))) == []


def test_rows_and_columns_of_tables_are_level_and_parted_by_lines():
    for scene in scenes(table_scene):
        horizontal = [line.box for line in scene.lines if line.box[2] - line.box[0] > line.box[3] - line.box[1]]
        vertical = [line.box for line in scene.lines if line.box[2] - line.box[0] < line.box[3] - line.box[1]]
        assert len(horizontal) + len(vertical) == len(scene.lines)
        for first, second in itertools.permutations(scene.objects, 2):
            between_rows = [y1 for _, y1, _, y2 in horizontal if first.box[3] <= y1 and y2 <= second.box[1]]
            between_columns = [x1 for x1, _, x2, _ in vertical if first.box[2] <= x1 and x2 <= second.box[0]]
            if first.row == second.row:
                assert first.center[1] == pytest.approx(second.center[1], abs=1.01) and not between_rows
            elif first.center[1] < second.center[1]:
                assert between_rows
            if first.column == second.column:
                assert first.center[0] == pytest.approx(second.center[0], abs=1.01) and not between_columns
            elif first.center[0] < second.center[0]:
                assert between_columns
        for item in scene.objects:
            assert not any(overlap(item.box, line.box) for line in scene.lines), item


def test_bars_are_as_high_as_their_values():
    """Read as a person does, from the numbers at the axis."""
    values, numbers_of_bars = set(), set()
    for scene in scenes(chart_scene):
        axis = {item.name: item.center[1] for item in scene.objects if item.kind == "number"}
        assert sorted(axis, key=int) == [str(value) for value in AXIS_LABELS]
        unit = (axis["0"] - axis["10"]) / 10
        for bar in scene.bars:
            assert (axis["0"] - bar.box[1]) / unit == pytest.approx(int(bar.name), abs=1.6 / unit)
            assert bar.box[3] == pytest.approx(axis["0"], abs=1.6)
            values.add(int(bar.name))
        numbers_of_bars.add(len(scene.bars))
        assert len({bar.color for bar in scene.bars}) == len(scene.bars)
        # One step for each value, darker at the numbers, and the axis itself.
        steps = sorted(line.box[1] for line in scene.lines if line.box[2] - line.box[0] > scene.width / 2)
        assert steps == pytest.approx([axis["10"] + unit * number for number in range(MAX_BAR + 1)], abs=1.6)
        assert sum(line.rgb == LINE_RGB for line in scene.lines) == len(AXIS_LABELS) + 1
    assert values == set(range(1, MAX_BAR + 1)) and numbers_of_bars == {2, 3, 4, 5}


def test_bars_are_lettered_from_left_to_right():
    for scene in scenes(chart_scene):
        letters = [item for item in scene.objects if item.kind == "word"]
        assert [item.name for item in letters] == list(COLUMN_NAMES[: len(scene.bars)])
        assert [item.column for item in letters] == [item.column for item in scene.bars] == [i.name for i in letters]
        for bar, letter in zip(scene.bars, letters, strict=True):
            assert bar.center[0] == pytest.approx(letter.center[0], abs=1.01)
            assert letter.box[1] >= bar.box[3]
        middles = [bar.center[0] for bar in scene.bars]
        assert middles == sorted(middles)


def test_a_painted_chart_shows_its_bars():
    """Counted in pixels of each bar's colour: nothing lies over a bar, and no line is hidden elsewhere."""
    for scene in scenes(chart_scene, number=10):
        picture = scene.draw()
        for bar in scene.bars:
            box = tuple(int(value) for value in bar.box)
            inner = picture.crop(box)
            assert inner.getcolors(inner.width * inner.height) == [(inner.width * inner.height, bar.rgb)]


def test_sizes_of_tables_and_charts_are_not_too_long():
    for draw in (table_scene, chart_scene):
        assert all(max(scene.size) <= 1.5 * min(scene.size) for scene in scenes(draw))
        assert draw(random.Random(0), size=(224, 448)).size == (224, 448)


def test_table_cells_are_numbers_with_row_and_column():
    box = (0.0, 0.0, 1.0, 1.0)
    ground = Background("plain", (255, 255, 255), (255, 255, 255), True, 8)
    items = tuple(
        SceneObject("number", "7", "dark", box, (0, 0, 0), 0.0, row, column)
        for row, column in (("", ""), ("MON", ""), ("", "A"), ("MON", "A"))
    )
    assert table_cells(Scene(9, 9, ground, items)) == [items[3]]
