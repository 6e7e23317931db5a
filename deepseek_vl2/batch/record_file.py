"""The records of a run while it goes on: in the order in which they came, and found again by their index."""

import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from deepseek_vl2.utils.data_files import parse_json
from deepseek_vl2.utils.errors import naming_file
from deepseek_vl2.utils.run_folder import append_records, read_records

RECORDS_FILE = "records.jsonl"
_MISSING = -1


class RecordFile:
    """A file that only grows. Eight bytes an item are kept in memory: where its line begins.

    Args:
        folder: of the run.
        num_items: of the input.

    Raises:
        ValueError: a line is damaged, of no item, or of one that has a line already.
        OSError: the file cannot be read or written.
    """

    def __init__(self, folder: Path, num_items: int) -> None:
        self.path = folder / RECORDS_FILE
        self.starts = array("q", [_MISSING]) * num_items
        self.num_done = 0
        self.num_failed = 0
        for start, record in read_records(self.path):
            self._note(record, start)
        self.file = self.path.open("ab", buffering=0)

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def __len__(self) -> int:
        return len(self.starts)

    def is_done(self, index: int) -> bool:
        """Whether there is a record of an item."""
        return self.starts[index] != _MISSING

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes records, and waits until they are on the disk.

        Raises:
            ValueError: an item has a record already.
            OSError: they cannot be written.
        """
        start = self.file.seek(0, os.SEEK_END)
        for length, record in zip(append_records(self.file, records), records, strict=True):
            self._note(record, start)
            start += length

    def in_order(self) -> Iterator[dict[str, Any]]:
        """The records in the order of the items.

        Raises:
            ValueError: one is missing.
        """
        if self.num_done < len(self):
            raise ValueError(f"{len(self) - self.num_done} of {len(self)} records are missing in {self.path}")
        with self.path.open("rb") as file:
            for start in self.starts:
                file.seek(start)
                yield parse_json(file.readline())

    def _note(self, record: Mapping[str, Any], start: int) -> None:
        index = record.get("index")
        if not isinstance(index, int) or not 0 <= index < len(self):
            raise ValueError(f"{self.path} holds a record of no item ({index!r}); take another output")
        if self.is_done(index):
            raise ValueError(f"{self.path} holds two records of item {index}; take another output")
        self.starts[index] = start
        self.num_done += 1
        self.num_failed += record.get("error") is not None


def drop_failed(folder: Path) -> int:
    """Takes the records with an error out of a run's file, so that their items are asked again.

    Returns:
        How many there were.

    Raises:
        ValueError: a line is damaged.
        OSError: the file cannot be written; it is named.
    """
    path = folder / RECORDS_FILE
    draft = folder / f"{RECORDS_FILE}.tmp"
    num_failed = 0
    with naming_file(draft), draft.open("w", encoding="utf-8", newline="\n") as file:
        for _, record in read_records(path):
            if record.get("error") is None:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            else:
                num_failed += 1
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    return num_failed
