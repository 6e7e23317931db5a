"""Rows of a Parquet file as items."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from deepseek_vl2.batch.items import CONVERSATION_FIELDS, ID_FIELD, PROMPT_FIELD, Item
from deepseek_vl2.batch.sources.entries import IMAGE_FIELDS, EntryReader
from deepseek_vl2.utils.run_folder import file_digest

# So many rows are in memory at a time, with the pictures in them.
ROWS_AT_ONCE = 32
# Of larger files only size, beginning and end (with the index of the content) count: a terabyte takes an hour to read.
_MAX_DIGESTED_BYTES = 2**30
_DIGESTED_PART = 2**20


class ParquetSource:
    """Rows of a file. Fields of the prompt are its columns; only columns that are needed are read.

    To begin in the middle, a group of rows is read from its start: keep groups below some thousand rows.

    Args:
        path: the file.
        entries: makes items of the rows.

    Raises:
        ValueError: it is no Parquet file, or a column is not there.
        OSError: it cannot be read.
        ImportError: pyarrow is not installed.
    """

    def __init__(self, path: Path, entries: EntryReader) -> None:
        self.path = path
        opened = _open(path)
        columns = list(opened.schema_arrow.names)
        self.entries = _with_image_column(entries, columns, path)
        missing = sorted(entries.template.fields - set(columns))
        if missing and PROMPT_FIELD not in columns:
            raise ValueError(f"{path} has no column {missing[0]!r} for the prompt; there is: {', '.join(columns)}")
        wanted = {ID_FIELD, PROMPT_FIELD, *CONVERSATION_FIELDS, self.entries.image_column, *entries.template.fields}
        self.columns = [name for name in columns if name in wanted]
        metadata = opened.metadata
        self.ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
        self.digest = _digest(path)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """See `Source`."""
        begun = [0, *self.ends]
        groups = [group for group, end in enumerate(self.ends) if end > start and begun[group] < stop]
        if not groups:
            return
        index = begun[groups[0]]
        batches = _open(self.path).iter_batches(
            batch_size=ROWS_AT_ONCE, row_groups=groups, columns=self.columns, use_threads=False
        )
        for batch in batches:
            if index + batch.num_rows > start:
                for entry in batch.to_pylist():
                    if start <= index < stop:
                        yield self.entries.item(index, entry)
                    index += 1
            else:
                index += batch.num_rows
            if index >= stop:
                return


def _open(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet files need the package pyarrow: pip install 'deepseek_vl2[batch]'") from error
    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}") from error


def _with_image_column(entries: EntryReader, columns: list[str], path: Path) -> EntryReader:
    """The reader with the name of the column that holds the pictures."""
    if entries.image_column is not None and entries.image_column not in columns:
        raise ValueError(f"{path} has no column {entries.image_column!r}; there is: {', '.join(columns)}")
    found = [entries.image_column] if entries.image_column else [name for name in IMAGE_FIELDS if name in columns]
    if not found and not {PROMPT_FIELD, *CONVERSATION_FIELDS} & set(columns):
        raise ValueError(
            f"{path} has no column {' or '.join(map(repr, IMAGE_FIELDS))}; name that of the pictures with "
            f"--image_column: {', '.join(columns)}"
        )
    return replace(entries, image_column=found[0] if found else None)


def _digest(path: Path) -> str:
    size = path.stat().st_size
    if size <= _MAX_DIGESTED_BYTES:
        return file_digest(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_DIGESTED_PART))
        file.seek(size - _DIGESTED_PART)
        digest.update(file.read())
    return digest.hexdigest()
