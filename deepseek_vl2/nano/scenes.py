"""Pictures for nano: coloured shapes, printed words and numbers, tables and charts on light grounds, drawn with PIL.

A `Scene` says what is in the picture and where; `Scene.draw` paints it. All chance comes from the `random.Random`
that the caller passes, so a seed names one picture for good.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from deepseek_vl2.nano.views import tile_scale

Kind = Literal["shape", "word", "number", "bar"]
RGB = tuple[int, int, int]

# Far enough apart that a shift of COLOR_JITTER in every channel confuses no two.
COLORS = MappingProxyType(
    {
        "red": (214, 30, 36),
        "orange": (246, 128, 14),
        "yellow": (243, 222, 26),
        "green": (28, 152, 56),
        "cyan": (24, 202, 222),
        "blue": (28, 66, 208),
        "purple": (138, 38, 168),
        "black": (20, 20, 20),
    }
)
COLOR_NAMES = tuple(COLORS)
COLOR_JITTER = 12
# Words and numbers are printed in a dark grey that no question names.
TEXT_COLOR = "dark"
TEXT_RGB = (36, 36, 44)

SHAPE_NAMES = ("circle", "square", "triangle", "star", "cross", "diamond")
# Most a shape of a kind is turned, in degrees: never so far that one kind looks like another.
MAX_ANGLES = MappingProxyType({"circle": 0, "square": 6, "triangle": 10, "star": 15, "cross": 12, "diamond": 6})

_WORD_LIST = """
ACT AIR ANGEL ANT APPLE ARM ARROW BAG BAKER BALL BANANA BANK BASKET BEACH BEAR BELL BIRD BOAT BOOK BOTTLE BOX
BREAD BRIDGE BUS BUTTER CAKE CAMEL CANDLE CAR CASTLE CAT CHAIR CHEESE CITY CLOCK CLOUD COAT COFFEE COIN COW
CROWN CUP DANCE DESK DOCTOR DOG DOOR DRAGON DRUM DUCK EAGLE EARTH EGG ENGINE FARM FATHER FIELD FINGER FIRE
FISH FLAG FLOWER FOREST FOX FROG FRUIT GARDEN GATE GHOST GIFT GLASS GOAT GOLD GRAPE GUITAR HAND HAT HEART HILL
HOME HONEY HORSE HOTEL HOUSE ICE ISLAND JACKET JAM JEWEL JUICE JUNGLE KEY KING KITE KNIFE LADDER LAKE LAMP
LEAF LEMON LETTER LION MAP MARKET MEDAL MILK MIRROR MONKEY MOON MOUSE MUSIC NEST NIGHT NURSE OCEAN OLIVE ONION
OPEN ORANGE OVEN PALACE PAPER PARK PEAR PEN PENCIL PIANO PIG PILOT PLANET POCKET POTATO QUEEN QUIZ RABBIT
RADIO RAIN RIBBON RING RIVER ROAD ROBOT ROCKET ROOF ROSE SAIL SALT SCHOOL SEA SHEEP SHIP SHOE SILVER SNOW
SPIDER SPOON SPRING STONE STORM SUGAR SUMMER SUN TABLE TEA TEMPLE TENT TIGER TOMATO TOWER TRAIN TREE TURTLE
VAN VIOLIN WAGON WATER WHALE WHEEL WIND WINDOW WINTER WOLF YARD ZEBRA ZOO
"""
WORDS = tuple(_WORD_LIST.split())
# Every fifth word is never printed in training: reading them shows that letters are read, not words recognised.
HELD_OUT_WORDS = WORDS[::5]
TRAIN_WORDS = tuple(word for word in WORDS if word not in HELD_OUT_WORDS)
WORD_LENGTHS = (3, 4, 5, 6)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Narrow and round letters are told apart worst: so many times as often as others they stand in texts that are no words.
LETTER_WEIGHTS = MappingProxyType({"I": 5, "L": 2, "O": 2, "U": 2})

Size = tuple[int, int]
Box = tuple[float, float, float, float]

# (width, height) and how often a picture has that size.
COMMON_SIZES: tuple[tuple[Size, int], ...] = (
    ((112, 112), 2),
    ((224, 224), 8),
    ((320, 240), 4),
    ((240, 320), 4),
    ((448, 336), 2),
    ((336, 448), 2),
    ((448, 224), 3),
    ((224, 448), 3),
    ((640, 480), 1),
)
FREE_SIZE_PROBABILITY = 0.3
# Sizes that nano cuts into two by two tiles, and sides of small objects, which are drawn a little stretched.
LARGE_SIZES: tuple[Size, ...] = ((448, 448), (448, 336), (336, 448), (640, 480))
SMALL_SIDE_FRACTIONS = (0.05, 0.074)

# Canvases with both sides below this are drawn twice as large and reduced, which smooths the edges.
SUPERSAMPLE_BELOW = 320
TEXT_MASK_SIZE = 128
# Lowest and highest print, in pixels of the tiles: high enough to read, low enough that a word spans few of them.
TEXT_HEIGHTS = (20.0, 34.0)
MARK_RGB = (255, 0, 0)
# Of the picture's shorter side; the gap between a mark and its object is as wide.
MARK_WIDTH_FRACTION = 0.0125
PLACING_ATTEMPTS = 40


@dataclass(frozen=True)
class SceneObject:
    """One thing in a picture.

    Attributes:
        kind: What it is.
        name: The shape ("circle"), the printed text ("CAT", "42"), or the value of a bar ("7").
        color: A name of `COLOR_NAMES`, or `TEXT_COLOR` for words and numbers.
        box: x1, y1, x2, y2 in pixels, tight around the ink; right and bottom are exclusive.
        rgb: The colour as painted.
        angle: Degrees by which a shape is turned.
        row: Name of its row in a table.
        column: Name of its column in a table, or letter of its bar in a chart.
    """

    kind: Kind
    name: str
    color: str
    box: Box
    rgb: RGB
    angle: float = 0.0
    row: str = ""
    column: str = ""

    @property
    def is_text(self) -> bool:
        """Whether it is a printed word or number."""
        return self.kind in ("word", "number")

    @property
    def description(self) -> str:
        """A name such as "red circle", "word CAT", "number 42" or "red bar"."""
        if self.kind == "bar":
            return f"{self.color} bar"
        prefix = self.color if self.kind == "shape" else self.kind
        return f"{prefix} {self.name}"

    def letter_boxes(self) -> list[Box]:
        """The parts of the box that the letters or digits of a text take, in pixels."""
        x1, y1, x2, y2 = self.box
        edges = [x1 + part * (x2 - x1) for part in _letter_edges(self.name)]
        return [(left, y1, right, y2) for left, right in pairwise(edges)]

    def letter_centers(self) -> list[tuple[float, float]]:
        """Middles of the letters or digits of a text, x and y in pixels."""
        return [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in self.letter_boxes()]

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the box, x and y in pixels."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2


class Background(NamedTuple):
    """A light ground: one colour, or a soft passage or stripes between two that are close.

    Attributes:
        style: How the two colours meet.
        first: Main colour.
        second: The other colour; not used by "plain".
        is_vertical: Whether the passage runs downwards (stripes: lie across).
        period: Distance between stripes in pixels.
    """

    style: Literal["plain", "gradient", "stripes"]
    first: RGB
    second: RGB
    is_vertical: bool
    period: int


class Line(NamedTuple):
    """A filled strip under the objects: an edge of a table, a step of a chart."""

    box: Box
    rgb: RGB


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `draw` paints it.

    Attributes:
        width: Pixels.
        height: Pixels.
        background: What lies under the objects.
        objects: The things in it; their boxes do not overlap.
        lines: Edges of a table or steps of a chart.
        marked: Index of the object in a red rectangle.
    """

    width: int
    height: int
    background: Background
    objects: tuple[SceneObject, ...]
    lines: tuple[Line, ...] = ()
    marked: int | None = None

    @property
    def size(self) -> Size:
        """Width and height in pixels, as PIL orders them."""
        return self.width, self.height

    @property
    def shapes(self) -> tuple[SceneObject, ...]:
        """The objects that are shapes."""
        return tuple(item for item in self.objects if item.kind == "shape")

    @property
    def texts(self) -> tuple[SceneObject, ...]:
        """The objects that are printed words and numbers."""
        return tuple(item for item in self.objects if item.is_text)

    @property
    def bars(self) -> tuple[SceneObject, ...]:
        """The objects that are bars of a chart."""
        return tuple(item for item in self.objects if item.kind == "bar")

    def draw(self) -> Image.Image:
        """Paints the scene as an RGB picture of `size`."""
        scale = 2 if max(self.size) < SUPERSAMPLE_BELOW else 1
        canvas = _draw_background(self.background, self.size, scale)
        pen = ImageDraw.Draw(canvas)
        for line in self.lines:
            _fill(pen, line.box, line.rgb, scale)
        for item in self.objects:
            if item.kind == "shape":
                _draw_shape(pen, item, scale)
            elif item.kind == "bar":
                _fill(pen, item.box, item.rgb, scale)
            else:
                _draw_text(canvas, item, scale)
        if self.marked is not None:
            _draw_mark(pen, self.objects[self.marked].box, self.size, scale)
        return canvas if scale == 1 else canvas.reduce(scale)


