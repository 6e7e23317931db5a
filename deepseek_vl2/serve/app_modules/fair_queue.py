"""A queue in which nobody waits behind many questions of one other user."""

from collections import Counter
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Lets users take turns: first everybody's first item in the order of arrival, then everybody's second, and so on.

    Not safe for several threads; the engine holds its own lock.
    """

    def __init__(self) -> None:
        self._items: list[tuple[Hashable, T]] = []  # in the order of arrival

    def __len__(self) -> int:
        return len(self._items)

    def push(self, user: Hashable, item: T) -> None:
        """Add an item of a user."""
        self._items.append((user, item))

    def pop(self) -> T:
        """Take the item whose turn it is.

        Raises:
            IndexError: the queue is empty.
        """
        first = self.in_turn()[0]
        self.remove(first)
        return first

    def remove(self, item: T) -> bool:
        """Take an item out, wherever it stands; returns whether it was there."""
        before = len(self._items)
        self._items = [entry for entry in self._items if entry[1] is not item]
        return len(self._items) < before

    def place(self, item: T) -> int | None:
        """Tell how many items come before one, `None` if it is not here."""
        return next((place for place, other in enumerate(self.in_turn()) if other is item), None)

    def in_turn(self) -> list[T]:
        """List all items in the order in which they are taken."""
        num_before: Counter[Hashable] = Counter()
        ranked = []
        for arrival, (user, item) in enumerate(self._items):
            ranked.append((num_before[user], arrival, item))
            num_before[user] += 1
        return [item for _, _, item in sorted(ranked, key=lambda entry: entry[:2])]
