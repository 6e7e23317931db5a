"""What the CPU can compute fast."""

import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from .machine_limits import read_text

_NATIVE_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, ARM


@cache
def has_fast_bfloat16() -> bool:
    """Whether products in bfloat16 are at least as fast as in float32.

    Without instructions of its own a CPU takes several times as long for many rows, with AVX512 (4.4 times, measured on
    two cores of Cascade Lake) as without it.
    """
    return cpu_bfloat16_support() != "none"


def product_dtype(rows: torch.Tensor) -> torch.dtype:
    """In which type a product of many rows is computed: their own, unless the CPU is faster in float32."""
    is_slow = rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and not has_fast_bfloat16()
    return torch.float32 if is_slow else rows.dtype


def cpu_bfloat16_support(root: Path = Path("/")) -> str:
    """How the CPU computes in bfloat16.

    Args:
        root: Where `proc` is mounted.

    Returns:
        `native` (own instructions), `none` or `unknown`.
    """
    if platform.system() == "Darwin":
        return "native" if _sysctl("hw.optional.arm.FEAT_BF16") == "1" else "none"
    flags = cpu_flags(root)
    if flags.intersection(_NATIVE_BFLOAT16_FLAGS):
        return "native"
    return "none" if flags else "unknown"


def cpu_flags(root: Path = Path("/")) -> set[str]:
    """Instruction sets that Linux names for the first core; empty elsewhere."""
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