def _fill(pen: ImageDraw.ImageDraw, box: Box, rgb: RGB, scale: int) -> None:
    # PIL paints the last row and column of what it is given, hence the 1 less.
    x1, y1, x2, y2 = (round(value * scale) for value in box)
    pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), fill=rgb)


def _draw_mark(pen: ImageDraw.ImageDraw, box: Box, size: Size, scale: int) -> None:
    """Draws a red rectangle around an object, a little away from it."""
    width = max(2, round(MARK_WIDTH_FRACTION * min(size)))
    x1, y1, x2, y2 = box
    outer = (x1 - 2 * width, y1 - 2 * width, x2 + 2 * width, y2 + 2 * width)
    pen.rectangle(tuple(round(value * scale) for value in outer), outline=MARK_RGB, width=width * scale)


def _draw_background(background: Background, size: Size, scale: int) -> Image.Image:
    width, height = size[0] * scale, size[1] * scale
    canvas = Image.new("RGB", (width, height), background.first)
    if background.style == "gradient":
        ramp = Image.linear_gradient("L")
        if not background.is_vertical:
            ramp = ramp.transpose(Image.Transpose.ROTATE_90)
        canvas.paste(background.second, (0, 0), ramp.resize((width, height), Image.Resampling.BILINEAR))
    elif background.style == "stripes":
        pen = ImageDraw.Draw(canvas)
        step = background.period * scale
        for start in range(0, height if background.is_vertical else width, step):
            end = start + step // 2 - 1
            stripe = (0, start, width, end) if background.is_vertical else (start, 0, end, height)
            pen.rectangle(stripe, fill=background.second)
    return canvas


