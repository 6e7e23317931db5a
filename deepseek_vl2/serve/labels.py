"""Labels on pictures: fonts that have the letters, colours that can be told apart, places that are free."""

import unicodedata
from functools import lru_cache
from os import PathLike, fspath

from PIL import ImageDraw, ImageFont

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]

_PALETTE: tuple[Colour, ...] = (
    (214, 20, 64),
    (0, 112, 184),
    (255, 200, 0),
    (34, 128, 48),
    (145, 30, 180),
    (248, 140, 56),
    (70, 220, 220),
    (245, 120, 235),
    (124, 78, 30),
    (190, 240, 80),
    (0, 0, 128),
    (104, 104, 104),
)
# Fonts with Latin and Chinese letters first; Pillow looks for them in the system's font folders.
_FONT_NAMES = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "NotoSansSC-Regular.ttf",
    "SourceHanSansSC-Regular.otf",
    "SourceHanSansCN-Regular.otf",
    "SourceHanSans.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Medium.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "simhei.ttf",
    "DejaVuSans.ttf",
    "LiberationSans-Regular.ttf",
    "Arial.ttf",
)
_NO_SUCH_LETTER = "\U0010ffff"
_MIN_FONT_SIZE = 11
_MAX_LETTERS = 200
_MAX_SHARE = 8  # a label that covers more than 1/8 of the picture hides more than it tells
_STACKED = 6


def palette_colour(index: int) -> Colour:
    """Give the colour of the index-th label; they repeat after a dozen."""
    return _PALETTE[index % len(_PALETTE)]


