"""Whether the weight files of a checkpoint are all there and whole, without reading the weights."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from deepseek_vl2.models.weight_headers import INDEX_FILE, WEIGHTS_FILE, read_header, weight_files


class WeightFiles(NamedTuple):
    """What a folder holds of a checkpoint's weights.

    Attributes:
        files: The weight files that belong to the checkpoint and are there.
        num_bytes: Bytes of all their tensors.
        problems: What is missing or broken, a sentence each; empty if the checkpoint is whole.
        shapes: Of all their tensors, by name.
    """

    files: list[Path]
    num_bytes: int
    problems: list[str]
    shapes: dict[str, tuple[int, ...]]


def check_weight_files(folder: Path) -> WeightFiles:
    """Compares index, files and headers of a checkpoint."""
    if (folder / INDEX_FILE).is_file() or (folder / WEIGHTS_FILE).is_file():
        try:
            return _check_files(weight_files(folder))
        except ValueError as error:
            return WeightFiles([], 0, [str(error)], {})
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    found = f", only {', '.join(shards[:3])}{', ...' if len(shards) > 3 else ''}" if shards else ""
    return WeightFiles([], 0, [f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{found}"], {})


def _check_files(names: dict[Path, set[str]]) -> WeightFiles:
    """Checks files that should hold at least the named tensors."""
    files, num_bytes, problems = [], 0, []
    shapes: dict[str, tuple[int, ...]] = {}
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
        shapes |= {name: tuple(tensor["shape"]) for name, tensor in header.items()}
        lacking = sorted(expected - header.keys())
        if lacking:
            problems.append(f"{file.name} lacks {len(lacking)} tensors that the index names, such as {lacking[0]}")
    return WeightFiles(files, num_bytes, problems, shapes)


def compare_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], optional: tuple[str, ...] = ()
) -> list[str]:
    """What a checkpoint's tensors lack for a model, a sentence each; empty if they are the model's.

    Args:
        found: Shapes of the checkpoint's tensors by name.
        expected: The same as the model needs them.
        optional: Patterns of names that may be missing.
    """
    missing = [
        name for name in expected.keys() - found.keys() if not any(re.search(pattern, name) for pattern in optional)
    ]
    others = {
        name: f"{name} of shape {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    }
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors of its config.json's model are missing, such as {min(missing)}")
    if others:
        problems.append(f"{len(others)} tensors do not fit its config.json, such as {others[min(others)]}")
    return problems
