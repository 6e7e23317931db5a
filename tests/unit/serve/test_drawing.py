"""Boxes and labels on pictures."""

import numpy as np
import pytest
from PIL import Image, ImageChops

from deepseek_vl2.serve import labels
from deepseek_vl2.serve.grounding import MAX_JPEG_SIDE, GroundedBox, draw_boxes, save_drawing
from deepseek_vl2.serve.labels import FontFace, contrast_to, machine_fonts, palette_colour, readable_label

GREY = (127, 127, 127)


def changed(image, drawn):
    """Return where the drawing differs from the picture: left, top, right, bottom."""
    return ImageChops.difference(image.convert("RGB"), drawn).getbbox()


def test_a_box_is_drawn_on_a_copy_and_its_inside_is_left_alone():
    image = Image.new("RGB", (640, 480), GREY)
    drawn = draw_boxes(image, [GroundedBox("cat", (250, 250, 750, 750))], show_labels=False)
    assert image.getcolors() == [(640 * 480, GREY)]
    assert drawn.size == image.size and drawn.mode == "RGB"
    colour = palette_colour(0)
    for point in ((160, 240), (480, 240), (320, 120), (320, 360)):
        assert drawn.getpixel(point) == colour
    assert drawn.getpixel((320, 240)) == GREY
    left, top, right, bottom = changed(image, drawn)
    assert 150 <= left <= 160 and 110 <= top <= 120 and 480 <= right <= 490 and 360 <= bottom <= 370


def test_a_box_shows_on_a_ground_of_its_own_colour():
    image = Image.new("RGB", (300, 200), palette_colour(0))
    drawn = draw_boxes(image, [GroundedBox("cat", (250, 250, 750, 750))], show_labels=False)
    assert contrast_to(palette_colour(0)) in {colour for _, colour in drawn.getcolors()}


def test_the_same_label_has_the_same_colour_another_one_another():
    boxes = [GroundedBox(label, (x, 100, x + 100, 300)) for label, x in (("a", 100), ("b", 400), ("a", 700))]
    drawn = draw_boxes(Image.new("RGB", (1000, 1000), GREY), boxes, show_labels=False)
    first, second, third = (drawn.getpixel((box.to_pixels(1000, 1000)[0], 200)) for box in boxes)
    assert first == third == palette_colour(0) and second == palette_colour(1)


def test_lines_grow_with_the_picture():
    widths = []
    for side in (100, 1600):
        drawn = draw_boxes(
            Image.new("RGB", (side, side), GREY), [GroundedBox("", (250, 250, 750, 750))], show_labels=False
        )
        row = np.asarray(drawn)[side // 2, : side // 2]
        widths.append(int((row == palette_colour(0)).all(-1).sum()))
    assert widths == [1, 10]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (28, 28), (60, 90), (1500, 20), (20, 1500), (640, 480)])
@pytest.mark.parametrize("label", ["", "cat", "左边的长颈鹿", "a label " * 50, "x" * 5000, "\n\t\0", "🦒\ud800", "#"])
def test_any_picture_and_label_can_be_drawn(size, label):
    boxes = [GroundedBox(label, box) for box in ((0, 0, 999, 999), (999, 999, 999, 999), (500, 0, 500, 999))]
    assert draw_boxes(Image.new("RGB", size), boxes).size == size


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16", "LA"])
def test_any_mode_can_be_drawn(mode):
    assert draw_boxes(Image.new(mode, (50, 40)), [GroundedBox("cat", (100, 100, 900, 900))]).mode == "RGB"


@pytest.mark.parametrize("box", [(0, 0, 100, 100), (900, 0, 999, 50), (900, 950, 999, 999), (0, 900, 50, 999)])
def test_a_label_at_the_border_is_whole(box):
    """The label drawn at the border has as many pixels of its colour as the same label in the middle, or more."""
    image = Image.new("RGB", (640, 480), GREY)

    def label_pixels(where):
        found = GroundedBox("giraffe", where)
        return changed(draw_boxes(image, [found], show_labels=False), draw_boxes(image, [found]))

    left, top, right, bottom = label_pixels((400, 400, 450, 450))
    middle_width = right - left
    assert middle_width > 40
    left, top, right, bottom = label_pixels(box)
    assert left >= 0 and top >= 0 and right <= 640 and bottom <= 480
    assert right - left >= middle_width - 4 or bottom - top > 10


