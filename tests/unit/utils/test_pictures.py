"""Pictures from files, bytes, PIL and numpy: modes, orientation, broken data."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from deepseek_vl2.utils.io import load_pil_images
from deepseek_vl2.utils.pictures import load_image

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def two_halves(size=(24, 16), left=RED, right=BLUE, mode="RGB"):
    """Draw a picture whose halves tell left from right."""
    width, height = size
    image = Image.new("RGB", size, right)
    ImageDraw.Draw(image).rectangle((0, 0, width // 2 - 1, height - 1), fill=left)
    return image.convert(mode)


def encoded(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def close(pixel, expected, tolerance=12):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, expected, strict=True))


def test_every_form_of_source_gives_the_same_picture(tmp_path):
    image = two_halves()
    data = encoded(image)
    file = tmp_path / "a b%20ü.png"
    file.write_bytes(data)
    packed = base64.b64encode(data).decode()
    percent = "".join(f"%{byte:02x}" for byte in data)
    sources = [
        file,
        str(file),
        file.as_uri(),
        file.as_uri().replace("file://", "file://localhost"),
        file.as_uri().replace("file://", "file:"),
        f"data:image/png;base64,{packed}",
        f"DATA:image/png;charset=x;BASE64,{packed[:40]}\n{packed[40:].rstrip('=')}",
        f"data:image/png,{percent}",
        f"data:;base64,{packed.replace('+', '%2B').replace('/', '%2F')}",
        data,
        bytearray(data),
        memoryview(data),
        io.BytesIO(data),
        image,
        Image.open(file),
        np.asarray(image),
    ]
    for source in sources:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert loaded.tobytes() == image.tobytes(), source
    with file.open("rb") as opened:
        assert load_image(opened).tobytes() == image.tobytes()
        assert not opened.closed


def test_the_given_picture_is_not_changed():
    image = two_halves()
    load_image(image).putpixel((0, 0), WHITE)
    assert image.getpixel((0, 0)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.new("RGB", (48, 32), "white")
    ImageDraw.Draw(upright).rectangle((0, 0, 15, 15), fill="red")  # top left
    ImageDraw.Draw(upright).rectangle((32, 0, 47, 15), fill="blue")  # top right
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "turned.jpg"
    stored.save(file, exif=exif, quality=95)
    for source in (file, Image.open(file)):
        loaded = load_image(source)
        assert loaded.size == (48, 32)
        assert close(loaded.getpixel((6, 6)), RED) and close(loaded.getpixel((41, 6)), BLUE)
        assert close(load_image(loaded).getpixel((6, 6)), RED)  # not turned a second time


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_in_other_formats(file_format):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(two_halves((48, 32)).transpose(Image.Transpose.ROTATE_90), file_format, exif=exif)
    for source in (data, Image.open(io.BytesIO(data))):
        loaded = load_image(source)
        assert loaded.size == (48, 32) and close(loaded.getpixel((4, 4)), RED, 30)


def test_damaged_exif_is_reported_and_the_picture_loads(caplog):
    data = encoded(two_halves((32, 16)), exif=b"MMnot a header")
    assert load_image(data).size == (32, 16)
    assert "EXIF" in caplog.text


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_transparency_turns_white(mode):
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 255))
    image.paste((90, 90, 90, 0), (4, 0, 8, 4))
    if mode in ("LA", "La"):
        image = image.convert("LA")
    elif mode == "PA":
        palette = Image.new("PA", (8, 4))
        palette.putpalette([0, 0, 0, 90, 90, 90])
        palette.paste((0, 255), (0, 0, 8, 4))
        palette.paste((1, 0), (4, 0, 8, 4))
        image = palette
    if mode in ("La", "RGBa"):
        image = image.convert(mode)
    loaded = load_image(image)
    assert loaded.getpixel((1, 1)) == BLACK and loaded.getpixel((6, 1)) == WHITE


def test_half_transparency_mixes_with_white():
    loaded = load_image(encoded(Image.new("RGBA", (3, 2), (255, 0, 0, 128))))
    assert close(loaded.getpixel((0, 0)), (255, 127, 127), 2)


def test_palette_with_transparency_from_a_file(tmp_path):
    image = two_halves(mode="P")
    transparent = image.getpixel((20, 2))
    file = tmp_path / "palette.png"
    image.save(file, transparency=transparent)
    loaded = load_image(file)
    assert loaded.getpixel((2, 2)) == RED and loaded.getpixel((20, 2)) == WHITE


def test_grey_png_with_a_transparent_value():
    data = encoded(two_halves(left=(10, 10, 10), right=(90, 90, 90), mode="L"), transparency=90)
    loaded = load_image(data)
    assert loaded.getpixel((2, 2)) == (10, 10, 10) and loaded.getpixel((20, 2)) == WHITE


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_is_scaled_not_clipped(file_format):
    values = np.array([[0, 257 * 10, 128 * 257, 65535]], dtype=np.uint16)
    loaded = load_image(encoded(Image.fromarray(values), file_format))
    assert np.asarray(loaded)[0].tolist() == [[v, v, v] for v in (0, 10, 128, 255)]


def test_16_bit_png_with_a_transparent_value():
    values = np.array([[0, 257 * 10, 128 * 257, 65535]], dtype=np.uint16)
    loaded = load_image(encoded(Image.fromarray(values), transparency=257 * 10))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 255, 128, 255]


def test_big_endian_16_bit():
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 0, 128 * 257))
    assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 128]


def test_integers_and_floats_of_unknown_range_are_refused():
    ranges = np.array([[0, 70000]], dtype=np.int32)
    with pytest.raises(ValueError, match=r"mode 'I' must lie in 0\.\.65535, this one spans 0\.\.70000"):
        load_image(Image.fromarray(ranges))
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1 to be a picture, this one spans 0\.\.200"):
        load_image(Image.fromarray(np.array([[0, 200]], dtype=np.float32)))
    assert load_image(Image.fromarray(np.array([[0, 1]], dtype=np.float32))).getpixel((1, 0)) == WHITE


@pytest.mark.parametrize(
    ("file_format", "mode", "tolerance"),
    [
        ("JPEG", "CMYK", 40),
        ("TIFF", "CMYK", 2),
        ("JPEG", "RGB", 12),
        ("PNG", "P", 0),
        ("BMP", "RGB", 0),
        ("WEBP", "RGB", 40),
        ("GIF", "P", 0),
        ("TIFF", "RGB", 0),
        ("JPEG", "YCbCr", 12),
    ],
)
def test_formats_and_modes(tmp_path, file_format, mode, tolerance):
    file = tmp_path / "picture"
    two_halves((64, 32), mode=mode).save(file, file_format)
    loaded = load_image(file)
    assert loaded.mode == "RGB" and loaded.size == (64, 32)
    assert close(loaded.getpixel((8, 8)), RED, tolerance) and close(loaded.getpixel((56, 8)), BLUE, tolerance)


def test_one_bit_pictures(tmp_path):
    file = tmp_path / "bits.png"
    two_halves(left=BLACK, right=WHITE, mode="1").save(file)
    loaded = load_image(file)
    assert loaded.getpixel((2, 2)) == BLACK and loaded.getpixel((20, 2)) == WHITE


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(tmp_path, file_format):
    file = tmp_path / "moving"
    frames = [Image.new("RGB", (9, 7), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(file, file_format, save_all=True, append_images=frames[1:], duration=50)
    loaded = load_image(file)
    assert loaded.size == (9, 7) and close(loaded.getpixel((4, 3)), RED)
    assert not getattr(loaded, "is_animated", False)


@pytest.mark.parametrize(
    ("array", "pixel"),
    [
        (np.full((5, 7), 10, np.uint8), (10, 10, 10)),
        (np.full((5, 7, 1), 10, np.uint8), (10, 10, 10)),
        (np.full((5, 7, 3), (1, 2, 3), np.uint8), (1, 2, 3)),
        (np.full((5, 7, 4), (1, 2, 3, 0), np.uint8), WHITE),
        (np.full((5, 7, 4), (1, 2, 3, 255), np.uint8), (1, 2, 3)),
        (np.full((5, 7, 3), (0.0, 0.5, 1.0)), (0, 128, 255)),
        (np.full((5, 7), 1.0, np.float32), WHITE),
        (np.full((5, 7), 0.5, np.float16), (128, 128, 128)),
        (np.full((5, 7, 3), (0, 128 * 257, 65535), np.uint16), (0, 128, 255)),
        (np.full((5, 7), 128 * 257, ">u2"), (128, 128, 128)),
        (np.full((5, 7), True), WHITE),
        (np.full((10, 14, 3), 9, np.uint8)[::2, ::-2], (9, 9, 9)),
    ],
)
def test_arrays(array, pixel):
    loaded = load_image(array)
    assert loaded.size == (7, 5) and loaded.mode == "RGB"
    assert loaded.getpixel((3, 2)) == pixel


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 20, 30), np.uint8), r"shape \(3, 20, 30\) .*channels come last"),
        (np.zeros((4, 5, 2), np.uint8), r"shape \(4, 5, 2\)"),
        (np.zeros(12, np.uint8), r"shape \(12,\)"),
        (np.zeros((1, 4, 5, 3), np.uint8), r"shape \(1, 4, 5, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), r"has no pixels: its size is 5x0"),
        (np.zeros((4, 5), np.int64), "array of int64"),
        (np.zeros((4, 5), np.complex64), "array of complex64"),
        (np.full((4, 5), 255.0), r"must lie in 0\.\.1 to be a picture, this one spans 255\.\.255"),
        (np.full((4, 5), -0.1), r"must lie in 0\.\.1"),
        (np.full((4, 5), np.nan), r"must lie in 0\.\.1"),
    ],
)
def test_arrays_that_are_no_picture(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


def test_missing_file_is_named(tmp_path):
    for source in (tmp_path / "gone.png", str(tmp_path / "gone.png"), (tmp_path / "gone.png").as_uri()):
        with pytest.raises(FileNotFoundError, match=r"gone\.png"):
            load_image(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is an empty file"),
        (b"hello, this is text\n", "is not a picture in a format that Pillow reads"),
        (b"\x89PNG\r\n\x1a\n", r"bad\.png"),
        (encoded(two_halves((200, 200)), "JPEG")[:700], "broken or truncated picture"),
        (encoded(two_halves((200, 200)), "JPEG")[:300], "has a broken picture header"),
        (encoded(two_halves((200, 200)))[:90], "broken or truncated picture"),
        (encoded(two_halves((64, 64)), "GIF")[:60], r"bad\.png"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not a picture in a format"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    file = tmp_path / "bad.png"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_image(file)
    assert "bad.png" in str(caught.value)
    with pytest.raises(ValueError, match=f"{len(content)} bytes"):
        load_image(content)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA", "PCX"])
def test_damaged_bytes_give_a_picture_or_a_value_error(file_format):
    rng = np.random.default_rng(5)
    picture = Image.fromarray(rng.integers(0, 255, (40, 33, 3), np.uint8))
    good = np.frombuffer(encoded(picture, file_format), np.uint8)
    for _ in range(60):
        bad = good[: rng.integers(1, len(good))].copy()
        bad[rng.integers(0, min(len(bad), 60), 4)] = rng.integers(0, 255, 4)
        try:
            assert load_image(bad.tobytes(), max_pixels=10**6).mode == "RGB"
        except ValueError as error:
            assert "bytes" in str(error)


def huge_png(width, height):
    """Write a PNG's header only: enough to know its size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + huge_body()