@lru_cache(maxsize=256)
def _unit_polygon(name: str, angle: float) -> tuple[tuple[float, float], ...]:
    """Corners of a shape, turned and then stretched to fill the unit square exactly."""
    if name == "square":
        corners = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    elif name == "triangle":
        corners = [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)]
    elif name == "diamond":
        corners = [(0.0, -1.0), (0.8, 0.0), (0.0, 1.0), (-0.8, 0.0)]
    elif name == "star":
        radii = (1.0, 0.4)
        corners = [
            (radii[k % 2] * math.sin(k * math.pi / 5), -radii[k % 2] * math.cos(k * math.pi / 5)) for k in range(10)
        ]
    elif name == "cross":
        arm = 0.34
        quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
        corners = list(quarter)
        for _ in range(3):
            quarter = [(-y, x) for x, y in quarter]
            corners += quarter
    else:
        raise ValueError(f"unknown shape {name!r}; known are {', '.join(SHAPE_NAMES)}")
    turn = math.radians(angle)
    turned = [(x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)) for x, y in corners]
    left, top = min(x for x, _ in turned), min(y for _, y in turned)
    width, height = max(x for x, _ in turned) - left, max(y for _, y in turned) - top
    return tuple(((x - left) / width, (y - top) / height) for x, y in turned)


