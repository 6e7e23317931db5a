"""The output of a finished run, in the items' order: JSON lines or Parquet, written at once."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from deepseek_vl2.utils.errors import naming_file

OUTPUT_SUFFIXES = (".jsonl", ".parquet")
_ROWS_OF_A_GROUP = 1000


def check_output(path: Path) -> None:
    """Refuses an output that could not be written.

    Raises:
        ValueError: the name has another ending, is a folder's, or its folder is missing or not writable.
        ImportError: it is Parquet, and pyarrow is not installed.
    """
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(f"--output {path}: take a name that ends in {' or '.join(OUTPUT_SUFFIXES)}")
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; take the name of a file in it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: the folder {path.parent} does not exist, or it cannot be written there")
    if path.suffix.lower() == ".parquet":
        _require_pyarrow()


def write_output(records: Iterable[Mapping[str, Any]], path: Path, folder: Path) -> None:
    """Writes the output; a program that is stopped meanwhile leaves what was there before.

    Args:
        records: in order.
        path: of the output, JSON lines or Parquet by its ending.
        folder: of the run, on the same disk; holds the draft.

    Raises:
        OSError: it cannot be written; the file is named.
    """
    draft = folder / f"output{path.suffix}.tmp"
    try:
        with naming_file(draft):
            (_write_parquet if path.suffix.lower() == ".parquet" else _write_lines)(records, draft)
            with draft.open("rb") as file:
                os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _write_lines(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_parquet(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    pyarrow, parquet = _require_pyarrow()
    schema = _schema(pyarrow)
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in _groups(records):
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def _groups(records: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    remaining = iter(records)
    while rows := list(islice(remaining, _ROWS_OF_A_GROUP)):
        yield rows


def _schema(pyarrow: Any) -> Any:
    numbers = pyarrow.list_(pyarrow.int32())
    box = pyarrow.struct({"picture": pyarrow.int32(), "label": pyarrow.string(), "box": numbers, "pixels": numbers})
    return pyarrow.schema(
        {
            "index": pyarrow.int64(),
            "id": pyarrow.string(),
            "text": pyarrow.string(),
            "boxes": pyarrow.list_(box),
            "box_problems": pyarrow.list_(pyarrow.string()),
            "prompt_tokens": pyarrow.int32(),
            "image_tokens": pyarrow.int32(),
            "new_tokens": pyarrow.int32(),
            "is_cut_off": pyarrow.bool_(),
            "seconds": pyarrow.float64(),
            "error": pyarrow.string(),
        }
    )


def _require_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet files need the package pyarrow: pip install 'deepseek_vl2[batch]'") from error
    return pyarrow, parquet
