"""VLMEvalKit's files: tables with tabs, columns index, image, question, answer, A, B, ..., category.

`image` holds a picture as base64, a list of several, or the index of another row whose picture is meant; in place of it
`image_path` may hold paths. The answer to a choice is a letter ("B", "(B)", "B.", "B)") or an option's text. RefCOCO's
file has its box in columns bbox_x1, bbox_y1, bbox_x2, bbox_y2, in pixels.
"""

import base64
import binascii
import csv
import itertools
import re
import string
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_vl2.evaluate.readers.common import (
    ReadOptions,
    first_of,
    letter_of,
    listed,
    question_of,
    read_box,
    texts,
)
from deepseek_vl2.evaluate.samples import PictureSource, PixelBox, Sample
from deepseek_vl2.utils.data_files import picture_path

# No picture is that short, and no index that long: VLMEvalKit's own limit.
_MAX_INDEX_LENGTH = 64
# A cell holds a picture; the csv module's own limit is 131,072 characters.
_MAX_CELL_LENGTH = 2**30
# What a byte that is not UTF-8 is read as.
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_BOX_COLUMNS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
_DATA_URI = re.compile(r"data:[^,]{0,64};base64,")


class TsvRow(NamedTuple):
    """A row, and the column `image` of all rows by index."""

    cells: Mapping[str, str]
    images: Mapping[str, str]


def tsv_entries(path: Path) -> Iterator[tuple[str, TsvRow]]:
    """Yields every row with the line it ends in.

    Raises:
        ValueError: it is no table with the columns question and index, or a quotation mark is not closed.
    """
    previous_limit = csv.field_size_limit(_MAX_CELL_LENGTH)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            table = _table_rows(file)
            header = next(table, None)
            if header is None:
                return
            names = header[1]
            missing = {"index", "question"} - set(names)
            if missing:
                raise ValueError(f"{path} has no column {' and no '.join(sorted(missing))} in its first line")
            # Cells that are missing become None, those too many stand under None.
            rows = [(f"line {line}", dict(itertools.zip_longest(names, cells))) for line, cells in table if cells]
    except csv.Error as error:
        raise ValueError(f"{path} is no table with tabs: {error}") from error
    finally:
        csv.field_size_limit(previous_limit)
    images = {row["index"]: row.get("image") or "" for _, row in rows}
    for where, row in rows:
        yield where, TsvRow(row, images)


def _table_rows(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields rows with the number of the line they end in.

    A cell such as `"Why" does it say so?` breaks the rules; where they leave no doubt about its end, it is read as the
    usual programs read it, without its quotation marks.

    Raises:
        csv.Error: a quotation mark is not closed, or closed lines later in the middle of a cell.
    """
    last: deque[str] = deque(maxlen=1)

    def remembered() -> Iterator[str]:
        for line in lines:
            last.append(line)
            yield line

    reader = csv.reader(remembered(), delimiter="\t", strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The empty line becomes a row of its own, unless a cell is still open.
            alone = list(csv.reader([*last, "\n"], delimiter="\t"))
            if reader.line_num > start or len(alone) != 2:
                raise csv.Error(f"a quotation mark in the row that begins in line {start} is not closed") from error
            cells = alone[0]
        yield reader.line_num, cells


def tsv_sample(row: TsvRow, where: str, options: ReadOptions) -> Sample:
    """Builds the sample of a row.

    Raises:
        ValueError: no question, too few cells, an answer that names several options, or a picture that is none.
        OSError: a picture is not there.
    """
    cells = row.cells
    if None in cells.values() or None in cells:
        raise ValueError("the row has not as many cells as the first line")
    damaged = next((name for name, cell in cells.items() if _ESCAPED_BYTE.search(cell)), None)
    if damaged is not None:
        raise ValueError(f"{damaged} is not UTF-8 text")
    pictures = _pictures(row, options)
    sizes = options.sizes_of(pictures)
    choices = {letter: cells[letter] for letter in string.ascii_uppercase if cells.get(letter)}
    answer = cells.get("answer")
    # An option may look like a list: "[1, 2]".
    answers = texts(answer, reads_text=answer not in choices.values())
    return Sample(
        id=cells["index"] or where,
        where=where,
        question=question_of(cells, "question"),
        pictures=pictures,
        sizes=sizes,
        boxes=_boxes(cells, sizes),
        answers=tuple(letter_of(text, choices) for text in answers),
        options=choices,
        hint=cells.get("hint") or "",
        category=first_of(cells, "category", "split") or "",
        split=cells.get("split") or "",
    )


def _boxes(cells: Mapping[str, str], sizes: tuple[tuple[int, int], ...]) -> tuple[PixelBox, ...] | None:
    values = [cells.get(name) for name in _BOX_COLUMNS]
    if not all(values):
        return None
    if not sizes:
        raise ValueError("a box needs a picture, there is none")
    try:
        numbers = [float(value or "") for value in values]
    except ValueError:
        raise ValueError(f"a box must be four numbers, not {values}") from None
    return (read_box(numbers, "xyxy", sizes[-1]),)


def _pictures(row: TsvRow, options: ReadOptions) -> tuple[PictureSource, ...]:
    pictures = [picture for entry in listed(row.cells.get("image")) for picture in _image(entry, row.images, options)]
    if pictures:
        return tuple(pictures)
    return tuple(picture_path(name, options.picture_root) for name in listed(row.cells.get("image_path")))


def _image(entry: Any, images: Mapping[str, str], options: ReadOptions) -> list[PictureSource]:
    """The pictures that an entry of `image` means: one as base64, those of another row, or one by its path."""
    text = str(entry).strip()
    if len(text) > _MAX_INDEX_LENGTH:
        return [_decode(text)]
    pictures = listed(images.get(text, ""))
    if any(len(str(picture)) > _MAX_INDEX_LENGTH for picture in pictures):
        return [_decode(str(picture)) for picture in pictures]
    if "." in text:
        return [picture_path(text, options.picture_root)]
    raise ValueError(f"image names the row {text!r}, which is not there or has no picture of its own")


def _decode(text: str) -> bytes:
    """Decodes base64, with or without line breaks, and as a data URI."""
    try:
        return base64.b64decode("".join(_DATA_URI.sub("", text, count=1).split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the picture is not base64: {error}") from None
