"""What each image token should see: by hand on simple scenes, and by painting objects and looking for them in views."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from deepseek_vl2.models.tiling import TileGrid, letterbox
from deepseek_vl2.nano.architecture import nano_processor
from deepseek_vl2.nano.drawing import LARGER_GRIDS, ONE_TILE, draw_scene
from deepseek_vl2.nano.layouts import COLUMN_NAMES, ROW_NAMES, chart_scene, table_cells, table_scene, text_scene
from deepseek_vl2.nano.questions import split_rng
from deepseek_vl2.nano.scenes import COLOR_NAMES, LETTERS, SHAPE_NAMES, WORDS, Background, Scene, SceneObject
from deepseek_vl2.nano.targets import (
    CELL_CLASSES,
    MAX_LETTERS_A_CELL,
    MAX_TEXT_LENGTH,
    MIN_LETTER_PIXELS,
    READABLE_LETTER_PIXELS,
    SIGNS,
    Cells,
    cells_of,
    covering_objects,
    join_cells,
    letter_places,
    letters_of_patches,
    view_rectangles,
)

GROUND = Background("plain", (255, 255, 255), (255, 255, 255), True, 8)
ALL_GRIDS = (ONE_TILE, *LARGER_GRIDS)
TWO_BY_TWO = TileGrid(2, 2)
SIDE = 112


@pytest.fixture(scope="module")
def processor():
    return nano_processor()


def object_at(box, name="square", color="red", kind="shape", **more):
    return SceneObject(kind, name, color, box, (200, 30, 30), **more)


def scene_of(*items, size=(224, 224), **more):
    return Scene(*size, GROUND, items, **more)


def is_same(first, second):
    pairs = [(getattr(first, field.name), getattr(second, field.name)) for field in fields(Cells)]
    return all(torch.equal(a, b) for a, b in pairs)


def signs(ids):
    """The signs of ids, "" for none."""
    return "".join(SIGNS[number] for number in ids.tolist() if number >= 0)


def test_names():
    assert (*SHAPE_NAMES, "word", "number", "bar") == CELL_CLASSES
    assert len(SIGNS) == len(set(SIGNS)) == 36 and SIGNS.startswith(LETTERS)
    assert max(map(len, WORDS)) <= MAX_TEXT_LENGTH


@pytest.mark.parametrize("size", [(112, 112), (448, 336), (333, 250), (224, 448), (101, 170), (640, 331)])
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_view_rectangles_agree_with_letterboxing(size, columns, rows):
    """A white picture padded with black by PIL shows where it lies in each canvas."""
    rectangles = view_rectangles(*size, columns, rows, side=SIDE)
    assert rectangles.shape == (1 + columns * rows, 4)
    white = Image.new("RGB", size, "white")
    for canvas, first, last in (((SIDE, SIDE), 0, 0), ((SIDE * columns, SIDE * rows), 1, -1)):
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


def test_covering_objects_by_hand():
    star, word = (
        object_at((10.0, 0.0, 60.0, 50.0), "star", "blue"),
        object_at((110.0, 80.0, 140.0, 90.0), "CAT", "dark"),
    )
    found = covering_objects(scene_of(star, word, size=(200, 100)), view_rectangles(200, 100, 2, 1), num_cells=4)
    assert found.shape == (3, 4, 4)
    # The global view shows -50 to 150 downwards, so its cells are 50 x 50 and the picture fills the two middle rows.
    # The word covers 30 x 10 of 2500 pixels there, just above a tenth.
    assert found[0].tolist() == [[-1] * 4, [0, 0, -1, -1], [-1, -1, 1, -1], [-1] * 4]
    # The tiles show 100 x 100 each, in cells of 25 x 25.
    assert found[1].tolist() == [[0, 0, 0, -1], [0, 0, 0, -1], [-1] * 4, [-1] * 4]
    assert found[2].tolist() == [[-1] * 4, [-1] * 4, [-1] * 4, [1, 1, -1, -1]]
    assert (covering_objects(scene_of(), view_rectangles(200, 100, 1, 1), 3) == np.full((2, 3, 3), -1)).all()


def test_covering_objects_agree_with_the_painted_picture():
    """The same cells, found by counting pixels of each object's box."""
    for seed in range(8):
        scene = text_scene(split_rng("test-cover", seed), size=(224, 224))
        found = covering_objects(scene, view_rectangles(224, 224, 2, 2), 4, min_cover=0.15)
        for index, item in enumerate(scene.objects):
            mask = Image.new("L", (224, 224))
            mask.paste(255, tuple(int(value) for value in item.box))
            share = np.asarray(mask).reshape(8, 28, 8, 28).mean(axis=(1, 3)) / 255
            tiles = found[1:].reshape(2, 2, 4, 4).transpose(0, 2, 1, 3).reshape(8, 8)
            assert (share[tiles == index] > 0.15).all()
            # A cell that it covers is its own, or belongs to another object.
            assert (tiles[share > 0.15] >= 0).all() and (tiles[share > 0.5] == index).all()


