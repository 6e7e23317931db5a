"""Weights in a wider type than their checkpoint's, without holding them twice.

transformers casts each tensor of a file as soon as it is read, by threads that run ahead: in the wide type experts are
then in memory one by one and fused, beside the pages of the file. A bfloat16 checkpoint took 1.6 times its size in
float32 so; loaded as it is and widened weight by weight, it takes that size and one weight more.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .mapped_files import MappedFiles
from .weight_headers import stored_tensors

_NARROW: Mapping[str, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16}


def narrower_stored_dtype(folder: Path, dtype: torch.dtype) -> torch.dtype | None:
    """The type of all weights of a checkpoint, if that is narrower than `dtype`.

    Args:
        folder: Of the checkpoint.
        dtype: What the weights are wanted in.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken.
    """
    kinds = {kind for _, _, kind in stored_tensors(folder)}
    stored = _NARROW.get(kinds.pop()) if len(kinds) == 1 else None
    return stored if stored is not None and stored.itemsize < dtype.itemsize else None


def widen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts a model that was just loaded, in place, and gives back the memory of the file that each weight came from.

    Args:
        model: On the CPU. Its configurations tell of the new type, too.
        dtype: As wide as the weights' own, or wider: nothing is rounded.
    """
    files = MappedFiles()
    for weight in itertools.chain(model.parameters(), model.buffers()):
        if weight.is_floating_point() and weight.dtype != dtype:
            narrow = weight.data
            weight.data = narrow.to(dtype)
            files.release_pages([narrow])
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        config.dtype = dtype
