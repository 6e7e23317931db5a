"""A queue in which nobody waits behind many questions of one other user."""

from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _Entry(NamedTuple):
    round: int
    arrival: int
    user: Hashable
    item: object


class FairQueue(Generic[T]):
    """Serves in rounds: one item of each user a round, within a round in the order of arrival.

    A new item goes into the round that is being served, or into the one after its user's last. Not safe for several
    threads; the engines hold their own locks.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._last_rounds: dict[Hashable, int] = {}  # of users, as far as they are not over
        self._round = 0
        self._num_arrivals = 0

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, user: Hashable, item: T) -> None:
        """Add an item of a user."""
        turn = max(self._round, self._last_rounds.get(user, -1) + 1)
        self._last_rounds[user] = turn
        self._entries.append(_Entry(turn, self._num_arrivals, user, item))
        self._entries.sort(key=lambda entry: entry[:2])
        self._num_arrivals += 1

    def pop(self) -> T:
        """Take the item whose turn it is.

        Raises:
            IndexError: the queue is empty.
        """
        entry = self._entries.pop(0)
        self._round = entry.round
        self._last_rounds = {user: last for user, last in self._last_rounds.items() if last >= self._round}
        return entry.item  # type: ignore[return-value]

    def remove(self, item: T) -> bool:
        """Take an item out, wherever it stands; returns whether it was there."""
        for entry in self._entries:
            if entry.item is item:
                self._entries.remove(entry)
                return True
        return False

    def place(self, item: T) -> int | None:
        """Tell how many items come before one, `None` if it is not here."""
        return next((place for place, other in enumerate(self.in_turn()) if other is item), None)

    def in_turn(self) -> list[T]:
        """List all items in the order in which they are taken, as far as is known now."""
        return [entry.item for entry in self._entries]  # type: ignore[misc]