def test_cells_of_a_known_scene(processor):
    """224x224 fills two by two tiles of 112 pixels; a cell of a tile is 28 pixels, one of the global view 56."""
    red_square = object_at((126.0, 14.0, 182.0, 98.0))
    word = object_at((28.0, 168.0, 84.0, 196.0), "CAT", "dark", "word")
    cells = cells_of(processor, scene_of(red_square, word), TWO_BY_TWO, is_by_view=True)
    s, w, red = CELL_CLASSES.index("square"), CELL_CLASSES.index("word"), COLOR_NAMES.index("red")
    # The square covers 42 and 14 of 56 pixels across, 42 and 42 down.
    assert cells.class_ids[0].tolist() == [[-1, -1, s, s], [-1, -1, s, s], [-1, -1, -1, -1], [w, w, -1, -1]]
    upper_right, lower_left = 2, 3
    columns = [s, s, s, -1]  # covers 14, 28 and 14 of 28 pixels across
    assert cells.class_ids[upper_right].tolist() == [columns, columns, columns, columns]
    assert cells.class_ids[lower_left].tolist() == [[-1] * 4, [-1] * 4, [-1, w, w, -1], [-1] * 4]
    for empty in (1, 4):
        assert (cells.class_ids[empty] == -1).all() and (cells.color_ids[empty] == -1).all()
        assert not cells.boxes[empty].any()
    assert torch.equal(cells.object_ids >= 0, cells.class_ids >= 0)
    assert torch.equal(cells.color_ids == red, cells.class_ids == s)
    assert (cells.color_ids[cells.class_ids != s] == -1).all()  # a word has no colour
    as_parts = torch.tensor(red_square.box) / 224
    torch.testing.assert_close(cells.boxes[0, 0, 2], as_parts)
    in_tile = torch.tensor([14 / 112, 14 / 112, 70 / 112, 98 / 112])
    torch.testing.assert_close(cells.boxes[upper_right, 1, 1], in_tile)
    torch.testing.assert_close(cells.boxes[lower_left, 2, 1], torch.tensor([28 / 112, 56 / 112, 84 / 112, 84 / 112]))
    for name in ("bar_values", "row_ids", "column_ids"):
        assert (getattr(cells, name) == -1).all()
    assert not cells.is_marked.any()


def test_a_box_reaches_beyond_its_tile(processor):
    scene = scene_of(object_at((56.0, 56.0, 168.0, 140.0)))
    cells = cells_of(processor, scene, TWO_BY_TWO, is_by_view=True)
    torch.testing.assert_close(cells.boxes[1, 3, 3], torch.tensor([0.5, 0.5, 1.5, 1.25]))
    torch.testing.assert_close(cells.boxes[4, 0, 0], torch.tensor([-0.5, -0.5, 0.5, 0.25]))


def test_for_answers_boxes_are_parts_of_the_picture_in_all_views(processor):
    items = (object_at((56.0, 56.0, 168.0, 140.0)), object_at((0.0, 200.0, 56.0, 224.0), "star", "blue"))
    cells = cells_of(processor, scene_of(*items), TWO_BY_TWO, is_by_view=False)
    assert set(cells.object_ids.unique().tolist()) == {-1, 0, 1}
    for number, item in enumerate(items):
        is_own = cells.object_ids == number
        assert is_own[0].any() and is_own[1:].any()
        torch.testing.assert_close(cells.boxes[is_own], torch.tensor(item.box).expand(int(is_own.sum()), 4) / 224)


