"""What this machine has, and what that makes the best device, type of weights and number of threads."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import psutil
import torch

from deepseek_vl2.models.cpu_features import cpu_bfloat16_support
from deepseek_vl2.models.machine_limits import available_bytes, cpu_quota, read_text

T = TypeVar("T")

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Share of the free memory that weights may take when a type of weights is chosen: activations need some too.
USABLE_MEMORY = 0.8


@dataclass(frozen=True)
class Choice(Generic[T]):
    """What was chosen, and why."""

    value: T
    reason: str


def choose_device() -> Choice[torch.device]:
    """The fastest device: CUDA, else an Apple GPU, else the CPU."""
    if torch.cuda.is_available() and torch.cuda.device_count():
        return Choice(torch.device("cuda"), f"CUDA device {torch.cuda.get_device_name()}")
    if torch.backends.mps.is_available():
        return Choice(torch.device("mps"), "an Apple GPU")
    return Choice(torch.device("cpu"), "neither CUDA nor an Apple GPU is available to torch")


def choose_dtype(
    device: torch.device, num_bytes: int | None = None, quantize: str | None = None
) -> Choice[torch.dtype]:
    """The type of weights that suits a device. The published weights are bfloat16.

    Args:
        device: Where the model runs.
        num_bytes: Bytes of the checkpoint in a type of 16 bits, if known: float32 is not chosen unless it fits.
        quantize: How the weights are quantised, if they are; then this is the type of everything else.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return Choice(torch.bfloat16, f"compute capability {major}.{minor} has bfloat16")
        return Choice(
            torch.float16,
            f"compute capability {major}.{minor} has no bfloat16, only float16, whose range is smaller; "
            "take float32 if answers are garbage",
        )
    if device.type == "mps":
        if torch.backends.mps.is_macos_or_newer(14, 0):
            return Choice(torch.bfloat16, "macOS 14 or later has bfloat16")
        return Choice(torch.float16, "macOS before 14 has no bfloat16, only float16")
    if quantize is not None:
        return Choice(torch.bfloat16, f"the CPU's kernels for {quantize} weights take bfloat16")
    return _choose_cpu_dtype(cpu_bfloat16_support(), num_bytes)


def _choose_cpu_dtype(support: str, num_bytes: int | None) -> Choice[torch.dtype]:
    if support == "native":
        return Choice(torch.bfloat16, "the CPU has instructions for bfloat16")
    if support == "unknown":
        return Choice(torch.bfloat16, "the CPU's instructions are unknown; this is the published type")
    free = available_bytes()
    if num_bytes is not None and 2 * num_bytes > USABLE_MEMORY * free:
        return Choice(
            torch.bfloat16,
            f"the CPU has no fast bfloat16, but float32 would take {2 * num_bytes / 1e9:.1f} of {free / 1e9:.1f} GB",
        )
    return Choice(torch.float32, "the CPU has no fast bfloat16, and torch is many times slower in it than in float32")


def choose_num_threads() -> Choice[int]:
    """Threads for work on the CPU: one for each physical core that this process may use.

    A second thread on the same core shares its units for products and its path to memory, so it gains nothing.
    """
    given = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if os.environ.get(name)]
    if given:
        return Choice(torch.get_num_threads(), f"set by {' and '.join(given)}")
    num_cores = num_physical_cores()
    quota = cpu_quota()
    if quota is not None and quota < num_cores:
        return Choice(max(1, int(quota)), f"the container may use {quota:g} of {num_cores} physical cores")
    num_logical = len(allowed_cpus())
    more = f", which are {num_logical} logical ones" if num_logical != num_cores else ""
    return Choice(num_cores, f"physical cores that this process may use{more}")


def use_chosen_num_threads() -> int:
    """Makes torch use `choose_num_threads`, for scripts; a library leaves that to its caller. Returns the number."""
    num_threads = choose_num_threads().value
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)
    return num_threads


def allowed_cpus() -> list[int]:
    """Numbers of the logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def num_physical_cores(root: Path = Path("/")) -> int:
    """Physical cores among `allowed_cpus`.

    Args:
        root: Where `sys` is mounted.
    """
    cpus = allowed_cpus()
    siblings = set()
    for cpu in cpus:
        file = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        text = read_text(file)
        if text is None:
            return min(psutil.cpu_count(logical=False) or len(cpus), len(cpus))
        siblings.add(text)
    return len(siblings)