def huge_body():
    body = b"IDAT" + zlib.compress(b"\0" * 10)
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def test_too_many_pixels_are_refused_from_the_header():
    with pytest.raises(ValueError, match=r"5000x4000 = 20000000 pixels, and the limit is 1000000\."):
        load_image(huge_png(5000, 4000), max_pixels=10**6)
    with pytest.raises(ValueError, match=r"too large: .*3600000000 pixels.*MAX_IMAGE_PIXELS"):
        load_image(huge_png(60000, 60000))
    with pytest.raises(ValueError, match=r"30x20 = 600 pixels, and the limit is 599"):
        load_image(two_halves((30, 20)), max_pixels=599)
    with pytest.raises(ValueError, match=r"30x20 = 600 pixels, and the limit is 599"):
        load_image(np.zeros((20, 30, 3), np.uint8), max_pixels=599)
    assert load_image(two_halves((30, 20)), max_pixels=600).size == (30, 20)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_default_limit():
    with pytest.raises(ValueError, match="10000x10000 = 100000000 pixels, and the limit is 89478485"):
        load_image(huge_png(10000, 10000))


def test_zero_size_is_refused():
    with pytest.raises(ValueError, match="no pixels: its size is 0x5"):
        load_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("ftp://example.org/cat.png", ValueError, r"'ftp://example\.org/cat\.png': addresses must start with http:"),
        ("s3://bucket/cat.png", ValueError, "addresses must start with"),
        ("file://far.example/cat.png", ValueError, r"names the machine 'far\.example'"),
        ("data:image/png;base64", ValueError, "has no comma"),
        ("data:image/png;base64,@@@@", ValueError, "broken base64"),
        ("data:image/png;base64,", ValueError, "is empty"),
        ("data:,plain%20text", ValueError, "is not a picture in a format"),
        ("iVBORw0KGgo" * 400, ValueError, r"\(4400 characters\)' is too long for a path: pass base64 data as"),
        (b"", ValueError, "0 bytes is empty"),
        (None, TypeError, "cannot load a picture from NoneType: give a path"),
        (17, TypeError, "from int"),
        ({"url": "x"}, TypeError, "from dict"),
        (io.StringIO("text"), TypeError, "must be open in binary mode"),
    ],
)
def test_wrong_sources(source, error, message):
    with pytest.raises(error, match=message):
        load_image(source)


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)