def test_the_middle_of_an_object_is_one_cell_of_the_global_view_and_one_of_the_tiles(processor):
    """224x224 in two by two tiles: cells of tiles are 28 pixels, those of the global view 56."""
    square = object_at((100.0, 20.0, 200.0, 120.0))  # middle 150, 70
    circle = object_at((4.0, 144.0, 24.0, 220.0), "circle")  # middle 14, 182
    cells = cells_of(processor, scene_of(square, circle), TWO_BY_TWO, is_by_view=False)
    centers = [tuple(place) for place in torch.nonzero(cells.is_center).tolist()]
    upper_right, lower_left = 2, 3
    assert centers == [(0, 1, 2), (0, 3, 0), (upper_right, 2, 1), (lower_left, 2, 0)]
    assert cells.object_ids[cells.is_center].tolist() == [0, 1, 0, 1]


def test_a_hidden_object_has_no_middle(processor):
    sliver, neighbour = object_at((0.0, 0.0, 224.0, 2.0)), object_at((0.0, 4.0, 224.0, 112.0), "circle")
    cells = cells_of(processor, scene_of(sliver, neighbour), TWO_BY_TWO, is_by_view=False)
    assert cells.object_ids[cells.is_center].tolist() == [1, 1]


def test_a_mark_is_told_of_all_cells_of_its_object(processor):
    items = (object_at((10.0, 10.0, 90.0, 90.0)), object_at((130.0, 130.0, 200.0, 200.0)))
    for marked in (0, 1):
        cells = cells_of(processor, scene_of(*items, marked=marked), TWO_BY_TWO, is_by_view=False)
        assert torch.equal(cells.is_marked, cells.object_ids == marked)
        assert cells.is_marked[0].any() and cells.is_marked[1:].any()


def test_an_empty_scene_tells_nothing(processor):
    cells = cells_of(processor, scene_of(marked=None), ONE_TILE, is_by_view=False)
    for field in fields(Cells):
        values = getattr(cells, field.name)
        assert (values == {torch.bool: False, torch.float32: 0.0}.get(values.dtype, -1)).all(), field.name
    assert cells.letters.shape == (2, 4, 4, MAX_LETTERS_A_CELL) and cells.first_places.shape == (2, 4, 4)


def test_chosen_and_joined_cells(processor):
    scene = scene_of(
        object_at((56.0, 56.0, 168.0, 140.0)), object_at((10.0, 170.0, 100.0, 200.0), "CAT", "dark", "word")
    )
    cells = cells_of(processor, scene, TWO_BY_TWO, is_by_view=True)
    assert is_same(join_cells([cells.chosen([0, 1]), cells.chosen([2, 3, 4])]), cells)
    assert not is_same(cells.chosen([3, 0]), cells.chosen([0, 3]))


def test_tables_tell_row_and_column(processor):
    """Every cell of the table's numbers knows both; names of rows know theirs, letters of columns theirs."""
    for seed in range(6):
        scene = table_scene(split_rng("test-table", seed), size=(224, 224))
        cells = cells_of(processor, scene, TWO_BY_TWO, is_by_view=False)
        for number, item in enumerate(scene.objects):
            is_own = cells.object_ids == number
            rows, columns = cells.row_ids[is_own], cells.column_ids[is_own]
            assert (rows == (ROW_NAMES.index(item.row) if item.row else -1)).all()
            assert (columns == (COLUMN_NAMES.index(item.column) if item.column else -1)).all()
        assert (cells.row_ids >= 0).any() and (cells.column_ids >= 0).any()
        assert (cells.bar_values == -1).all() and len(table_cells(scene)) > 3
        assert (cells.row_ids[cells.object_ids < 0] == -1).all()


def test_charts_tell_values_of_bars_and_of_their_letters(processor):
    for seed in range(6):
        scene = chart_scene(split_rng("test-chart", seed), size=(224, 224))
        cells = cells_of(processor, scene, TWO_BY_TWO, is_by_view=False)
        values = {bar.column: int(bar.name) for bar in scene.bars}
        seen = set()
        for number, item in enumerate(scene.objects):
            is_own = cells.object_ids == number
            assert (cells.bar_values[is_own] == values.get(item.column, -1)).all()
            if is_own.any():
                seen.add(item.kind)
            expected = COLOR_NAMES.index(item.color) if item.kind == "bar" else -1
            assert (cells.color_ids[is_own] == expected).all()
        assert seen == {"bar", "word", "number"}
        assert torch.equal(cells.class_ids == CELL_CLASSES.index("bar"), cells.color_ids >= 0)


