"""Pictures of conversations; how one picture is read is told in `deepseek_vl2.models.picture_files`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from PIL import Image

from deepseek_vl2.models.picture_files import DEFAULT_MAX_BYTES, DEFAULT_MAX_PIXELS, DEFAULT_TIMEOUT, load_image
from deepseek_vl2.models.special_tokens import IMAGE

__all__ = ["load_image", "load_pil_images", "picture_sources"]


def load_pil_images(
    conversations: Iterable[Mapping[str, Any]],
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    timeout: float = DEFAULT_TIMEOUT,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> list[Image.Image]:
    """Load every picture of a conversation, in the order of its `<image>` marks.

    A message names its pictures in a list `images`, or as OpenAI-style parts of its content: `image_url` (an address,
    or a mapping with `url`) and `image` (with `image`, `url`, `path` or `base64`). A part that names nothing takes
    the next entry of the message's `images`.

    Args:
        conversations: the messages.
        max_pixels: see `load_image`.
        timeout: see `load_image`.
        max_bytes: see `load_image`.

    Returns:
        Upright RGB pictures.

    Raises:
        TypeError: a message is not a mapping, or `images` is not a list.
        ValueError: a picture part names no picture.
        OSError: as in `load_image`, like its other errors.
    """
    return [
        load_image(source, max_pixels=max_pixels, timeout=timeout, max_bytes=max_bytes)
        for source in picture_sources(conversations)
    ]


def picture_sources(conversations: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """Yield what a conversation names as pictures, unread; see `load_pil_images`.

    Raises:
        TypeError: a message is not a mapping, or `images` is not a list.
        ValueError: a picture part names no picture.
    """
    if isinstance(conversations, (str, bytes, Mapping)):
        raise TypeError(f"expected a list of messages, got {type(conversations).__name__}")
    for index, message in enumerate(conversations):
        yield from _message_sources(message, index)


def _message_sources(message: Mapping[str, Any], index: int) -> Iterator[Any]:
    """Yield what a message names as pictures, in the order of the text."""
    if not isinstance(message, Mapping):
        raise TypeError(f"message {index} must be a mapping with 'role' and 'content', got {type(message).__name__}")
    images = message.get("images")
    if images is not None and not isinstance(images, (list, tuple)):
        raise TypeError(f"'images' of message {index} must be a list of pictures, got {type(images).__name__}")
    listed = list(images or ())
    content = message.get("content")
    for part in content if isinstance(content, (list, tuple)) else ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            marks = str(part.get("text", "")).count(IMAGE)
            yield from listed[:marks]
            del listed[:marks]
        elif kind in ("image", "image_url"):
            yield _part_source(part, listed, index)
    yield from listed


def _part_source(part: Mapping[str, Any], listed: list[Any], index: int) -> Any:
    for key in ("image_url", "image", "url", "path"):
        value = part.get(key)
        if isinstance(value, Mapping):
            value = value.get("url")
        if value is not None:
            return value
    if part.get("base64") is not None:
        return f"data:;base64,{part['base64']}"
    if listed:
        return listed.pop(0)
    raise ValueError(
        f"a picture part of message {index} names no picture (keys: {sorted(map(str, part))}): "
        "give 'image_url', 'image', 'url', 'path' or 'base64', or fill the message's 'images'"
    )
