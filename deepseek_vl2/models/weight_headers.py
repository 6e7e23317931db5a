"""What a checkpoint's index and the headers of its safetensors files say, without reading any weight."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
_LENGTH_BYTES = 8
# As in the safetensors library: no header is longer.
_MAX_HEADER_BYTES = 100_000_000


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """The files that a checkpoint's weights should be in, and which tensors its index expects in each.

    One file goes before an index, as in transformers: saving into a folder leaves the index of what was there before.
    Without an index it is one file, too, and nothing is expected of it.

    Raises:
        ValueError: The index is broken.
    """
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() or not index.is_file():
        return {folder / WEIGHTS_FILE: set()}
    files: dict[Path, set[str]] = {}
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        for tensor, file in content["weight_map"].items():
            files.setdefault(folder / file, set()).add(tensor)
        if not files or "metadata" not in content:  # transformers loads nothing without
            raise ValueError("its weight_map is empty, or its metadata are missing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is broken, copy or download it again: {error!r}") from error
    return files


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: for each tensor its `dtype`, `shape` and `data_offsets`.

    Raises:
        ValueError: The file is cut off, longer than its header says, or no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else size
        if length > min(size, _MAX_HEADER_BYTES) - _LENGTH_BYTES:
            raise ValueError(f"{file.name} is cut off or no safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file.name} is no safetensors file: {error}") from error
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    expected = _LENGTH_BYTES + length + end
    if size != expected:
        raise ValueError(f"{file.name} has {size} bytes, its header asks for {expected}: copy or download it again")
    return header


def stored_tensors(folder: Path) -> Iterator[tuple[str, list[int], str]]:
    """Name, shape and type of each tensor of a checkpoint.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file or the index is broken.
    """
    for file in sorted(weight_files(folder)):
        if not file.is_file():
            raise FileNotFoundError(
                f"the checkpoint lacks a file: {file}; it is half written or copied, save, copy or download it again"
            )
        try:
            header = read_header(file)
        except ValueError as error:
            raise ValueError(f"the weights in {file} are broken or cut off: {error}") from error
        yield from ((name, tensor["shape"], tensor["dtype"]) for name, tensor in header.items())