def _draw_shape(pen: ImageDraw.ImageDraw, item: SceneObject, scale: int) -> None:
    # PIL paints the last row and column of what it is given, hence the 1 less.
    x1, y1, x2, y2 = (value * scale for value in item.box)
    x2, y2 = x2 - 1, y2 - 1
    if item.name == "circle":
        pen.ellipse((x1, y1, x2, y2), fill=item.rgb)
        return
    corners = _unit_polygon(item.name, item.angle)
    pen.polygon([(round(x1 + x * (x2 - x1)), round(y1 + y * (y2 - y1))) for x, y in corners], fill=item.rgb)


@lru_cache
def _font() -> Any:
    """Pillow's own font at a large size."""
    return ImageFont.load_default(TEXT_MASK_SIZE)


@lru_cache(maxsize=2048)
def _text_mask(text: str) -> Image.Image:
    """The ink of a text, large, cut tight."""
    font = _font()
    left, top, right, bottom = font.getbbox(text)
    mask = Image.new("L", (math.ceil(right - left) + 8, math.ceil(bottom - top) + 8))
    ImageDraw.Draw(mask).text((4 - left, 4 - top), text, fill=255, font=font, stroke_width=1)
    return mask.crop(mask.getbbox())


@lru_cache(maxsize=2048)
def _letter_edges(text: str) -> tuple[float, ...]:
    """Where the letters of a text begin and the last one ends, as parts of its width, about 0 to 1."""
    font = _font()
    left, _, right, _ = font.getbbox(text)
    return tuple((font.getlength(text[:count]) - left) / (right - left) for count in range(len(text) + 1))


def _draw_text(canvas: Image.Image, item: SceneObject, scale: int) -> None:
    x1, y1, x2, y2 = (round(value * scale) for value in item.box)
    ink = _text_mask(item.name).resize((x2 - x1, y2 - y1), Image.Resampling.BICUBIC)
    canvas.paste(item.rgb, (x1, y1), ink)


def random_size(rng: random.Random) -> Size:
    """Draws a picture size: 112 to 640 pixels a side, the longer side at most twice the shorter."""
    if rng.random() >= FREE_SIZE_PROBABILITY:
        sizes, weights = zip(*COMMON_SIZES, strict=True)
        return rng.choices(sizes, weights)[0]
    area, aspect = rng.uniform(160, 400) ** 2, 2 ** rng.uniform(-0.98, 0.98)
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def random_background(rng: random.Random) -> Background:
    """Draws a light ground: white, grey or pastel, sometimes with a soft passage or faint stripes."""
    level = rng.randint(232, 255)
    tint = rng.choice((0, 0, 8, 16))
    first = tuple(level - rng.randint(0, tint) for _ in range(3))
    second = tuple(value - rng.randint(6, 14) for value in first)
    style = rng.choices(("plain", "gradient", "stripes"), (70, 20, 10))[0]
    return Background(style, first, second, rng.random() < 0.5, rng.randint(8, 24))  # type: ignore[arg-type]


def vary_color(rng: random.Random, rgb: RGB) -> RGB:
    """A colour by up to `COLOR_JITTER` away in every channel."""
    red, green, blue = (min(255, max(0, value + rng.randint(-COLOR_JITTER, COLOR_JITTER))) for value in rgb)
    return red, green, blue


class ObjectPlan(NamedTuple):
    """What an object will be, before it has a place."""

    kind: Kind
    name: str
    color: str


def random_word(rng: random.Random, words: Sequence[str] | None = None) -> str:
    """Draws one of `words`; by default a word of `TRAIN_WORDS` or, as often, 3 to 6 letters that make none."""
    if words is not None:
        return rng.choice(words)
    if rng.random() < 0.5:
        return rng.choice(TRAIN_WORDS)
    weights = [LETTER_WEIGHTS.get(letter, 1) for letter in LETTERS]
    while True:
        text = "".join(rng.choices(LETTERS, weights, k=rng.choice(WORD_LENGTHS)))
        if text not in HELD_OUT_WORDS:
            return text