def test_letters_of_patches_by_hand(processor):
    """Letters from 20 to 50, 78 and 104 across, in a lower left tile of patches of 14 pixels."""
    word = object_at((20.0, 170.0, 104.0, 194.0), "CAT", "dark", "word")
    found = letters_of_patches(processor, scene_of(word), TWO_BY_TWO)
    rows = ["".join(SIGNS[number] if number >= 0 else "." for number in row) for row in found.signs[3].tolist()]
    # The tile's first row of pixels is 112 of the picture, so the word lies from 58 to 82: patches 4 and 5.
    assert rows[:4] == ["........"] * 4 and rows[6:] == ["........"] * 2
    assert rows[4] == rows[5] == ".CCCAATT"
    assert found.places[3, 4].tolist() == [-1, 0, 0, 0, 1, 1, 2, 2]
    assert all((of_patches[[1, 2, 4]] == -1).all() for of_patches in found)
    # In the global view letters are 12 pixels high: above the least.
    assert set(found.signs[0].flatten().tolist()) == {-1, *(SIGNS.index(sign) for sign in "CAT")}
    assert set(found.places[0].flatten().tolist()) == {-1, 0, 1, 2}


def test_letters_too_low_to_be_read_are_asked_of_no_patch(processor):
    word = object_at((20.0, 170.0, 90.0, 188.0), "CAT", "dark", "word")  # 18 pixels, 9 in the global view
    found = letters_of_patches(processor, scene_of(word), TWO_BY_TWO)
    for of_patches in found:
        assert (of_patches[0] == -1).all() and (of_patches[3] >= 0).any()


def test_places_are_counted_from_where_a_view_begins(processor):
    """The word reaches from the left tile into the right one, which ends and begins at 112, within the A."""
    word = object_at((70.0, 20.0, 154.0, 44.0), "CAT", "dark", "word")
    found = letters_of_patches(processor, scene_of(word), TWO_BY_TWO)
    # The A's middle, 114, is in the right tile.
    for view, texts in ((1, {("C", 0), ("A", 1)}), (2, {("A", 0), ("T", 1)})):
        is_letter = found.signs[view] >= 0
        signs = [SIGNS[number] for number in found.signs[view][is_letter]]
        assert set(zip(signs, found.places[view][is_letter].tolist(), strict=True)) == texts
    moved = object_at((81.0, 20.0, 165.0, 44.0), "CAT", "dark", "word")  # the C's middle is 96
    found = letters_of_patches(processor, scene_of(moved), TWO_BY_TWO)
    assert set(found.places[2][found.signs[2] == SIGNS.index("A")].tolist()) == {0}
    moved = object_at((90.0, 20.0, 174.0, 44.0), "CAT", "dark", "word")  # it is 105, and the C ends at 120
    found = letters_of_patches(processor, scene_of(moved), TWO_BY_TWO)
    assert set(found.places[2][found.signs[2] == SIGNS.index("C")].tolist()) == {-1}
    assert set(found.places[2][found.signs[2] == SIGNS.index("A")].tolist()) == {0}


def test_a_scene_without_print_has_no_letters(processor):
    found = letters_of_patches(processor, scene_of(object_at((20.0, 20.0, 90.0, 90.0))), ONE_TILE)
    for of_patches in found:
        assert of_patches.shape == (2, 8, 8) and (of_patches == -1).all()


def test_letters_by_hand(processor):
    """Letters' middles about 33, 62 and 91 across, 182 down: in the lower left tile, whose cells are 28 pixels."""
    word = object_at((20.0, 170.0, 104.0, 194.0), "CAT", "dark", "word")
    scene = scene_of(object_at((120.0, 10.0, 200.0, 90.0)), word)
    assert [x for x, _ in word.letter_centers()] == pytest.approx([33, 62, 91], abs=5)
    cells = cells_of(processor, scene, TWO_BY_TWO, is_by_view=False)
    places_of_cells = list(np.ndindex(5, 4, 4))
    told = {
        place: signs(ids)
        for place, ids in zip(places_of_cells, cells.letters.view(-1, MAX_LETTERS_A_CELL), strict=True)
    }
    # In the global view the letters are 12 pixels high, too low to be read among four of a cell.
    expected = {(3, 2, 1): "C", (3, 2, 2): "A", (3, 2, 3): "T"}
    assert {place: text for place, text in told.items() if text} == expected
    first_places = {place: int(cells.first_places[place]) for place in places_of_cells}
    assert {place: first for place, first in first_places.items() if first >= 0} == {
        (3, 2, 1): 0,
        (3, 2, 2): 1,
        (3, 2, 3): 2,
    }
    places = letter_places(scene, view_rectangles(224, 224, 2, 2), 4, SIDE)
    # Attention is told of the tiles: view 3, row 2.
    assert places.cells == {(1, place): [((3 * 4 + 2) * 4 + 1 + place, 0)] for place in range(3)}


