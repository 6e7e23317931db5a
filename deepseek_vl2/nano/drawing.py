"""Draws scenes for nano's training whose pictures are cut into wanted tiles."""

import random
from collections.abc import Mapping

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.tiling import TileGrid, choose_grid
from deepseek_vl2.nano.layouts import chart_scene, page_scene, reading_scene, table_scene, text_scene
from deepseek_vl2.nano.questions import MAX_COUNT, counting_scene
from deepseek_vl2.nano.scenes import Scene, Size, mark_object, random_scene, random_size, small_scene

ONE_TILE = TileGrid(1, 1)
LARGER_GRIDS = (TileGrid(1, 2), TileGrid(2, 1), TileGrid(2, 2))
LARGER_GRID_WEIGHTS = (1, 1, 3)
# What pictures show, and how often.
SCENE_KINDS = {"shapes": 36, "counting": 28, "text": 15, "table": 13, "chart": 8}
# The same where counting is practised in the end; the rest is there not to be forgotten.
COUNTING_SCENE_KINDS = {"shapes": 40, "counting": 50, "text": 2, "table": 4, "chart": 4}
# The same where reading is practised.
READING_SCENE_KINDS = {"shapes": 12, "counting": 28, "text": 40, "page": 10, "table": 7, "chart": 3}
# The same where both are practised in the end.
FINISHING_SCENE_KINDS = {"shapes": 20, "counting": 46, "text": 24, "page": 3, "table": 5, "chart": 2}
# The same where counting is practised once more after that.
LAST_SCENE_KINDS = {"shapes": 20, "counting": 54, "text": 20, "table": 4, "chart": 2}
# The same where a second picture comes later in a conversation.
LATER_SCENE_KINDS = {"shapes": 60, "counting": 30, "chart": 10}
# Of shapes alone: how often they are small, and how often one is marked.
SMALL_PROBABILITY = 0.15
MARKED_PROBABILITY = 0.15
# Of print: how often it is one text or two, beside shapes.
FEW_TEXTS_PROBABILITY = 0.5


def larger_grid(rng: random.Random) -> TileGrid:
    """Draws more than one tile."""
    return rng.choices(LARGER_GRIDS, LARGER_GRID_WEIGHTS)[0]


def draw_scene(
    rng: random.Random,
    processor: DeepseekVLV2Processor,
    grid: TileGrid,
    num_objects: tuple[int, int],
    kinds: Mapping[str, int] = SCENE_KINDS,
) -> Scene:
    """Draws a scene whose picture is tiled to a grid.

    Args:
        rng: Source of chance.
        processor: nano's processor.
        grid: The tiles.
        num_objects: Fewest and most objects, where shapes are shown.
        kinds: What it shows, and how often.
    """
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    size = size_for(rng, processor, grid, is_for_text=kind in ("text", "page", "table", "chart"))
    if kind == "text":
        if rng.random() < FEW_TEXTS_PROBABILITY:
            return reading_scene(rng, rng.choice(("word", "number")), size=size)
        return text_scene(rng, size=size)
    if kind == "page":
        return page_scene(rng, size=size)
    if kind == "table":
        return table_scene(rng, size=size)
    if kind == "chart":
        return chart_scene(rng, size=size)
    if kind == "counting":
        return counting_scene(rng, rng.randint(1, min(MAX_COUNT, num_objects[1])), size=size)
    if grid != ONE_TILE and rng.random() < SMALL_PROBABILITY:
        return small_scene(rng, size=size)
    scene = random_scene(rng, size=size, num_objects=num_objects)
    return mark_object(rng, scene) if rng.random() < MARKED_PROBABILITY else scene


def size_for(rng: random.Random, processor: DeepseekVLV2Processor, grid: TileGrid, is_for_text: bool) -> Size:
    """A picture size that is tiled to a grid; of one tile mostly full ones for text, to be readable."""
    side = processor.image_size
    while True:
        if grid != ONE_TILE:
            size = random_size(rng)
        elif rng.random() < (0.7 if is_for_text else 0.3):
            size = (side, side)
        else:
            size = (rng.randint(side // 2, side), rng.randint(side // 2, side))
        if choose_grid(size, 1, side, processor.candidate_resolutions) == grid:
            return size
