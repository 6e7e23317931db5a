"""Helpers of the web page."""

import base64
import io
import logging
import re

import pytest
from PIL import Image

from deepseek_vl2.serve.app_modules.utils import configure_logger, parse_ref_bbox, pil_to_base64, strip_stop_words

GOOD = "<|ref|>cat<|/ref|><|det|>[[100, 100, 900, 900]]<|/det|>"
BAD = "<|ref|>cat<|/ref|><|det|>[[100, 100, 900]]<|/det|>"


def test_boxes_are_drawn_on_a_copy():
    image = Image.new("RGB", (200, 100))
    drawn = parse_ref_bbox(GOOD, image)
    assert drawn.size == image.size and drawn.tobytes() != image.tobytes()
    assert image.getcolors() == [(20000, (0, 0, 0))]


@pytest.mark.parametrize("response", ["", "a cat", BAD])
def test_no_boxes_no_picture(response):
    assert parse_ref_bbox(response, Image.new("RGB", (20, 10))) is None


def test_malformed_boxes_are_logged(caplog):
    parse_ref_bbox(BAD + GOOD, Image.new("RGB", (20, 10)))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "has 3 values, not 4" in caplog.text


def unpack(tag):
    kind, data, alt = re.fullmatch(r'<img src="data:image/(\w+);base64,([\w+/=]+)" alt="([^"]*)" />', tag).groups()
    return kind, Image.open(io.BytesIO(base64.b64decode(data))), alt


@pytest.mark.parametrize(
    ("size", "options", "shown"),
    [
        ((1600, 1200), {}, (533, 400)),
        ((1200, 1600), {}, (400, 533)),
        ((4000, 400), {}, (800, 80)),
        ((300, 200), {}, (300, 200)),
        ((3000, 2), {}, (800, 1)),
        ((1600, 1200), {"resize": False}, (1600, 1200)),
        ((1600, 1200), {"max_size": 100, "min_size": 90}, (100, 75)),
    ],
)
def test_inline_picture_sizes(size, options, shown):
    kind, picture, alt = unpack(pil_to_base64(Image.new("RGB", size), **options))
    assert (kind, picture.size, alt) == ("jpeg", shown, "user upload image")


@pytest.mark.parametrize(("asked", "kind"), [("jpeg", "jpeg"), ("JPG", "jpeg"), ("png", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16"])
def test_inline_picture_formats(asked, kind, mode):
    found, picture, _ = unpack(pil_to_base64(Image.new(mode, (9, 7)), format=asked))
    assert found == kind and picture.format.lower() == kind and picture.mode == "RGB"


def test_the_alternative_text_is_escaped():
    tag = pil_to_base64(Image.new("RGB", (3, 2)), alt='"><script>alert("x")</script>')
    assert "<script" not in tag and "&quot;&gt;&lt;script&gt;" in tag


def test_bad_options_of_the_inline_picture():
    with pytest.raises(ValueError, match="does not write the format 'tiger'"):
        pil_to_base64(Image.new("RGB", (3, 2)), format="tiger")
    with pytest.raises(ValueError, match="at least 1 pixel, got 0 and 400"):
        pil_to_base64(Image.new("RGB", (3, 2)), max_size=0)


@pytest.mark.parametrize(
    ("text", "stop_words", "left"),
    [
        (" hello <end> more", ["<end>"], "hello"),
        ("a STOP b <end>", ["<end>", "STOP"], "a"),
        ("<end>", ["<end>"], ""),
        ("nothing", ["<end>", ""], "nothing"),
        ("nothing ", [], "nothing"),
    ],
)
def test_stop_words(text, stop_words, left):
    assert strip_stop_words(text, stop_words) == left


@pytest.fixture
def clean_logger():
    logger = logging.getLogger("gradio_logger")
    yield
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


def test_logger_writes_to_standard_error_and_a_file(tmp_path, capsys, clean_logger):
    configure_logger()
    logger = configure_logger(tmp_path / "page.log")
    assert logger.name == "gradio_logger" and len(logger.handlers) == 2
    logger.info("model loaded")
    logger.debug("too fine")
    written = capsys.readouterr()
    assert written.out == "" and written.err.count("model loaded") == 1
    assert (tmp_path / "page.log").read_text().count("model loaded") == 1
    assert "too fine" not in written.err