def test_a_picture_of_one_tile_shows_its_letters_in_both_views():
    word = object_at((10.0, 30.0, 94.0, 54.0), "CAT", "dark", "word")
    places = letter_places(scene_of(word, size=(SIDE, SIDE)), view_rectangles(SIDE, SIDE, 1, 1), 4, SIDE)
    assert places.cells == {(0, place): [(4 + place, 0), (16 + 4 + place, 0)] for place in range(3)}


@pytest.mark.parametrize(
    ("height", "views"), [(9.0, set()), (12.0, {1, 2, 3, 4}), (30.0, {1, 2, 3, 4}), (32.0, {0, 1, 2, 3, 4})]
)
def test_letters_too_low_to_be_read_are_not_told(height, views):
    """Heights in a picture of 224 pixels: tiles show it as it is, the global view half as large."""
    assert (MIN_LETTER_PIXELS, READABLE_LETTER_PIXELS) == (10, 16)
    items = [
        object_at((x, y, x + 40.0, y + height), "7", "dark", "number") for x in (30.0, 150.0) for y in (50.0, 150.0)
    ]
    places = letter_places(scene_of(*items), view_rectangles(224, 224, 2, 2), 4, SIDE)
    assert {view for view in range(5) if (places.letters[view] >= 0).any()} == views
    assert {number for number, _ in places.cells} == ({0, 1, 2, 3} if views else set())
    assert {own.cell // 16 for cells in places.cells.values() for own in cells} == views


def test_a_cell_holds_letters_in_reading_order_and_no_more_than_it_can():
    low = object_at((2.0, 60.0, 50.0, 80.0), "ABC", "dark", "word")
    high = object_at((2.0, 34.0, 50.0, 54.0), "123", "dark", "number")
    # One cell shows all.
    places = letter_places(scene_of(low, high, size=(SIDE, SIDE)), view_rectangles(SIDE, SIDE, 1, 1), 1, SIDE)
    assert signs(torch.from_numpy(places.letters[0, 0, 0])) == "123A" and MAX_LETTERS_A_CELL == 4
    assert places.first_places[0, 0, 0] == 0
    assert {own: [slot for _, slot in cells] for own, cells in places.cells.items()} == {
        (1, 0): [0, 0],
        (1, 1): [1, 1],
        (1, 2): [2, 2],
        (0, 0): [3, 3],
    }


def test_a_cell_knows_the_place_of_its_first_letter():
    word = object_at((2.0, 30.0, 106.0, 50.0), "ABCDEF", "dark", "word")
    places = letter_places(scene_of(word, size=(SIDE, SIDE)), view_rectangles(SIDE, SIDE, 1, 1), 4, SIDE)
    row = [signs(torch.from_numpy(ids)) for ids in places.letters[1, 1]]
    assert "".join(row) == "ABCDEF" and max(map(len, row)) == 2
    assert places.first_places[1, 1].tolist() == ["ABCDEF".index(text[0]) for text in row]
    for place, sign in enumerate("ABCDEF"):
        column = next(number for number, text in enumerate(row) if sign in text)
        assert places.cells[0, place][1] == (16 + 4 + column, row[column].index(sign))


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_letters_are_where_a_dot_at_their_middle_is_seen(processor, grid):
    """A white dot in each letter's place goes through the processor: the cell that is brightest has the letter."""
    size = (SIDE * 2 * grid.columns, SIDE * 2 * grid.rows)
    num_compared = 0
    for seed in range(3):
        told: set[tuple[int, int]] = set()
        possible: dict[tuple[int, int], set[int]] = {}
        scene = text_scene(split_rng("test-dots", seed), size=size)
        rectangles = view_rectangles(*size, *grid, side=SIDE)
        places = letter_places(scene, rectangles, 4, SIDE)
        dark = processor.image_transform.views(Image.new("RGB", size), grid, SIDE)
        for number, item in enumerate(scene.objects):
            for place, (x, y) in enumerate(item.letter_centers() if item.is_text else []):
                picture = Image.new("RGB", size)
                ImageDraw.Draw(picture).ellipse((x - 4, y - 4, x + 4, y + 4), fill="white")
                views = processor.image_transform.views(picture, grid, SIDE)
                bright = [(view - before)[0] for view, before in zip(views, dark, strict=True)]
                expected = []
                for view, light in enumerate(bright):
                    scale = SIDE / (rectangles[view, 2] - rectangles[view, 0])
                    is_tile = view > 0 or grid.num_views == 2
                    lowest = MIN_LETTER_PIXELS if is_tile else READABLE_LETTER_PIXELS
                    is_read = (item.box[3] - item.box[1]) * scale >= lowest
                    sums = light.unflatten(0, (4, 28)).unflatten(2, (4, 28)).sum(dim=(1, 3)).flatten()
                    total = sum(float(other.sum()) for other in (bright[:1] if view == 0 else bright[1:]))
                    if is_read and float(sums.max()) > 0.6 * total:
                        expected.append(view * 16 + int(sums.argmax()))
                    if is_read:
                        for cell in (sums > 0.2 * total).nonzero()[:, 0].tolist():
                            possible.setdefault((view * 16 + cell, place), set()).add(SIGNS.index(item.name[place]))
                for cell in expected:
                    told.add((cell, place))
                    assert cell in [own.cell for own in places.cells[number, place]]
        letters = places.letters.reshape(-1, MAX_LETTERS_A_CELL)
        assert all(possible[own] & set(letters[own[0]].tolist()) for own in told)
        num_compared += len(told)
    assert num_compared > 20


def painted_box(processor, scene, grid, number):
    """Where an object's box lies in each view, found in pixels: [V, 4], NaN where there is nothing of it."""
    mask = Image.new("RGB", scene.size)
    empty_views = processor.image_transform.views(mask, grid, SIDE)
    x1, y1, x2, y2 = scene.objects[number].box
    ImageDraw.Draw(mask).rectangle((x1, y1, x2 - 1, y2 - 1), fill="white")
    boxes = []
    for view, empty in zip(processor.image_transform.views(mask, grid, SIDE), empty_views, strict=True):
        rows, columns = torch.nonzero(view[0] - empty[0] > 1.0, as_tuple=True)  # half of black to white
        found = len(rows) > 0
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if found else [float("nan")] * 4
        boxes.append([float(edge) for edge in edges])
    return torch.tensor(boxes)


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_cells_agree_with_the_pixels_of_the_views(processor, grid):
    """Every object's box goes through the processor as a picture, and comes out where the cells say."""
    rng = split_rng("test-cells", ALL_GRIDS.index(grid))
    num_compared = 0
    for _ in range(4):
        scene = draw_scene(rng, processor, grid, (2, 4))
        cells = cells_of(processor, scene, grid, is_by_view=True)
        fit = letterbox(scene.size, (SIDE, SIDE))
        told = cells.boxes * SIDE
        told[0] = cells.boxes[0] * torch.tensor([fit.width, fit.height] * 2)
        told[0] += torch.tensor([fit.left, fit.top] * 2)
        for number in range(len(scene.objects)):
            for view, painted in enumerate(painted_box(processor, scene, grid, number)):
                if painted.isnan().any():
                    continue
                # Cells whose box, cut at the edges of the view, is the painted one.
                differences = (told[view].clamp(0, SIDE) - painted).abs().amax(dim=-1)
                is_own = cells.object_ids[view] == number
                assert (differences[is_own] <= 1.1).all()
                # What fills no part of a cell to speak of, or less than a neighbour, is not told.
                is_large = min(painted[2] - painted[0], painted[3] - painted[1]) > 28
                assert is_own.any() or not is_large
                num_compared += int(is_own.any())
                rows, columns = torch.nonzero(is_own, as_tuple=True)
                assert (columns * 28 < painted[2]).all() and (columns * 28 + 28 > painted[0]).all()
                assert (rows * 28 < painted[3]).all() and (rows * 28 + 28 > painted[1]).all()
    assert num_compared >= 8
