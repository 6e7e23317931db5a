"""Small helpers of the web page that need no web framework: boxes, inline pictures, stop words, the page's log."""

import base64
import html
import io
from collections.abc import Iterable

from PIL import Image

from deepseek_vl2.models.image_transform import to_rgb
from deepseek_vl2.serve.app_modules.logs import LOGGER_NAME, configure_logger
from deepseek_vl2.serve.grounding import draw_boxes, parse_grounding

__all__ = ["LOGGER_NAME", "configure_logger", "parse_ref_bbox", "pil_to_base64", "strip_stop_words"]


def parse_ref_bbox(response: str, image: Image.Image) -> Image.Image | None:
    """Draw the boxes that an answer holds.

    Args:
        response: the answer, special tokens kept. Malformed boxes are logged as warnings and left out.
        image: the picture that the answer is about.

    Returns:
        A new picture with the boxes, or `None` if the answer holds none.
    """
    boxes = parse_grounding(response)
    return draw_boxes(image, boxes) if boxes else None


def pil_to_base64(
    image: Image.Image,
    alt: str = "user upload image",
    resize: bool = True,
    max_size: int = 800,
    min_size: int = 400,
    format: str = "jpeg",
) -> str:
    """Write a picture as an HTML `img` element that holds its own data.

    Args:
        image: a picture of any mode.
        alt: the text in place of the picture; it is escaped.
        resize: shrink the picture (it is never enlarged).
        max_size: longest side after shrinking, in pixels.
        min_size: shorter side after shrinking, at most, in pixels.
        format: a format that Pillow writes and browsers show, such as jpeg, png or webp.

    Raises:
        ValueError: Pillow does not write the format, or a size is below 1.
    """
    if max_size < 1 or min_size < 1:
        raise ValueError(f"max_size and min_size must be at least 1 pixel, got {max_size} and {min_size}")
    kind = "jpeg" if format.lower() == "jpg" else format.lower()
    picture = to_rgb(image)
    if resize:
        scale = min(1.0, max_size / max(picture.size), min_size / min(picture.size))
        width, height = (max(1, round(side * scale)) for side in picture.size)
        if (width, height) != picture.size:
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    try:
        picture.save(buffer, format=kind)
    except KeyError as error:
        raise ValueError(f"Pillow does not write the format {format!r}: take jpeg, png or webp") from error
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(alt, quote=True)}" />'


def strip_stop_words(text: str, stop_words: Iterable[str]) -> str:
    """Cut a text before the first stop word in it, and strip the ends."""
    found = [position for word in stop_words if word and (position := text.find(word)) >= 0]
    return text[: min(found, default=len(text))].strip()
