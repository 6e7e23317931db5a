"""What each image token of nano should see: class, colour, box, letters and more of the object under it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.tiling import TileGrid, letterbox, tile_boxes
from deepseek_vl2.nano.layouts import COLUMN_NAMES, ROW_NAMES
from deepseek_vl2.nano.scenes import COLOR_NAMES, LETTERS, SHAPE_NAMES, Box, Scene, SceneObject

CELL_CLASSES = (*SHAPE_NAMES, "word", "number", "bar")
SIGNS = LETTERS + "0123456789"
# Places of letters in texts, and letters that a token can hold; further ones are not asked of it.
MAX_TEXT_LENGTH = 6
MAX_LETTERS_A_CELL = 4
# Letters lower than this in a view cannot be read in it.
MIN_LETTER_PIXELS = 10.0
# Letters as high as this are read in the global view as well as in tiles, where they spread over many patches.
READABLE_LETTER_PIXELS = 16.0
MIN_COVER = 0.1
# The same for the patch of a letter.
MIN_LETTER_COVER = 0.25


@dataclass
class Cells:
    """What each image token should see; -1 where there is nothing of a kind. V views, G image tokens a side.

    Attributes:
        object_ids: Index of the object in its scene [V, G, G].
        class_ids: Index into `CELL_CLASSES`, [V, G, G].
        color_ids: Index into `COLOR_NAMES`, [V, G, G].
        is_center: Whether the cell is the one of its object nearest to the object's middle, [V, G, G]: one cell of the
            global view and one of all tiles.
        is_marked: Whether its object is in a red rectangle, [V, G, G].
        bar_values: Value of the bar, also at the letter under it, [V, G, G].
        row_ids: Row of the object in a table, index into `ROW_NAMES`, [V, G, G].
        column_ids: Column of it, index into `COLUMN_NAMES`, [V, G, G].
        letters: Letters and digits with their middle in the cell, in reading order, indices into `SIGNS`,
            [V, G, G, MAX_LETTERS_A_CELL].
        first_places: Place of the first of them in its text, [V, G, G].
        boxes: Box x1, y1, x2, y2 of the object, [V, G, G, 4], as parts of the picture or of the view, see `cells_of`.
    """

    object_ids: torch.Tensor
    class_ids: torch.Tensor
    color_ids: torch.Tensor
    is_center: torch.Tensor
    is_marked: torch.Tensor
    bar_values: torch.Tensor
    row_ids: torch.Tensor
    column_ids: torch.Tensor
    letters: torch.Tensor
    first_places: torch.Tensor
    boxes: torch.Tensor

    def at(self, cell_ids: torch.Tensor) -> "Cells":
        """Single cells by their number among all, [N, 1, 1]."""
        flat = {field.name: getattr(self, field.name).flatten(0, 2)[cell_ids] for field in fields(self)}
        return Cells(**{name: values[:, None, None] for name, values in flat.items()})

    def chosen(self, views: Sequence[int]) -> "Cells":
        """Those of some views."""
        return Cells(*(getattr(self, field.name)[views] for field in fields(self)))


class LetterCell(NamedTuple):
    """A cell that sees a letter.

    Attributes:
        cell: Index into V * G * G.
        slot: How many letters of the cell come before it.
    """

    cell: int
    slot: int


class LetterPlaces(NamedTuple):
    """Where the letters of a scene are seen, see `Cells`.

    Attributes:
        letters: See `Cells.letters`.
        first_places: See `Cells.first_places`.
        cells: For each object and place in its text the cells that see the letter; of pictures that are cut into tiles
            those of the tiles, and of the global view where letters are large in it.
    """

    letters: NDArray[np.int64]
    first_places: NDArray[np.int64]
    cells: dict[tuple[int, int], list[LetterCell]]


def join_cells(cells: Sequence[Cells]) -> Cells:
    """Joins the cells of several pictures along their views."""
    return Cells(*(torch.cat([getattr(own, field.name) for own in cells]) for field in fields(Cells)))


def cells_of(processor: DeepseekVLV2Processor, scene: Scene, grid: TileGrid, is_by_view: bool) -> Cells:
    """What each image token of each view of a scene should see; see `cells_and_letters`."""
    return cells_and_letters(processor, scene, grid, is_by_view)[0]


def cells_and_letters(
    processor: DeepseekVLV2Processor, scene: Scene, grid: TileGrid, is_by_view: bool
) -> tuple[Cells, LetterPlaces]:
    """What each image token of each view of a scene should see, and which of them show which letter.

    Args:
        processor: nano's processor.
        scene: The scene.
        grid: Its tiles.
        is_by_view: Whether boxes in tiles are parts of the tile, reaching beyond 0 and 1 where the object does: all
            that the tower can know. Otherwise they are parts of the whole picture, as in global views.
    """
    rectangles = view_rectangles(*scene.size, *grid, side=processor.image_size)
    num_cells = processor.num_tokens_per_side
    object_ids = covering_objects(scene, rectangles, num_cells)
    boxes = np.array([item.box for item in scene.objects] or [(0, 0, 0, 0)])[object_ids]  # [V, G, G, 4], pixels
    origins = np.zeros((len(rectangles), 1, 1, 4))
    extents = np.broadcast_to(np.array(scene.size * 2, float), origins.shape).copy()
    if is_by_view:
        origins[1:] = rectangles[1:, None, None, [0, 1, 0, 1]]
        extents[1:] = (rectangles[1:, 2:] - rectangles[1:, :2])[:, None, None, [0, 1, 0, 1]]
    boxes = np.where((object_ids >= 0)[..., None], (boxes - origins) / extents, 0).astype(np.float32)
    attributes = np.array([[*_attributes(scene, item)] for item in scene.objects] + [[-1] * 5])
    class_ids, color_ids, values, row_ids, column_ids = np.moveaxis(attributes[object_ids], -1, 0)
    is_marked = (object_ids == scene.marked) & (object_ids >= 0)
    places = letter_places(scene, rectangles, num_cells, processor.image_size)
    arrays = (
        object_ids,
        class_ids,
        color_ids,
        _centers(scene, rectangles, object_ids),
        is_marked,
        values,
        row_ids,
        column_ids,
        places.letters,
        places.first_places,
        boxes,
    )
    return Cells(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)), places


def _attributes(scene: Scene, item: SceneObject) -> tuple[int, int, int, int, int]:
    """Class, colour, value, row and column of an object as in `Cells`."""
    class_id = CELL_CLASSES.index(item.name if item.kind == "shape" else item.kind)
    color_id = -1 if item.is_text else COLOR_NAMES.index(item.color)
    bars = [bar for bar in scene.bars if bar.column == item.column]
    return (
        class_id,
        color_id,
        int(bars[0].name) if bars else -1,
        ROW_NAMES.index(item.row) if item.row else -1,
        COLUMN_NAMES.index(item.column) if item.column else -1,
    )


def view_rectangles(width: int, height: int, columns: int, rows: int, side: int = 112) -> NDArray[np.float64]:
    """The part of a picture that each view shows, in pixels of the picture: the global view, then the tiles row by row.

    Rectangles reach beyond the picture where the view shows letterbox.

    Args:
        width: Of the picture.
        height: Of the picture.
        columns: Tiles across.
        rows: Tiles down.
        side: Of a view, in pixels.

    Returns:
        x1, y1, x2, y2 of every view, [V, 4] with V = 1 + columns * rows.
    """
    grid = TileGrid(columns, rows)
    cuts = [((side, side), (0, 0, side, side))]
    cuts += [((columns * side, rows * side), box) for box in tile_boxes(grid, side)]
    rectangles = []
    for canvas, (x1, y1, x2, y2) in cuts:
        fitted = letterbox((width, height), canvas)
        scale_x, scale_y = fitted.width / width, fitted.height / height
        rectangles.append(
            (
                (x1 - fitted.left) / scale_x,
                (y1 - fitted.top) / scale_y,
                (x2 - fitted.left) / scale_x,
                (y2 - fitted.top) / scale_y,
            )
        )
    return np.array(rectangles)


def covering_objects(
    scene: Scene, rectangles: NDArray[np.float64], num_cells: int, min_cover: float = MIN_COVER
) -> NDArray[np.int64]:
    """The object that each image token of each view should see, [V, G, G]; -1 for none.

    A cell belongs to the object whose box covers the largest part of it, if that is more than `min_cover` of its area.

    Args:
        scene: The scene.
        rectangles: The views in pixels of the picture, [V, 4], see `view_rectangles`.
        num_cells: G.
        min_cover: Part of a cell, 0 to 1.
    """
    return covering_boxes([item.box for item in scene.objects], rectangles, num_cells, min_cover)


def covering_boxes(
    found: Sequence[Box], rectangles: NDArray[np.float64], num_cells: int, min_cover: float
) -> NDArray[np.int64]:
    """The box that covers most of each of `num_cells` by `num_cells` parts of each view; see `covering_objects`."""
    if not found:
        return np.full((len(rectangles), num_cells, num_cells), -1)
    boxes = np.array(found)  # [N, 4]
    steps = np.arange(num_cells + 1) / num_cells
    x_edges = rectangles[:, 0, None] + steps * (rectangles[:, 2] - rectangles[:, 0])[:, None]  # [V, G + 1]
    y_edges = rectangles[:, 1, None] + steps * (rectangles[:, 3] - rectangles[:, 1])[:, None]
    overlap_x = _overlap(x_edges, boxes[:, 0], boxes[:, 2])  # [V, G, N]
    overlap_y = _overlap(y_edges, boxes[:, 1], boxes[:, 3])
    cover = overlap_y[:, :, None] * overlap_x[:, None]  # [V, G, G, N]
    return np.where(cover.max(-1) > min_cover, cover.argmax(-1), -1)


def _overlap(edges: NDArray[np.float64], starts: NDArray[np.float64], ends: NDArray[np.float64]) -> NDArray[np.float64]:
    """Part of every cell between two edges [V, G + 1] that every interval [N] covers, [V, G, N]."""
    low, high = edges[:, :-1, None], edges[:, 1:, None]
    return np.clip(np.minimum(high, ends) - np.maximum(low, starts), 0, None) / (high - low)


class PatchLetters(NamedTuple):
    """The letter or digit that each patch of each view shows, if it is large enough to be read. P patches a side.

    Attributes:
        signs: Indices into `SIGNS`, -1 for none, [V, P, P].
        places: Its place in the part of its text that the view shows, -1 for none, and for a letter whose middle is
            left of the view, [V, P, P].
    """

    signs: NDArray[np.int64]
    places: NDArray[np.int64]


def letters_of_patches(processor: DeepseekVLV2Processor, scene: Scene, grid: TileGrid) -> PatchLetters:
    """Finds the letters that patches show.

    Args:
        processor: nano's processor.
        scene: The scene.
        grid: Its tiles.
    """
    rectangles = view_rectangles(*scene.size, *grid, side=processor.image_size)
    view_starts = rectangles[:, 0]
    signs: list[int] = []
    places = [np.full((len(rectangles), 1), -1)]  # [V, letters]; the last column is for no letter, as in `signs`
    boxes: list[Box] = []
    for item in scene.texts:
        signs += [SIGNS.index(sign) for sign in item.name]
        middles = np.array([x for x, _ in item.letter_centers()])
        num_left_out = (middles < view_starts[:, None]).sum(axis=1)
        places.insert(-1, np.arange(len(middles)) - num_left_out[:, None])
        boxes += item.letter_boxes()
    number = covering_boxes(boxes, rectangles, processor.image_size // processor.patch_size, MIN_LETTER_COVER)
    scales = processor.image_size / (rectangles[:, 2] - rectangles[:, 0])
    heights = np.array([y2 - y1 for _, y1, _, y2 in boxes] + [0.0])[number] * scales[:, None, None]
    is_read = heights >= MIN_LETTER_PIXELS
    place = np.take_along_axis(np.concatenate(places, axis=1)[:, None], number, axis=2)
    return PatchLetters(
        np.where(is_read, np.array([*signs, -1])[number], -1),
        np.where(is_read, np.maximum(place, -1), -1),
    )


def _centers(scene: Scene, rectangles: NDArray[np.float64], presence: NDArray[np.int64]) -> NDArray[np.bool_]:
    """See `Cells.is_center`; rectangles [V, 4] of the views in pixels, objects [V, G, G] that the cells see."""
    middles = (np.arange(presence.shape[1]) + 0.5) / presence.shape[1]
    x, y = (rectangles[:, [low]] + middles * (rectangles[:, [low + 2]] - rectangles[:, [low]]) for low in (0, 1))
    is_center = np.zeros(presence.shape, bool)
    for number, item in enumerate(scene.objects):
        distances = (x[:, None] - item.center[0]) ** 2 + (y[:, :, None] - item.center[1]) ** 2  # [V, G, G]
        distances = np.where(presence == number, distances, np.inf)
        for views in (slice(0, 1), slice(1, None)):
            nearest = distances[views].argmin()
            is_center[views].reshape(-1)[nearest] |= np.isfinite(distances[views].flat[nearest])
    return is_center


def letter_places(scene: Scene, rectangles: NDArray[np.float64], num_cells: int, view_side: int) -> LetterPlaces:
    """Finds the cells that hold the middles of letters which are large enough to be read.

    Args:
        scene: The scene.
        rectangles: The views in pixels of the picture, [V, 4], see `view_rectangles`.
        num_cells: G.
        view_side: Pixels.
    """
    shape = (len(rectangles), num_cells, num_cells)
    letters = np.full((*shape, MAX_LETTERS_A_CELL), -1)
    first_places = np.full(shape, -1)
    cells: dict[tuple[int, int], list[LetterCell]] = {}
    first_view = 1 if len(rectangles) > 2 else 0
    scales = view_side / (rectangles[:, 2] - rectangles[:, 0])
    for number in sorted(range(len(scene.objects)), key=lambda number: scene.objects[number].center[::-1]):
        item = scene.objects[number]
        if not item.is_text:
            continue
        for place, (center, sign) in enumerate(zip(item.letter_centers(), item.name, strict=True)):
            for view, (x1, y1, x2, y2) in enumerate(rectangles):
                letter_pixels = (item.box[3] - item.box[1]) * scales[view]
                if letter_pixels < (MIN_LETTER_PIXELS if view >= first_view else READABLE_LETTER_PIXELS):
                    continue
                column = int((center[0] - x1) / (x2 - x1) * num_cells // 1)
                row = int((center[1] - y1) / (y2 - y1) * num_cells // 1)
                if not (0 <= column < num_cells and 0 <= row < num_cells):
                    continue
                held = letters[view, row, column]
                slot = int((held >= 0).sum())
                if slot == len(held):
                    continue
                held[slot] = SIGNS.index(sign)
                if slot == 0:
                    first_places[view, row, column] = place
                cell = (view * num_cells + row) * num_cells + column
                cells.setdefault((number, place), []).append(LetterCell(cell, slot))
    return LetterPlaces(letters, first_places, cells)
