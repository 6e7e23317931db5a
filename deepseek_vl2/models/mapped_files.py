"""Memory of files that are mapped: given back once it has been read."""

import ctypes
import sys
from collections.abc import Iterable
from mmap import PAGESIZE
from pathlib import Path

import torch

_MEMORY_MAP = Path("/proc/self/maps")
_NOT_NEEDED = 4  # MADV_DONTNEED of Linux


class MappedFiles:
    """The files that are mapped now; made once for many tensors, since the system's list takes a while to read."""

    def __init__(self) -> None:
        self._mappings = _file_mappings() if sys.platform.startswith("linux") else []

    def release_pages(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives the memory of tensors back that are views of mapped files, as safetensors makes them.

        The tensors stay valid: what is read of them again comes from the file again. Without it a whole checkpoint
        stays in memory beside the weights that were made of it. Does nothing for other tensors, and on other systems
        than Linux.

        Args:
            tensors: Unchanged since they were mapped.
        """
        for tensor in tensors:
            start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            is_mapped = any(first <= start and end <= last for first, last in self._mappings)
            first_page, last_page = -(-start // PAGESIZE) * PAGESIZE, end // PAGESIZE * PAGESIZE
            if is_mapped and tensor.is_contiguous() and first_page < last_page:
                size = ctypes.c_size_t(last_page - first_page)
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first_page), size, _NOT_NEEDED)


def _file_mappings() -> list[tuple[int, int]]:
    """Address ranges of this process that are private views of files."""
    found = []
    for line in _MEMORY_MAP.read_text().splitlines():
        # 7f31f6200000-7f31fe200000 rw-p 00000000 fe:00 1234    /path/model.safetensors
        addresses, flags, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0" and flags.endswith("p"):
            first, last = addresses.split("-")
            found.append((int(first, 16), int(last, 16)))
    return found
