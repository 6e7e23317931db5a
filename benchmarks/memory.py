"""Memory of this process, and of a model by part."""

import ctypes
import gc
import platform
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepseek_vl2.utils.model_size import PARTS, part_of

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def resident_bytes() -> int | None:
    """Bytes of memory that this process holds now; None where the system does not say."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """Most bytes of memory that this process has held since its start, or since `reset_peak`."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024


def reset_peak() -> bool:
    """Lets `peak_resident_bytes` begin again from what is held now; False where that cannot be done."""
    gc.collect()
    _trim()
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _trim() -> None:
    """Gives freed memory back to the system, which glibc may keep otherwise."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _status(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def weight_bytes_by_part(model: nn.Module) -> dict[str, int]:
    """Bytes that the parameters, buffers and packed weights of each part take, as they are stored."""
    counts = Counter(dict.fromkeys(PARTS, 0))
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            counts[part_of(name)] += tensor.nbytes
    for name, module in model.named_modules():
        for weight, parts in getattr(module, "packed", {}).items():
            counts[part_of(f"{name}.{weight}")] += sum(part.numel() * part.element_size() for part in parts)
    return dict(counts)


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors of a cache."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
