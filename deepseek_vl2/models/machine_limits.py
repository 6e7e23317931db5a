"""What is left of a machine for this process: memory, and time of its cores; limits of containers count."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can still take: what is free on the machine, and left of the container's."""
    free = psutil.virtual_memory().available
    for folder in _cgroup_folders("memory", root):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        if limit is not None and used is not None:
            free = min(free, max(0, int(limit - used + _reclaimable(folder))))
    return free


def free_bytes(device: torch.device) -> int:
    """Bytes that a device can still take: of a CUDA device also what torch holds there without using it."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return available_bytes()


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that a container may use; None if there is no limit."""
    quotas = []
    for folder in _cgroup_folders("cpu", root):
        both = (read_text(folder / "cpu.max") or "").split()
        if not both:
            both = [read_text(folder / name) or "" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        if all(value.isdigit() for value in both) and float(both[1]) > 0:
            quotas.append(float(both[0]) / float(both[1]))
    return min(quotas, default=None)


def _cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control groups that limit this process, its own first; version 2 and 1 of Linux' interface."""
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controllers and controller)
        own = base / path.lstrip("/")
        # Seen from inside a container, the outer part of the path may be missing.
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(base) and folder.is_dir())


def _number(folder: Path, *names: str) -> float | None:
    """The number in the first of some files that is there and holds one."""
    texts = (read_text(folder / name) for name in names)
    return next((float(text) for text in texts if text is not None and text.isdigit()), None)


def _reclaimable(folder: Path) -> int:
    """Bytes of files in memory that count as used but are given up when others need the memory.

    Version 1 counts a group's own pages beside those of the groups below it, and only the sum belongs to what is used.
    """
    lines = (line.partition(" ") for line in (read_text(folder / "memory.stat") or "").splitlines())
    numbers = {name: int(value) for name, _, value in lines if value.isdigit()}
    prefix = "total_" if "total_inactive_file" in numbers else ""
    return sum(numbers.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))


def read_text(file: Path) -> str | None:
    """The stripped text of a file of the system, None if it is not there or must not be read."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
