"""Checks what callers hand to the processor, and brings it into one form."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from deepseek_vl2.models.picture_files import load_image

# Arguments of transformers' calls that have no effect here: a batch is always padded, bos is always put once.
_IGNORED_ARGUMENTS = {"return_tensors", "padding", "add_special_tokens", "videos", "audio", "truncation", "max_length"}
# Base64 without a `data:` in front, as transformers takes it. No path of a picture is that long without a dot.
_BARE_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{200,}={0,2}\s*")


def checked_resolutions(candidates: Any) -> tuple[tuple[int, int], ...]:
    """Return candidate resolutions as tuples, or raise a ValueError that shows them."""
    problem = ValueError(
        "candidate_resolutions has to be a list of (width, height), the first a square view and all others whole "
        f"multiples of it, got {candidates!r}"
    )
    if isinstance(candidates, str) or not isinstance(candidates, Sequence) or not candidates:
        raise problem
    for pair in candidates:
        is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not is_pair or not all(isinstance(side, int) and side > 0 for side in pair):
            raise problem
    view = candidates[0][0]
    if candidates[0][1] != view or any(side % view for pair in candidates for side in pair):
        raise problem
    return tuple((width, height) for width, height in candidates)


def check_messages(messages: Any) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(
                f"message {i} has to be a dictionary with role and content, got {message!r:.80}. One conversation at a "
                "time: encode several with force_batchify=False and join them with batchify"
            )


def checked_pictures(images: Any) -> list[Image.Image]:
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    for i, picture in enumerate(pictures):
        if not isinstance(picture, Image.Image):
            raise ValueError(
                f"images[{i}] is not a PIL picture but {type(picture).__name__} {picture!r:.80}: "
                "deepseek_vl2.utils.io.load_pil_images reads files, addresses and bytes"
            )
    return pictures


def check_transformers_arguments(arguments: Mapping[str, Any]) -> None:
    unknown = sorted(set(arguments) - _IGNORED_ARGUMENTS)
    if unknown:
        raise TypeError(f"unknown arguments {unknown}")
    if arguments.get("return_tensors") not in (None, "pt"):
        raise ValueError(f"return_tensors={arguments['return_tensors']!r} is not available, only 'pt'")
    if arguments.get("truncation"):
        raise ValueError("truncation would cut pictures apart: shorten the text or give fewer pictures")
    given = [name for name in ("videos", "audio") if arguments.get(name)]
    if given:
        raise ValueError(f"the model takes text and pictures, no {' and no '.join(given)}")


def pictures_by_text(images: Any, counts: Sequence[int]) -> list[list[Image.Image]]:
    """Give every text its pictures.

    Args:
        images: nothing, one picture, a flat list that is dealt out by the marks, or one list a text.
        counts: marks in every text.

    Raises:
        ValueError: the lists are not as many as the texts, or the flat list does not fit the marks.
    """
    if images is None:
        return [[] for _ in counts]
    if isinstance(images, (Image.Image, str, Path)):
        images = [images]
    if any(isinstance(item, (list, tuple)) for item in images):
        if len(images) != len(counts):
            raise ValueError(f"{len(images)} lists of pictures given for {len(counts)} text(s)")
        return [_load_all(row or []) for row in images]
    if len(counts) == 1:
        return [_load_all(images)]
    if len(images) != sum(counts):
        raise ValueError(f"{len(images)} picture(s) given for {list(counts)} marks in {len(counts)} texts")
    remaining = iter(_load_all(images))
    return [[next(remaining) for _ in range(count)] for count in counts]


def _load_all(images: Iterable[Any]) -> list[Image.Image]:
    """Read the pictures that transformers passes by address; what is a picture already stays."""
    return checked_pictures([_load(item) if isinstance(item, (str, Path)) else item for item in images])


def _load(source: str | Path) -> Image.Image:
    is_base64 = isinstance(source, str) and _BARE_BASE64.fullmatch(source)
    return load_image(f"data:;base64,{source}" if is_base64 else source)
