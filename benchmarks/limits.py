"""The machine's own limits: how fast it reads memory, and how fast it multiplies matrices."""

from statistics import median

import torch

from benchmarks.timing import seconds_of

MIB = 2**20


class Limits:
    """Probes of a device. The buffer of the first is kept, so that a probe takes a fraction of a second.

    Args:
        device: What to probe.
        dtype: Type of the matrices.
        buffer_mib: Size of the buffer that is read; much more than the caches of the processor.
        side: Rows and columns of the matrices.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, buffer_mib: int = 512, side: int = 2048) -> None:
        self.device = device
        self._buffer = torch.ones(buffer_mib * MIB // 4, device=device)
        rows = max(1, self._buffer.numel() // side)
        self._matrix = self._buffer[: rows * side].view(rows, side)
        self._vector = torch.ones(side, device=device)
        self._factors = torch.randn(2, side, side, device=device).to(dtype)
        self._flop = 2 * side**3

    def read_rate(self) -> float:
        """Bytes a second that can be read: the faster of a sum over the buffer and a product of it with a vector."""
        fastest = min(
            seconds_of(self._buffer.sum, self.device),
            seconds_of(lambda: self._matrix @ self._vector, self.device),
        )
        return self._buffer.nbytes / fastest

    def product_rate(self) -> float:
        """FLOP a second of a product of two square matrices."""
        first, second = self._factors
        return self._flop / median(seconds_of(lambda: first @ second, self.device) for _ in range(5))