def test_an_open_file_has_a_limit_of_bytes():
    data = encoded(two_halves())
    with pytest.raises(ValueError, match="holds more than 50 bytes"):
        load_image(io.BytesIO(data), max_bytes=50)
    assert load_image(io.BytesIO(data), max_bytes=len(data)).size == (24, 16)


def colours(images):
    return [image.getpixel((0, 0)) for image in images]


def test_messages_in_the_form_of_the_reference(tmp_path):
    for name, colour in (("1.png", RED), ("2.png", GREEN)):
        Image.new("RGB", (5, 4), colour).save(tmp_path / name)
    conversation = [
        {"role": "<|User|>", "content": "<image>\n<image>\ncompare", "images": [str(tmp_path / "2.png"), RED_PICTURE]},
        {"role": "<|Assistant|>", "content": ""},
        {"role": "<|User|>", "content": "no picture", "images": None},
        {"role": "<|User|>", "content": "<image>", "images": (tmp_path / "1.png",)},
    ]
    assert colours(load_pil_images(conversation)) == [GREEN, RED, RED]


RED_PICTURE, GREEN_PICTURE, BLUE_PICTURE = (Image.new("RGB", (3, 2), colour) for colour in (RED, GREEN, BLUE))


def test_content_parts_in_order():
    uri = f"data:image/png;base64,{base64.b64encode(encoded(BLUE_PICTURE)).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": uri, "detail": "high"}},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": uri},
        {"type": "image", "image": GREEN_PICTURE},
        {"type": "image", "url": uri},
        {"type": "image", "path": uri},
        {"type": "image", "base64": uri.partition(",")[2]},
        {"type": "image", "image": np.asarray(RED_PICTURE)},
    ]
    loaded = load_pil_images([{"role": "user", "content": content}])
    assert colours(loaded) == [BLUE, BLUE, GREEN, BLUE, BLUE, BLUE, RED]


def test_bare_parts_and_marks_take_from_the_messages_list():
    content = [
        {"type": "image"},
        {"type": "image", "image": BLUE_PICTURE},
        {"type": "text", "text": "<image> this"},
    ]
    message = {"role": "user", "content": content, "images": [RED_PICTURE, GREEN_PICTURE, RED_PICTURE]}
    assert colours(load_pil_images([message])) == [RED, BLUE, GREEN, RED]


@pytest.mark.parametrize(
    ("conversations", "error", "message"),
    [
        ([{"role": "user", "content": [{"type": "image"}]}], ValueError, "part of message 0 names no picture"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], ValueError, "names no picture"),
        ([{"content": ""}, {"content": "", "images": "cat.png"}], TypeError, "'images' of message 1 must be a list"),
        ({"role": "user"}, TypeError, "expected a list of messages, got dict"),
        (["hello"], TypeError, "message 0 must be a mapping"),
    ],
)
def test_wrong_messages(conversations, error, message):
    with pytest.raises(error, match=message):
        load_pil_images(conversations)


def test_limits_reach_every_picture():
    with pytest.raises(ValueError, match="the limit is 5"):
        load_pil_images([{"content": "<image>", "images": [RED_PICTURE]}], max_pixels=5)
