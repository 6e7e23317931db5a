"""Inputs of a batch run. Each lists its items by number, from any number on, and can be sent to another process."""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from deepseek_vl2.batch.items import Item, PromptTemplate
from deepseek_vl2.batch.pdf import DEFAULT_DPI
from deepseek_vl2.batch.sources.entries import EntryReader
from deepseek_vl2.batch.sources.files import FileSource, list_files
from deepseek_vl2.batch.sources.lines import LineSource
from deepseek_vl2.batch.sources.parquet import ParquetSource
from deepseek_vl2.serve.questions import DESCRIBE_PICTURE

__all__ = ["Source", "open_source"]


class Source(Protocol):
    """Items by number.

    Attributes:
        digest: other items have another one.
    """

    digest: str

    def __len__(self) -> int:
        """Number of items."""

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """The items from `start` up to `stop`, in order.

        Raises:
            OSError: the input cannot be read any more.
        """


def open_source(
    name: str,
    prompt: str | None = None,
    image_column: str | None = None,
    picture_root: Path | None = None,
    pdf_dpi: int = DEFAULT_DPI,
) -> Source:
    """Opens an input: a folder, a glob, a PDF, a picture, JSON lines or Parquet.

    Args:
        name: the input.
        prompt: template of the question for items without one; by default pictures are described.
        image_column: field of the pictures in JSON lines and Parquet.
        picture_root: what paths in them are relative to; by default the file's folder.
        pdf_dpi: pixels an inch that pages are drawn with.

    Raises:
        ValueError: it is of none of these kinds, empty, unreadable as a whole, or a column is not there.
        OSError: it is not there.
        ImportError: a package that reads it is not installed.
    """
    template = PromptTemplate(DESCRIBE_PICTURE if prompt is None else prompt)
    path = Path(name).expanduser()
    is_pattern = glob.has_magic(name) and not path.exists()
    suffix = path.suffix.lower()
    if not is_pattern and suffix in (".jsonl", ".ndjson", ".parquet") and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name!r}")
        entries = EntryReader(template, picture_root or path.parent, image_column)
        source: Any = ParquetSource(path, entries) if suffix == ".parquet" else LineSource(path, entries)
    else:
        _refuse_options(name, image_column=image_column, picture_root=picture_root)
        source = FileSource(*list_files(path, is_pattern), template=template, pdf_dpi=pdf_dpi)
    if not len(source):
        raise ValueError(f"{name} is empty: it holds no questions")
    return source


def _refuse_options(name: str, **options: Any) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"--{option} {value} is for JSON lines and Parquet; {name!r} is neither")