def random_number(rng: random.Random) -> str:
    """Draws a number of 1 to 4 digits."""
    digits = rng.choices((1, 2, 3, 4), (15, 35, 30, 20))[0]
    return str(rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1))


def random_text_plan(rng: random.Random, words: Sequence[str] | None = None) -> ObjectPlan:
    """Draws a word (see `random_word`) or, as often, a number."""
    if rng.random() < 0.5:
        return ObjectPlan("word", random_word(rng, words), TEXT_COLOR)
    return ObjectPlan("number", random_number(rng), TEXT_COLOR)


def _extent(rng: random.Random, plan: ObjectPlan, size: Size, low: float, high: float) -> Size:
    """Draws a width and height: of shapes between the parts `low` and `high` of the picture's shorter side."""
    if plan.kind != "shape":
        return text_extent(plan.name, rng.uniform(*TEXT_HEIGHTS) / tile_scale(size), 0.9 * size[0])
    side = rng.uniform(low, high) * min(size)
    stretch = math.sqrt(rng.uniform(0.8, 1.25))
    return max(4, round(side * stretch)), max(4, round(side / stretch))


def text_extent(text: str, height: float, max_width: float) -> Size:
    """Width and height in pixels of a printed text with letters of a height, smaller where it would be too wide."""
    mask = _text_mask(text)
    height = min(height, max_width * mask.height / mask.width)
    return max(4, round(height * mask.width / mask.height)), max(4, round(height))


def _is_free(box: Box, taken: Sequence[Box], gap: float) -> bool:
    x1, y1, x2, y2 = box
    return all(x1 >= r + gap or x2 + gap <= l or y1 >= b + gap or y2 + gap <= t for l, t, r, b in taken)  # noqa: E741


def place_objects(
    rng: random.Random,
    plans: Sequence[ObjectPlan],
    size: Size,
    *,
    min_side_fraction: float = 0.14,
    max_side_fraction: float = 0.45,
) -> tuple[SceneObject, ...]:
    """Gives every planned object a size and a free place; leaves out those that find none.

    Args:
        rng: Source of chance.
        plans: What to place, in order.
        size: Width and height of the picture in pixels.
        min_side_fraction: Smallest object side, as a part of the picture's shorter side.
        max_side_fraction: Largest one. Texts have heights of their own, `TEXT_HEIGHTS`.

    Raises:
        ValueError: If the fractions are not 0 < min <= max <= 0.9.
    """
    if not 0 < min_side_fraction <= max_side_fraction <= 0.9:
        raise ValueError(
            f"object sides need 0 < min <= max <= 0.9 of the picture, got {min_side_fraction} and {max_side_fraction}"
        )
    gap = math.ceil(0.02 * min(size))
    placed: list[SceneObject] = []
    for plan in plans:
        rgb = vary_color(rng, TEXT_RGB if plan.kind != "shape" else COLORS[plan.color])
        most = MAX_ANGLES.get(plan.name, 0) if plan.kind == "shape" else 0
        angle = float(rng.randint(-most, most)) if rng.random() < 0.4 else 0.0
        for attempt in range(PLACING_ATTEMPTS):
            # Later attempts try smaller objects.
            high = max_side_fraction - (max_side_fraction - min_side_fraction) * attempt / PLACING_ATTEMPTS
            width, height = _extent(rng, plan, size, min_side_fraction, high)
            x1, y1 = rng.randint(0, max(0, size[0] - width)), rng.randint(0, max(0, size[1] - height))
            box = (float(x1), float(y1), float(x1 + width), float(y1 + height))
            if _is_free(box, [item.box for item in placed], gap):
                placed.append(SceneObject(plan.kind, plan.name, plan.color, box, rgb, angle))
                break
    return tuple(placed)


def _check_names(what: str, names: Sequence[str] | None, known: Sequence[str]) -> None:
    if names is not None and (not names or not set(names) <= set(known)):
        raise ValueError(f"{what} must be some of {', '.join(known)}, got {list(names)}")