def test_labels_of_equal_boxes_do_not_cover_each_other():
    image = Image.new("RGB", (640, 480), GREY)
    boxes = [GroundedBox(f"label {index}", (400, 400, 600, 600)) for index in range(4)]
    drawn = np.asarray(draw_boxes(image, boxes))
    for index in range(4):
        assert (drawn == palette_colour(index)).all(-1).sum() > 300


def test_a_label_that_would_cover_a_small_picture_is_left_out():
    image = Image.new("RGB", (32, 32), GREY)
    boxes = [GroundedBox("a long label", (100, 400, 900, 900))]
    assert changed(draw_boxes(image, boxes, show_labels=False), draw_boxes(image, boxes)) is None


def luminance(colour):
    linear = [
        value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in np.array(colour) / 255
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_every_label_is_readable_and_no_two_colours_are_alike():
    colours = [palette_colour(index) for index in range(12)]
    for colour in colours:
        low, high = sorted((luminance(colour), luminance(contrast_to(colour))))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # the limit that WCAG 2 sets for text
    assert min(np.abs(np.subtract(a, b)).sum() for i, a in enumerate(colours) for b in colours[:i]) > 80
    assert palette_colour(12) == palette_colour(0)


@pytest.fixture
def only_pillows_font(monkeypatch):
    """A machine without any font."""
    monkeypatch.setattr(labels, "_FONT_NAMES", ("NoSuchFont.ttf",))
    machine_fonts.cache_clear()
    yield machine_fonts()
    machine_fonts.cache_clear()


def test_without_fonts_latin_is_written_and_the_rest_is_readable(only_pillows_font):
    assert [face.path for face in only_pillows_font] == [None]
    texts = [
        readable_label(label, 3, only_pillows_font)[0]
        for label in ("red ball", "长颈鹿", "Ångström", "dog 🐶", "", "  \n", "a\u200bb\tc")
    ]
    assert texts == ["red ball", "#3", "Angstrom", "dog ?", "#3", "#3", "ab c"]


def test_pictures_are_drawn_without_fonts(only_pillows_font):
    image = Image.new("RGB", (320, 240), GREY)
    boxes = [GroundedBox("长颈鹿", (300, 300, 700, 700))]
    assert changed(draw_boxes(image, boxes, show_labels=False), draw_boxes(image, boxes))


def test_a_letter_that_a_font_lacks_is_recognised():
    face = FontFace(None)
    assert all(face.has(letter) for letter in "Az09#?. ")
    assert not any(face.has(letter) for letter in "长🐶ሰ\U0010ffff")


def test_the_font_that_has_the_letters_is_taken(monkeypatch):
    latin, chinese = FontFace(None), FontFace(None)
    monkeypatch.setattr(chinese, "has", lambda letter: True)
    assert readable_label("长颈鹿", 1, (latin, chinese)) == ("长颈鹿", chinese)
    assert readable_label("cat", 1, (latin, chinese)) == ("cat", latin)


def test_fonts_are_looked_up_once(monkeypatch):
    machine_fonts()
    monkeypatch.setattr(labels.ImageFont, "truetype", lambda *arguments: pytest.fail("looked up again"))
    assert machine_fonts()[-1].path is None


def test_a_font_of_the_callers_choice_must_exist():
    with pytest.raises(OSError, match=r"cannot open|No such"):
        draw_boxes(Image.new("RGB", (99, 99)), [GroundedBox("a", (1, 2, 3, 4))], font_path="gone.ttf")


@pytest.mark.parametrize(("side", "name"), [(MAX_JPEG_SIDE, "boxes.jpg"), (MAX_JPEG_SIDE + 1, "boxes.png")])
def test_a_picture_too_long_for_jpeg_becomes_png(tmp_path, side, name):
    saved = save_drawing(Image.new("RGB", (side, 2), GREY), tmp_path / "boxes.jpg", quality=90)
    assert saved == tmp_path / name
    with Image.open(saved) as again:
        assert again.size == (side, 2)
