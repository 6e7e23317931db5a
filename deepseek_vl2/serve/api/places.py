"""Places for open requests: how much may wait, in all and of one client."""

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from deepseek_vl2.serve.api.errors import too_many_requests


class Places:
    """Counts the answers that are open. Used in one thread, that of the server's event loop.

    Args:
        max_open: answers at the same time, those under way and those that wait.
        max_open_per_client: the same of one client.
    """

    def __init__(self, max_open: int, max_open_per_client: int) -> None:
        self._max_open = max_open
        self._max_open_per_client = max_open_per_client
        self._open: Counter[Hashable] = Counter()

    @property
    def num_open(self) -> int:
        """Places that are taken."""
        return self._open.total()

    @property
    def most_of_a_client(self) -> int:
        """Places that one client can have when nobody else has any."""
        return min(self._max_open, self._max_open_per_client)

    @contextmanager
    def taken(self, client: Hashable, count: int) -> Iterator[None]:
        """Takes places for the block.

        Raises:
            ApiError: status 429, there are not as many free.
        """
        if self.num_open + count > self._max_open:
            raise too_many_requests("the server is busy: too many requests are waiting, try again later")
        if self._open[client] + count > self._max_open_per_client:
            raise too_many_requests("too many requests of yours are waiting, try again when some are answered")
        self._open[client] += count
        try:
            yield
        finally:
            self._open[client] -= count
            if not self._open[client]:
                del self._open[client]