def contrast_to(colour: Colour) -> Colour:
    """Choose black or white, whichever is easier to read on a colour (WCAG 2 relative luminance)."""
    linear = [value / 3294.6 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


class FontFace:
    """One font of the machine, in any size.

    Args:
        path: the font file, or `None` for the Latin font that Pillow brings.
        index: which face of a font collection.
    """

    def __init__(self, path: str | None, index: int = 0) -> None:
        self.path = path
        self.index = index
        self._known: dict[str, bool] = {}
        self._probe = self.at(24)
        self._tofu = self._bitmap(_NO_SUCH_LETTER)

    @lru_cache(maxsize=32)  # noqa: B019 - faces live as long as the process
    def at(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        """Load the font in a size of pixels."""
        if self.path is None:
            return ImageFont.load_default(size)
        return ImageFont.truetype(self.path, size, self.index)

    def has(self, letter: str) -> bool:
        """Tell whether the font draws a letter, or only the box that stands for missing ones."""
        if letter not in self._known:
            self._known[letter] = letter.isspace() or self._bitmap(letter) not in (self._tofu, None)
        return self._known[letter]

    def _bitmap(self, letter: str) -> tuple[tuple[int, int], bytes] | None:
        mask = self._probe.getmask(letter)
        return (mask.size, bytes(mask)) if mask.getbbox() else None


@lru_cache(maxsize=1)
def machine_fonts() -> tuple[FontFace, ...]:
    """Find the fonts to choose from, once: those with Chinese first, Pillow's own last."""
    found = []
    for name in _FONT_NAMES:
        try:
            path = ImageFont.truetype(name, _MIN_FONT_SIZE).path
        except OSError:
            continue
        found.append(FontFace(str(path), _simplified_chinese_face(str(path))))
    return (*found, FontFace(None))


@lru_cache(maxsize=8)
def font_at(path: str) -> FontFace:
    """Load a font of the caller's choice."""
    return FontFace(path, _simplified_chinese_face(path))


def _simplified_chinese_face(path: str) -> int:
    """Find the face for simplified Chinese in a collection; 0 if it has none."""
    if not path.lower().endswith((".ttc", ".otc")):
        return 0
    for index in range(32):
        try:
            family = ImageFont.truetype(path, _MIN_FONT_SIZE, index).getname()[0] or ""
        except OSError:
            return 0
        if {"SC", "CN"} & set(family.split()) and "Mono" not in family:
            return index
    return 0


def readable_label(label: str, number: int, fonts: tuple[FontFace, ...]) -> tuple[str, FontFace]:
    """Choose a font that has a label's letters, and write the label with the letters that it has.

    Args:
        label: any text.
        number: stands for the label when most of its letters are in no font.
        fonts: the fonts, the preferred first.

    Returns:
        One line of text and the font for it.
    """
    text = unicodedata.normalize("NFC", label[: 4 * _MAX_LETTERS])
    text = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
    text = "".join(letter for letter in text if unicodedata.category(letter) not in ("Cf", "Cs"))
    text = " ".join(text.split())[:_MAX_LETTERS]
    letters = text.replace(" ", "")
    missing = [sum(not font.has(letter) for letter in letters) for font in fonts]
    best = min(range(len(fonts)), key=missing.__getitem__)
    font = fonts[best]
    if not letters or 2 * missing[best] > len(letters):
        return f"#{number}", font
    return "".join(letter if font.has(letter) else _substitute(letter, font) for letter in text), font


def _substitute(letter: str, font: FontFace) -> str:
    """Replace a letter that the font lacks: by the one without its accents, else by a question mark."""
    plain = unicodedata.normalize("NFD", letter)[0]
    return plain if font.has(plain) else "?"


class LabelPlacer:
    """Writes labels at boxes so that they stay inside the picture and, where there is room, off each other.

    Args:
        draw: draws on the picture.
        size: width and height of the picture.
        font_path: a font to take before the machine's own.
    """

    def __init__(
        self, draw: ImageDraw.ImageDraw, size: tuple[int, int], font_path: str | PathLike[str] | None = None
    ) -> None:
        self._draw = draw
        self._width, self._height = size
        self._fonts = machine_fonts() if font_path is None else (font_at(fspath(font_path)), *machine_fonts())
        self._font_size = max(_MIN_FONT_SIZE, round(min(size) / 28))
        self._padding = max(2, self._font_size // 5)
        self._taken: list[Rectangle] = []

    def write(self, label: str, number: int, outline: Rectangle, colour: Colour) -> None:
        """Write one label, in black or white on the box's colour; nothing where the picture is too small for it."""
        text, face = readable_label(label, number, self._fonts)
        font = face.at(self._font_size)
        text = self._fit(text, font)
        _, ink_top, _, ink_bottom = font.getbbox(text + "Ag")
        width = round(font.getlength(text)) + 2 * self._padding
        height = round(ink_bottom - ink_top) + 2 * self._padding
        if not text or height > self._height or _MAX_SHARE * width * height > self._width * self._height:
            return
        left, top, right, bottom = self._place(outline, width, height)
        self._draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
        self._draw.text((left + self._padding, top + self._padding - ink_top), text, contrast_to(colour), font)
        self._taken.append((left, top, right, bottom))

    def _fit(self, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
        """Shorten a text to the picture's width; empty if not even one letter fits."""
        room = self._width - 2 * self._padding
        if font.getlength(text) <= room:
            return text
        for end in range(len(text) - 1, 0, -1):
            shortened = text[:end].rstrip() + "..."
            if font.getlength(shortened) <= room:
                return shortened
        return ""

    def _place(self, outline: Rectangle, width: int, height: int) -> Rectangle:
        """Choose above, below, inside at the top, inside at the bottom, or farther off: the first that is free."""
        box_left, box_top, box_right, box_bottom = outline
        lefts = [min(max(0, left), self._width - width) for left in (box_left, box_right + 1 - width)]
        tops = [box_top - height, box_bottom + 1, box_top, box_bottom + 1 - height]
        for rows in range(1, _STACKED):
            tops += [box_top - height - rows * height, box_bottom + 1 + rows * height]
        inside = [
            (left, top, left + width, top + height)
            for top in tops
            if 0 <= top <= self._height - height
            for left in lefts
        ]
        free = (place for place in inside if not any(_overlap(place, other) for other in self._taken))
        top = min(max(0, box_top), self._height - height)
        return next(free, inside[0] if inside else (lefts[0], top, lefts[0] + width, top + height))


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
