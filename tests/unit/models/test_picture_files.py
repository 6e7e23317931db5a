"""Pictures that transformers hands to the processor by address are read as `load_pil_images` reads them."""

import base64
import io
import struct

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from deepseek_vl2.models.image_transform import to_rgb
from deepseek_vl2.models.picture_files import load_image, read_image_size
from deepseek_vl2.nano.architecture import nano_processor
from deepseek_vl2.utils.io import load_pil_images

SEE_THROUGH = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
SEE_THROUGH.paste((200, 0, 0, 255), (0, 0, 20, 30))


@pytest.fixture(scope="module")
def processor():
    return nano_processor()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was held upright
    SEE_THROUGH.save(path, exif=exif)
    return path


def picture_of(processor, part):
    messages = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "What?"}]}]
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)


@pytest.mark.parametrize("form", ["path", "file", "data", "base64"])
def test_every_form_of_address(processor, file, form):
    packed = base64.b64encode(file.read_bytes()).decode()
    part = {
        "path": {"path": str(file)},
        "file": {"url": file.as_uri()},
        "data": {"url": f"data:image/png;base64,{packed}"},
        "base64": {"base64": packed},
    }[form]
    (upright,) = load_pil_images([{"role": "user", "content": "<image>", "images": [str(file)]}])
    assert upright.size == (30, 40)
    assert upright.getpixel((15, 35)) == (255, 255, 255)  # what was transparent is white
    messages = [{"role": "user", "content": "<image>\nWhat?"}]
    expected = processor(conversations=messages, images=[upright])
    found = picture_of(processor, part)
    assert torch.equal(found["images"], expected.images)
    assert torch.equal(found["input_ids"], expected.input_ids)


def test_missing_broken_and_huge_files_are_named(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such picture file.*none\.png"):
        picture_of(processor, {"path": str(tmp_path / "none.png")})
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png' is not a picture"):
        picture_of(processor, {"path": str(tmp_path / "text.png")})
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"huge\.png' is too large"):
        picture_of(processor, {"path": str(tmp_path / "huge.png")})


def test_a_picture_of_the_callers_own_is_taken_as_it_is(processor):
    buffer = io.BytesIO()
    SEE_THROUGH.save(buffer, "PNG")
    opened = Image.open(buffer)
    batch = processor(text="<image>", images=opened)
    expected = processor(text="<image>", images=to_rgb(SEE_THROUGH))
    assert torch.equal(batch["images"], expected["images"])


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_the_size_in_the_header_is_that_of_the_loaded_picture(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = io.BytesIO()
    Image.new("RGB", (30, 20)).save(encoded, form, exif=exif)
    assert read_image_size(encoded.getvalue()) == load_image(encoded.getvalue()).size


def test_the_size_is_read_without_the_pixels(tmp_path):
    path = tmp_path / "cut.png"
    Image.effect_noise((50, 40), 90).save(path)
    path.write_bytes(path.read_bytes()[:200])
    assert read_image_size(path) == (50, 40)
    with pytest.raises(ValueError, match="truncated"):
        load_image(path)
    with pytest.raises(FileNotFoundError):
        read_image_size(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="not a picture"):
        read_image_size(b"text")


def test_what_pillow_cannot_do_with_a_broken_file_is_told_as_a_broken_file():
    """DDS of an unknown codec: NotImplementedError, a kind of RuntimeError."""
    numbers = struct.pack("<7I", 124, 0x1007, 4, 4, 0, 0, 0)
    codec = struct.pack("<2I4s5I", 32, 4, b"ZZZZ", 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="the picture of 192 bytes has a broken picture header"):
        load_image(b"DDS " + numbers + bytes(44) + codec + struct.pack("<5I", 0x1000, 0, 0, 0, 0) + bytes(64))


@pytest.mark.parametrize("error", [RuntimeError("Failed to decode frame 0"), OverflowError("too large")])
def test_errors_of_decoders_name_the_picture(file, monkeypatch, error):
    def load(image):
        raise error

    monkeypatch.setattr(PngImageFile, "load", load)
    with pytest.raises(ValueError, match=r"turned\.png' is a broken or truncated picture"):
        load_image(file)
