"""Scenes with an order of their own: texts, tables and bar charts."""

import random
from collections.abc import Sequence

from deepseek_vl2.nano.scenes import (
    COLOR_NAMES,
    COLORS,
    LETTERS,
    SHAPE_NAMES,
    TEXT_COLOR,
    TEXT_HEIGHTS,
    TEXT_RGB,
    Box,
    Kind,
    Line,
    ObjectPlan,
    Scene,
    SceneObject,
    Size,
    place_objects,
    random_background,
    random_number,
    random_size,
    random_text_plan,
    random_word,
    text_extent,
    vary_color,
)
from deepseek_vl2.nano.views import tile_scale

# Names of rows as printed; questions call them Mon, Tue and so on.
ROW_NAMES = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
COLUMN_NAMES = tuple(LETTERS[:6])
LINE_RGB = (150, 150, 160)
STEP_RGB = (205, 205, 212)
MAX_BAR = 10
AXIS_LABELS = (0, 5, 10)
# Heights of the letters of a page, and the least of a table, in pixels of the tiles.
PAGE_LETTER_HEIGHTS = (16.0, 36.0)
TABLE_LETTER_HEIGHT = 16.0
# Of the height of a row.
TABLE_LETTER_FRACTIONS = (0.5, 0.66)


def _reading_size(rng: random.Random) -> Size:
    """A size whose sides are not too far apart for a table or a chart."""
    while True:
        width, height = random_size(rng)
        if max(width, height) <= 1.5 * min(width, height):
            return width, height


def _centered_text(
    rng: random.Random, kind: Kind, text: str, cell: Box, height: float, row: str, column: str
) -> SceneObject:
    """A text in the middle of a cell, smaller where it would not fit."""
    x1, y1, x2, y2 = cell
    width, height = text_extent(text, height, 0.84 * (x2 - x1))
    left, top = round((x1 + x2 - width) / 2), round((y1 + y2 - height) / 2)
    box = (float(left), float(top), float(left + width), float(top + height))
    return SceneObject(kind, text, TEXT_COLOR, box, vary_color(rng, TEXT_RGB), 0.0, row, column)


def text_scene(
    rng: random.Random,
    *,
    size: Size | None = None,
    num_texts: tuple[int, int] = (2, 5),
    words: Sequence[str] | None = None,
) -> Scene:
    """Draws a scene of several words and numbers and sometimes a shape."""
    size = size if size is not None else random_size(rng)
    background = random_background(rng)
    plans = [random_text_plan(rng, words) for _ in range(rng.randint(*num_texts))]
    if rng.random() < 0.3:
        plans.append(ObjectPlan("shape", rng.choice(("circle", "square", "star")), rng.choice(COLOR_NAMES)))
    objects = place_objects(rng, plans, size, min_side_fraction=0.15, max_side_fraction=0.36)
    return Scene(*size, background, objects)


def page_scene(rng: random.Random, *, size: Size | None = None) -> Scene:
    """Draws a page full of words and numbers in lines, all letters of about one height: most letters for a picture."""
    width, height = size = size if size is not None else random_size(rng)
    background = random_background(rng)
    letter_height = rng.uniform(*PAGE_LETTER_HEIGHTS) / tile_scale(size)
    objects: list[SceneObject] = []
    top = rng.uniform(0.2, 1.0) * letter_height
    while top + letter_height < height:
        left = rng.uniform(0.2, 1.5) * letter_height
        while True:
            kind, text, color = random_text_plan(rng)
            extent = text_extent(text, rng.uniform(0.85, 1.0) * letter_height, float(width))
            x1, y1 = round(left), round(top)
            box = (float(x1), float(y1), float(x1 + extent[0]), float(y1 + extent[1]))
            if box[2] >= width or box[3] >= height:
                break
            objects.append(SceneObject(kind, text, color, box, vary_color(rng, TEXT_RGB)))
            left = box[2] + rng.uniform(0.5, 1.5) * letter_height
        top += rng.uniform(1.25, 2.0) * letter_height
    return Scene(*size, background, tuple(objects))


def reading_scene(
    rng: random.Random, kind: str, *, size: Size | None = None, words: Sequence[str] | None = None
) -> Scene:
    """Draws a scene with one text ("word" or "number"), perhaps one of the other kind, and up to three shapes."""
    size = size if size is not None else random_size(rng)
    background = random_background(rng)
    texts = {"word": random_word(rng, words), "number": random_number(rng)}
    kinds = [kind, *(other for other in texts if other != kind and rng.random() < 0.3)]
    plans = [ObjectPlan(own, texts[own], TEXT_COLOR) for own in kinds]  # type: ignore[arg-type]
    plans += [ObjectPlan("shape", rng.choice(SHAPE_NAMES), rng.choice(COLOR_NAMES)) for _ in range(rng.randint(0, 3))]
    objects = place_objects(rng, plans, size, min_side_fraction=0.16, max_side_fraction=0.4)
    return Scene(*size, background, objects)