def random_plans(
    rng: random.Random,
    num_objects: int,
    *,
    text_probability: float = 0.25,
    unique: bool = False,
    shapes: Sequence[str] | None = None,
    colors: Sequence[str] | None = None,
    words: Sequence[str] | None = None,
) -> list[ObjectPlan]:
    """Draws what a scene holds; see `random_scene` for the arguments."""
    _check_names("shapes", shapes, SHAPE_NAMES)
    _check_names("colors", colors, COLOR_NAMES)
    if shapes is None:
        shapes = SHAPE_NAMES if rng.random() < 0.75 else rng.sample(SHAPE_NAMES, rng.randint(1, 3))
    if colors is None:
        colors = COLOR_NAMES if rng.random() < 0.75 else rng.sample(COLOR_NAMES, rng.randint(1, 3))
    pairs = [(color, shape) for color in colors for shape in shapes]
    plans = []
    if text_probability > 0 and rng.random() < text_probability:
        plans.append(random_text_plan(rng, words))
        if num_objects > 2 and rng.random() < 0.2:
            plans.append(random_text_plan(rng, words))
    wanted = max(0, num_objects - len(plans))
    picked = rng.sample(pairs, min(wanted, len(pairs))) if unique else [rng.choice(pairs) for _ in range(wanted)]
    return plans + [ObjectPlan("shape", shape, color) for color, shape in picked]


def random_scene(
    rng: random.Random,
    *,
    size: Size | None = None,
    num_objects: tuple[int, int] = (1, 6),
    text_probability: float = 0.25,
    min_side_fraction: float = 0.14,
    max_side_fraction: float = 0.45,
    unique: bool = False,
    shapes: Sequence[str] | None = None,
    colors: Sequence[str] | None = None,
    words: Sequence[str] | None = None,
) -> Scene:
    """Draws a scene. It always ends: an object that finds no free place is left out, the first one always fits.

    Args:
        rng: Source of chance.
        size: Width and height in pixels; drawn by `random_size` if not given.
        num_objects: Fewest and most objects, both included.
        text_probability: How often a scene holds a printed word or number (counted among the objects).
        min_side_fraction: Smallest object side, as a part of the picture's shorter side.
        max_side_fraction: Largest one.
        unique: Whether no two shapes share both shape and colour.
        shapes: Shapes to draw from. By default all of them, and in one scene of four only one to three.
        colors: The same for colours.
        words: Words to print, see `random_word`.

    Raises:
        ValueError: If the bounds on the number or the size of objects make no sense, or a shape or colour is unknown.
    """
    low, high = num_objects
    if not 0 <= low <= high:
        raise ValueError(f"num_objects must be (fewest, most) with 0 <= fewest <= most, got {num_objects}")
    size = size if size is not None else random_size(rng)
    background = random_background(rng)
    plans = random_plans(
        rng,
        rng.randint(low, high),
        text_probability=text_probability,
        unique=unique,
        shapes=shapes,
        colors=colors,
        words=words,
    )
    objects = place_objects(rng, plans, size, min_side_fraction=min_side_fraction, max_side_fraction=max_side_fraction)
    return Scene(*size, background, objects)


def mark_object(rng: random.Random, scene: Scene) -> Scene:
    """The scene with one of its shapes in a red rectangle; as it is where it has none."""
    numbers = [number for number, item in enumerate(scene.objects) if item.kind == "shape"]
    return replace(scene, marked=rng.choice(numbers)) if numbers else scene


def small_scene(rng: random.Random, *, size: Size | None = None, num_objects: tuple[int, int] = (1, 6)) -> Scene:
    """Draws a scene of shapes whose sides are all under a twelfth of the picture's shorter side."""
    size = size if size is not None else rng.choice(LARGE_SIZES)
    low, high = SMALL_SIDE_FRACTIONS
    return random_scene(
        rng, size=size, num_objects=num_objects, text_probability=0.0, min_side_fraction=low, max_side_fraction=high
    )
