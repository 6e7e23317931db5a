import numpy as np
import pytest
from PIL import Image, ImageOps

from deepseek_vl2.models.tiling import (
    TileGrid,
    choose_grid,
    letterbox,
    num_image_tokens,
    select_best_resolution,
    tile_boxes,
)

SIDE = 384
PUBLISHED = [
    (SIDE * columns, SIDE * rows)
    for columns, rows in [
        (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1),
        (2, 3), (3, 2), (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3),
    ]
]  # fmt: skip


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [
        ((384, 384), (384, 384)),
        ((100, 100), (384, 384)),
        ((640, 480), (768, 768)),
        ((480, 640), (768, 768)),
        ((1000, 300), (1152, 384)),
        ((300, 1000), (384, 1152)),
        ((2000, 210), (2304, 384)),
        ((1920, 1080), (1536, 768)),
        ((37, 911), (384, 1152)),
    ],
)
def test_best_resolution_among_the_published_candidates(image_size, expected):
    assert select_best_resolution(image_size, PUBLISHED) == expected


def test_order_breaks_ties():
    assert select_best_resolution((50, 50), [(100, 200), (200, 100)]) == (100, 200)
    assert select_best_resolution((50, 50), [(200, 100), (100, 200)]) == (200, 100)


def test_least_waste_decides_among_equally_good_canvases():
    assert select_best_resolution((50, 50), [(300, 300), (100, 100), (200, 200)]) == (100, 100)


def test_a_hair_thin_picture_still_gets_a_canvas():
    assert select_best_resolution((50000, 1), PUBLISHED) in PUBLISHED


@pytest.mark.parametrize(("size", "candidates"), [((0, 10), PUBLISHED), ((10, 10), [])])
def test_bad_resolution_input(size, candidates):
    with pytest.raises(ValueError, match=r"pixel a side|empty"):
        select_best_resolution(size, candidates)


@pytest.mark.parametrize(
    ("num_images", "expected"), [(1, TileGrid(3, 1)), (2, TileGrid(3, 1)), (3, TileGrid(1, 1)), (7, TileGrid(1, 1))]
)
def test_three_pictures_switch_tiling_off(num_images, expected):
    assert choose_grid((1000, 300), num_images, SIDE, PUBLISHED) == expected


@pytest.mark.parametrize(
    ("grid", "side", "expected"),
    [
        (TileGrid(1, 1), 14, 421),
        (TileGrid(2, 2), 14, 1023),
        (TileGrid(3, 1), 14, 813),
        (TileGrid(1, 3), 14, 841),
        (TileGrid(2, 1), 4, 20 + 1 + 4 * 9),
        (TileGrid(1, 2), 4, 20 + 1 + 8 * 5),
    ],
)
def test_number_of_image_tokens(grid, side, expected):
    assert num_image_tokens(grid, side) == expected


def test_views_of_a_grid():
    assert TileGrid(3, 2).num_tiles == 6
    assert TileGrid(3, 2).num_views == 7


def test_tile_boxes_go_row_by_row_and_cover_the_canvas():
    assert tile_boxes(TileGrid(3, 2), 10) == [
        (0, 0, 10, 10), (10, 0, 20, 10), (20, 0, 30, 10),
        (0, 10, 10, 20), (10, 10, 20, 20), (20, 10, 30, 20),
    ]  # fmt: skip


@pytest.mark.parametrize("image_size", [(640, 480), (480, 641), (333, 1000), (7, 5), (384, 384), (1001, 333)])
@pytest.mark.parametrize("canvas_size", [(384, 384), (768, 384), (112, 224), (99, 100)])
def test_letterbox_is_where_pillow_pads(image_size, canvas_size):
    padded = ImageOps.pad(Image.new("RGB", image_size, "white"), canvas_size, color="black")
    rows, columns = np.nonzero(np.asarray(padded)[..., 0])
    box = letterbox(image_size, canvas_size)
    assert (box.left, box.top) == (columns.min(), rows.min())
    assert (box.width, box.height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)


def test_letterbox_keeps_one_pixel_of_a_hair_thin_picture():
    assert letterbox((5000, 1), (384, 384))[2:] == (384, 1)
    assert letterbox((1, 5000), (384, 384))[2:] == (1, 384)
