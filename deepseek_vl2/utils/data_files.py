"""What the commands share about their files: lines of JSON, pictures by path, files written at once."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deepseek_vl2.models.chat_format import is_picture_part

# Two letters at least: C: is a drive.
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_SOURCE_KEYS = ("image_url", "image", "url", "path")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """Reads JSON.

    Raises:
        ValueError: it is none, not UTF-8, or escapes half a character.
    """
    try:
        # Some editors put a byte order mark in front.
        plain = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(plain)
        if _SURROGATE.search(plain):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"a text holds half a character: {error.object[error.start]!r}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: brackets are nested too deeply") from None


def picture_path(name: Any, folder: Path) -> str:
    """A picture's full path.

    Args:
        name: the path as a file gives it.
        folder: what it is relative to.

    Raises:
        ValueError: it is no path.
        FileNotFoundError: there is no such file.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"a picture is given by its path, not by {name!r:.80}")
    path = folder.resolve() / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {name!r} (looked for {path})")
    return str(path)


def with_full_paths(message: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A message of a conversation with full paths of its pictures, in its list and in its parts; addresses stay.

    Args:
        message: as the processor takes it.
        folder: what paths are relative to.

    Raises:
        ValueError: a picture is given by neither path nor address.
        FileNotFoundError: there is no such file.
    """
    result = dict(message)
    images = message.get("images")
    if images is not None:
        if not isinstance(images, list):
            raise ValueError(f"'images' must be a list of paths, not {images!r:.80}")
        result["images"] = [_full_path(source, folder) for source in images]
    if isinstance(message.get("content"), list):
        result["content"] = [dict(_part_with_full_path(part, folder)) for part in message["content"]]
    return result


def _part_with_full_path(part: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    for key, value in part.items():
        is_source = is_picture_part(part) and key in _SOURCE_KEYS
        yield key, _full_path(value, folder) if is_source else value


def _full_path(source: Any, folder: Path) -> Any:
    """A picture's path in full; an address stays.

    Raises:
        ValueError: it is neither.
        FileNotFoundError: there is no such file.
    """
    if isinstance(source, Mapping) and "url" in source:
        return {**source, "url": _full_path(source["url"], folder)}
    if isinstance(source, str) and ADDRESS.match(source):
        return source
    return picture_path(source, folder)


def write_whole(path: Path, text: str) -> None:
    """Writes a file at once: a program that is stopped meanwhile leaves the old one.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several processes may write the same
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
