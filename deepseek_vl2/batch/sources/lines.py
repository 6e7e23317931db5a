"""JSON lines as items."""

from array import array
from collections.abc import Iterator
from pathlib import Path

from deepseek_vl2.batch.items import Item
from deepseek_vl2.batch.sources.entries import EntryReader
from deepseek_vl2.utils.data_files import parse_json
from deepseek_vl2.utils.run_folder import file_digest


class LineSource:
    """Objects of a file, one a line; empty lines count for nothing. Fields of the prompt are those of the object.

    Args:
        path: the file.
        entries: makes items of the objects.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, entries: EntryReader) -> None:
        self.path = path
        self.entries = entries
        self.starts = array("Q")
        self.digest = file_digest(path)
        with path.open("rb") as file:
            start = 0
            for line in file:
                if line.strip():
                    self.starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """See `Source`."""
        with self.path.open("rb") as file:
            for index in range(start, stop):
                file.seek(self.starts[index])
                yield self._item(index, file.readline().rstrip())

    def _item(self, index: int, line: bytes) -> Item:
        try:
            entry = parse_json(line)
        except ValueError as error:
            return Item(index, str(index), problem=str(error))
        if not isinstance(entry, dict):
            return Item(index, str(index), problem=f"a line must hold an object, not {entry!r:.80}")
        return self.entries.item(index, entry)
