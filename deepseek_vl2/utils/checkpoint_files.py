"""Whether the weight files of a checkpoint are all there and whole, without reading the weights."""

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
_LENGTH_BYTES = 8
# As in the safetensors library: no header is longer.
_MAX_HEADER_BYTES = 100_000_000


class WeightFiles(NamedTuple):
    """What a folder holds of a checkpoint's weights.

    Attributes:
        files: The weight files that belong to the checkpoint and are there.
        num_bytes: Bytes of all their tensors.
        problems: What is missing or broken, a sentence each; empty if the checkpoint is whole.
    """

    files: list[Path]
    num_bytes: int
    problems: list[str]


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


def check_weight_files(folder: Path) -> WeightFiles:
    """Compares index, files and headers of a checkpoint."""
    index_file = folder / INDEX_FILE
    if index_file.is_file():
        return _check_shards(folder, index_file)
    if (folder / WEIGHTS_FILE).is_file():
        return _check_files({folder / WEIGHTS_FILE: None})
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    found = f", only {', '.join(shards[:3])}{', ...' if len(shards) > 3 else ''}" if shards else ""
    return WeightFiles([], 0, [f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{found}"])


def _check_shards(folder: Path, index_file: Path) -> WeightFiles:
    try:
        weight_map = dict(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        return WeightFiles([], 0, [f"{INDEX_FILE} is broken: {error!r}"])
    names: dict[Path, set[str] | None] = {}
    for tensor, file in weight_map.items():
        names.setdefault(folder / file, set()).add(tensor)  # type: ignore[union-attr]
    return _check_files(names)


def _check_files(names: dict[Path, set[str] | None]) -> WeightFiles:
    """Checks files that should hold the named tensors; None for any."""
    files, num_bytes, problems = [], 0, []
    for file, expected in sorted(names.items()):
        if not file.is_file():
            problems.append(f"{file.name} is missing")
            continue
        files.append(file)
        try:
            header = read_header(file)
        except ValueError as error:
            problems.append(str(error))
            continue
        num_bytes += sum(end - start for start, end in (tensor["data_offsets"] for tensor in header.values()))
        lacking = sorted((expected or set()) - header.keys())
        if lacking:
            problems.append(f"{file.name} lacks {len(lacking)} tensors that the index names, such as {lacking[0]}")
    return WeightFiles(files, num_bytes, problems)