def table_scene(rng: random.Random, *, size: Size | None = None) -> Scene:
    """Draws a table of 2 to 4 named rows and 2 to 3 lettered columns of numbers below 100."""
    width, height = size = size if size is not None else _reading_size(rng)
    background = random_background(rng)
    margin = rng.uniform(0.02, 0.06) * min(size)
    least_height = TABLE_LETTER_HEIGHT / TABLE_LETTER_FRACTIONS[0] / tile_scale(size)
    rows = rng.sample(ROW_NAMES, rng.randint(2, min(4, max(2, int((height - 2 * margin) / least_height) - 1))))
    columns = COLUMN_NAMES[: rng.randint(2, 3)]
    left, top, right, bottom = margin, margin, width - margin, height - margin
    row_edges = [top + (bottom - top) * part / (len(rows) + 1) for part in range(len(rows) + 2)]
    # The column of names is a little wider than the others.
    parts = [0.0, *((1.3 + number) / (1.3 + len(columns)) for number in range(len(columns) + 1))]
    column_edges = [left + (right - left) * part for part in parts]
    highest = TEXT_HEIGHTS[1] / tile_scale(size)
    letter_height = min(highest, rng.uniform(*TABLE_LETTER_FRACTIONS) * (row_edges[1] - row_edges[0]))
    thickness = max(1, round(0.006 * min(size)))
    lines = [Line((left, y, right, y + thickness), LINE_RGB) for y in row_edges]
    lines += [Line((x, top, x + thickness, bottom), LINE_RGB) for x in column_edges]
    objects = []
    for row_number, row in enumerate(("", *rows)):
        for column_number, column in enumerate(("", *columns)):
            cell = (
                column_edges[column_number],
                row_edges[row_number],
                column_edges[column_number + 1],
                row_edges[row_number + 1],
            )
            text = (row or column) if not (row and column) else str(rng.randint(0, 99))
            if text:
                kind: Kind = "number" if row and column else "word"
                objects.append(_centered_text(rng, kind, text, cell, letter_height, row, column))
    return Scene(*size, background, tuple(objects), tuple(lines))


def table_cells(scene: Scene) -> list[SceneObject]:
    """The numbers of a table, without the names of rows and columns."""
    return [item for item in scene.objects if item.row and item.column]


def chart_scene(rng: random.Random, *, size: Size | None = None) -> Scene:
    """Draws a chart of 2 to 5 bars of different colours, lettered from A on, with whole values from 1 to `MAX_BAR`."""
    width, height = size = size if size is not None else _reading_size(rng)
    background = random_background(rng)
    num_bars = rng.randint(2, 5)
    letter_height = rng.uniform(0.075, 0.095) * min(size)
    left, right = 0.14 * width, rng.uniform(0.92, 0.98) * width
    top, bottom = rng.uniform(0.05, 0.1) * height, height - 1.9 * letter_height
    step = (bottom - top) / MAX_BAR
    thickness = max(1, round(0.006 * min(size)))
    lines = [
        Line(
            (left, bottom - value * step, right, bottom - value * step + thickness),
            LINE_RGB if value in AXIS_LABELS else STEP_RGB,
        )
        for value in range(MAX_BAR + 1)
    ]
    lines.append(Line((left, top, left + thickness, bottom), LINE_RGB))
    slot = (right - left) / num_bars
    bar_width = rng.uniform(0.45, 0.75) * slot
    objects = []
    for number, color in enumerate(rng.sample(COLOR_NAMES, num_bars)):
        column = COLUMN_NAMES[number]
        value = rng.randint(1, MAX_BAR)
        x1 = left + (number + 0.5) * slot - bar_width / 2
        box = tuple(float(round(edge)) for edge in (x1, bottom - value * step, x1 + bar_width, bottom))
        objects.append(SceneObject("bar", str(value), color, box, vary_color(rng, COLORS[color]), column=column))  # type: ignore[arg-type]
        cell = (left + number * slot, bottom + 0.3 * letter_height, left + (number + 1) * slot, float(height))
        objects.append(_centered_text(rng, "word", column, cell, letter_height, "", column))
    for value in AXIS_LABELS:
        y = bottom - value * step
        cell = (0.0, y - letter_height, left, y + letter_height)
        objects.append(_centered_text(rng, "number", str(value), cell, 0.85 * letter_height, "", ""))
    return Scene(*size, background, tuple(objects), tuple(lines))
