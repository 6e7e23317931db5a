"""What fine-tuning and benchmarks share about their files: lines of JSON, pictures by path, files written at once."""

import json
import os
import re
from pathlib import Path
from typing import Any

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


def write_whole(path: Path, text: str) -> None:
    """Writes a file at once: a program that is stopped meanwhile leaves the old one.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several processes may write the same
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
