"""One picture from outside: from a path, an address, bytes, PIL or numpy to an upright RGB picture.

Sources are trusted input: a message can name any file that this process may read and any address that it can reach. A
server that takes messages from strangers must check them before it loads their pictures.
"""

import errno
import io
import logging
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from PIL import Image

from deepseek_vl2.models.download import data_uri_bytes, fetch, local_path
from deepseek_vl2.models.image_transform import scale_to_bytes, to_rgb

logger = logging.getLogger(__name__)

PictureSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray | BinaryIO | io.IOBase
)

# Pillow warns above this number of pixels and refuses the double, so the default adds no rule of its own.
DEFAULT_MAX_PIXELS = 89_478_485
DEFAULT_MAX_BYTES = 64 * 2**20
DEFAULT_TIMEOUT = 10.0

# These readers start Ghostscript or the Windows graphics interface on the file.
_UNSAFE_FORMATS = {"EPS", "WMF"}
_ORIENTATION_TAG = 0x0112
# EXIF orientation -> what turns the stored picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
# What Pillow's readers raise on broken data, beside OSError. RuntimeError (of damaged AVIF) has NotImplementedError (of
# DDS with unknown codecs) among its kinds.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")


def load_image(
    source: PictureSource,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    timeout: float = DEFAULT_TIMEOUT,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Image.Image:
    """Load one picture, turn it upright (EXIF) and convert it to RGB, transparency on white.

    Of an animated picture the first frame is taken. 16-bit pictures are scaled from 0..65535, not clipped.

    Args:
        source: a path, a `file:`, `http:` or `https:` address, a data URI, encoded bytes, an open binary file, a PIL
            picture, or an array ([H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, uint16, bool, or floats 0..1).
        max_pixels: largest width times height, checked before decoding.
        timeout: seconds an address has to answer.
        max_bytes: largest size of a download or an open file.

    Returns:
        A new RGB picture.

    Raises:
        FileNotFoundError: there is no such file.
        TimeoutError: the address did not answer in time.
        ConnectionError: the address could not be reached.
        ValueError: no picture, broken or truncated data, too large, a refused address, an unsupported array.
        TypeError: the source is of another type.
    """
    name = _describe(source)
    if isinstance(source, np.ndarray):
        _check_shape(source.shape)
        _check_size(source.shape[1::-1], max_pixels, name)
        return to_rgb(array_to_image(source))
    if isinstance(source, Image.Image):
        return _decode(source, max_pixels, name)
    opened = _open_source(source, name, timeout, max_bytes)
    with opened, _identify(opened, name) as image:
        return _decode(image, max_pixels, name)


def read_image_size(source: PictureSource) -> tuple[int, int]:
    """Width and height that `load_image` will give a picture, read from its header alone.

    Args:
        source: a path, encoded bytes, or another source of `load_image` that is no PIL picture or array.

    Raises:
        OSError: as in `load_image`, like its other errors. Broken pixels are not found, and neither is the orientation
            of a PNG that notes it behind them.
    """
    name = _describe(source)
    opened = _open_source(source, name, DEFAULT_TIMEOUT, DEFAULT_MAX_BYTES)
    with opened, _identify(opened, name) as image:
        _check_size(image.size, DEFAULT_MAX_PIXELS, name)
        # Pillow itself turns pictures in TIFF upright, and gives their size so from the beginning.
        is_turned = image.format != "TIFF" and _TURNS.get(_orientation(image, name)) in _QUARTER_TURNS
        width, height = image.size
        return (height, width) if is_turned else (width, height)


def _describe(source: Any) -> str:
    """Name a source in messages: an address or path cut to a readable length, else its type."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        text = text if isinstance(text, str) else repr(text)
        return repr(text if len(text) <= 120 else f"{text[:80]}... ({len(text)} characters)")
    if isinstance(source, np.ndarray):
        return f"the array {source.shape} of {source.dtype}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"the picture of {memoryview(source).nbytes} bytes"
    return f"the picture given as {type(source).__name__}"


def _open_source(source: Any, name: str, timeout: float, max_bytes: int) -> BinaryIO:
    if isinstance(source, str):
        matched = _SCHEME.match(source)
        scheme = matched[1].lower() if matched else ""
        if scheme in ("http", "https"):
            return _in_memory(fetch(source, timeout=timeout, max_bytes=max_bytes), name)
        if scheme == "data":
            return _in_memory(data_uri_bytes(source), name)
        if scheme == "file":
            return _open_file(local_path(source), name)
        if matched and source.startswith("//", matched.end()):
            raise ValueError(f"cannot load {name}: addresses must start with http:, https:, file: or data:")
        return _open_file(Path(source), name)
    if isinstance(source, os.PathLike):
        return _open_file(Path(source), name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _in_memory(bytes(source), name)
    if hasattr(source, "read"):
        return _in_memory(_read_stream(source, name, max_bytes), name)
    raise TypeError(
        f"cannot load a picture from {type(source).__name__}: "
        "give a path, an address, bytes, an open binary file, a PIL picture or a numpy array"
    )


def _open_file(path: Path, name: str) -> BinaryIO:
    try:
        if path.is_dir():
            raise ValueError(f"{name} is a folder, not a picture")
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"{name} is an empty file")
        return path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such picture file", str(path)) from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise ValueError(f"{name} is too long for a path: pass base64 data as 'data:image/png;base64,...'") from None


def _in_memory(data: bytes, name: str) -> BinaryIO:
    if not data:
        raise ValueError(f"{name} is empty")
    return io.BytesIO(data)


def _read_stream(stream: Any, name: str, max_bytes: int) -> bytes:
    data = stream.read(max_bytes + 1)
    if not isinstance(data, bytes):
        raise TypeError(f"{name} must be open in binary mode: its read() gives {type(data).__name__}, not bytes")
    if len(data) > max_bytes:
        raise ValueError(f"{name} holds more than {max_bytes} bytes; raise max_bytes= if it is meant")
    return data


def _identify(opened: BinaryIO, name: str) -> Image.Image:
    """Read the header only."""
    Image.init()
    formats = [known for known in Image.OPEN if known not in _UNSAFE_FORMATS]
    try:
        return Image.open(opened, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large: {error} Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS.") from error
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture in a format that Pillow reads (or it is broken)") from None
    except _DECODING_ERRORS as error:
        raise ValueError(f"{name} has a broken picture header: {error}") from error


def _decode(image: Image.Image, max_pixels: int, name: str) -> Image.Image:
    _check_size(image.size, max_pixels, name)
    try:
        image.load()
    except (Image.DecompressionBombError, *_DECODING_ERRORS) as error:
        raise ValueError(f"{name} is a broken or truncated picture: {error}") from error
    upright = to_rgb(_turn_upright(image, name))
    upright.info = {}  # the orientation noted there is used up
    return upright


def _check_size(size: tuple[int, ...], max_pixels: int, name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels: its size is {width}x{height}")
    if width * height > max_pixels:
        raise ValueError(
            f"{name} is too large: {width}x{height} = {width * height} pixels, and the limit is {max_pixels}. "
            "Scale it down, or raise max_pixels= if it is meant."
        )


def _turn_upright(image: Image.Image, name: str) -> Image.Image:
    turn = _TURNS.get(_orientation(image, name))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image, name: str) -> int:
    try:
        # PNG's own method decodes the whole picture first, for an orientation that is noted behind the pixels.
        return Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except _DECODING_ERRORS as error:
        logger.warning("%s has a damaged EXIF block, its orientation is not known: %s", name, error)
        return 1


def array_to_image(array: np.ndarray) -> Image.Image:
    """Convert an array to a PIL picture of mode L, RGB or RGBA.

    Args:
        array: [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; uint8, uint16 (0..65535), bool, or floats 0..1.

    Raises:
        ValueError: another shape, dtype or range.
    """
    _check_shape(array.shape)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(scale_to_bytes(array)))


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4)):
        return
    hint = " (channels come last)" if len(shape) == 3 and shape[0] in (1, 3, 4) else ""
    raise ValueError(f"cannot read an array of shape {shape} as a picture: give [H, W] or [H, W, 1, 3 or 4]{hint}")
