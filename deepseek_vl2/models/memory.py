"""How much memory a checkpoint's weights will take, and whether there is as much, before any weight is read."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .machine_limits import available_bytes
from .quantization.choice import own_quantization
from .quantization.config import QUANTIZATIONS, WeightOnlyConfig
from .quantization.layers import EXPERT_WEIGHTS, SCALES, is_exact
from .quantization.packing import padded_rows
from .weight_headers import stored_tensors, weight_files

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NO_LINEARS = ("embed_tokens", "gate")


def checkpoint_bytes(
    path: str | os.PathLike[str],
    quantize: str | WeightOnlyConfig | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
) -> int:
    """Memory that the weights of a checkpoint take once they are loaded, from the headers of its files.

    Args:
        path: Folder of the checkpoint.
        quantize: `int8`, `int4`, a configuration, or None to load the weights as they are; a checkpoint that is
            quantised stays so.
        dtype: Type of the weights that are not quantised, or `auto` for their own.

    Raises:
        FileNotFoundError: If there are no safetensors files in the folder.
        ValueError: If the quantisation is unknown, or a file is broken.
    """
    config = quantize
    if isinstance(config, str):
        if config not in QUANTIZATIONS:
            raise ValueError(f"unknown quantisation {config!r}: take {' or '.join(QUANTIZATIONS)}")
        config = WeightOnlyConfig(QUANTIZATIONS[config])
    is_tied = _is_tied(Path(path))
    total = 0
    for name, shape, kind in stored_tensors(Path(path)):
        if config and kind.endswith(("F16", "F32", "F64")) and is_quantized(name, shape, is_tied):
            total += quantized_bytes(name, shape, config)
        else:
            is_cast = dtype != "auto" and "F" in kind and not name.endswith(SCALES)
            total += math.prod(shape) * (dtype.itemsize if is_cast else _BYTES[kind])  # type: ignore[union-attr]
    return total


def check_memory(
    path: str | os.PathLike[str],
    quantize: str | WeightOnlyConfig | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
) -> None:
    """Refuses a checkpoint whose weights do not fit into memory, before they are read.

    Args:
        path: See `checkpoint_bytes`, like the others.
        quantize: How the weights are to be held.
        dtype: Type of what is not quantised.

    Raises:
        ValueError: If they do not fit, the message says what would; and see `checkpoint_bytes`.
        FileNotFoundError: See `checkpoint_bytes`.
    """
    needed, available = checkpoint_bytes(path, quantize, dtype), available_bytes()
    if needed <= available:
        return
    own = own_quantization(SimpleNamespace(**_config_of(Path(path))))
    kind = own or (quantize.name if isinstance(quantize, WeightOnlyConfig) else quantize) or _name(dtype)
    # A quantised checkpoint has no other form.
    others = () if own else (None, *QUANTIZATIONS)
    smaller = {other or _name(torch.bfloat16): checkpoint_bytes(path, other) for other in others}
    fitting = [f"{name} ({_gigabytes(size)})" for name, size in smaller.items() if size <= available and size < needed]
    if fitting:
        way_out = f"would fit: {', '.join(fitting)}"
    elif own == "int8" and (size := _bytes_requantised_to_int4(Path(path))) <= available:
        way_out = f"its original quantised to int4 would fit ({_gigabytes(size)})"
    else:
        way_out = "no quantisation would fit; take a smaller model"
    raise ValueError(
        f"not enough memory for the weights in {os.fspath(path)}: they take {_gigabytes(needed)} as {kind}, "
        f"{_gigabytes(available)} are available; {way_out}"
    )


def check_memory_of_files(
    files: Sequence[str | os.PathLike[str]],
    quantize: str | WeightOnlyConfig | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
) -> None:
    """Does what `check_memory` does, for the files that transformers is about to load.

    Files of other kinds have no headers to read, and those under other names, such as another variant's, are not those
    that would be counted: they are loaded unchecked.

    Args:
        files: At least one.
        quantize: See `check_memory`.
        dtype: See `check_memory`.

    Raises:
        ValueError: See `check_memory`.
        FileNotFoundError: See `check_memory`.
    """
    folder = Path(files[0]).parent
    if weight_files(folder).keys() == {Path(file) for file in files}:
        check_memory(folder, quantize, dtype)


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _bytes_requantised_to_int4(folder: Path) -> int:
    """What the original of an int8 checkpoint would take in int4."""
    config = WeightOnlyConfig(QUANTIZATIONS["int4"])
    total = 0
    for name, shape, kind in stored_tensors(folder):
        if kind == "I8":
            total += quantized_bytes(name, shape, config)
        elif not name.endswith(SCALES):
            total += math.prod(shape) * _BYTES[kind]
    return total


def _is_tied(folder: Path) -> bool:
    config = _config_of(folder)
    return bool(config.get("language_config", config).get("tie_word_embeddings", False))


def is_quantized(name: str, shape: Sequence[int], is_tied: bool = False) -> bool:
    """Whether a tensor of that name is the weight of a layer that is quantised; the counterpart of `replace_layers`.

    Args:
        name: In the model or in a checkpoint, where experts stand one by one.
        shape: Of the tensor.
        is_tied: Whether the output layer shares its weight with the embeddings.
    """
    parts = name.split(".")
    if parts[-1] in EXPERT_WEIGHTS:
        return len(shape) == 3
    is_linear = parts[-1] == "weight" and len(shape) == 2 and parts[-2] not in _NO_LINEARS
    return is_linear and not is_exact(name) and not (is_tied and parts[-2] == "lm_head")


def quantized_bytes(name: str, shape: Sequence[int], config: WeightOnlyConfig) -> int:
    """Bytes of a quantised weight [..., N, K] of that name with its scales.

    Experts are counted one by one, as they stand in files; fused and filled up together they may take a little less.
    """
    *experts, num_rows, num_inputs = shape
    weight_format = config.choose_format(name, num_inputs)
    rows = padded_rows(num_rows, weight_format)
    if weight_format.group_size is None:
        return math.prod(experts) * rows * (num_inputs + 2)
    return math.prod(experts) * rows * (num_inputs // 2 + num_inputs // weight_format.group_size * 4)
