"""Pictures and PDF files of a folder, or named by a pattern, as items."""

import bisect
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from deepseek_vl2.batch.items import Item, ItemPicture, PromptTemplate, ask_about
from deepseek_vl2.batch.pdf import PdfPage, count_pages
from deepseek_vl2.utils.errors import describe_error

PDF_SUFFIX = ".pdf"
PICTURE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)


def list_files(path: Path, is_pattern: bool) -> tuple[Path, list[str]]:
    """The pictures and PDF files that an input means, in order of their names.

    Args:
        path: a folder, which is searched with those in it; a file; or a pattern.
        is_pattern: whether it is a pattern.

    Returns:
        A folder, and the names relative to it.

    Raises:
        ValueError: there are none, or it is a file of another kind.
        OSError: it is not there.
    """
    if is_pattern:
        found = [name for name in sorted(glob.glob(str(path), recursive=True)) if _is_wanted(name)]  # noqa: PTH207 - may be absolute
        if not found:
            raise ValueError(f"no pictures or PDF files match {str(path)!r}")
        return Path(), found
    if path.is_dir():
        walked = os.walk(path, onerror=_raise)
        names = (os.path.relpath(os.path.join(folder, name), path) for folder, _, files in walked for name in files)  # noqa: PTH118
        found = sorted(name for name in names if _is_wanted(name))
        if not found:
            raise ValueError(f"the folder {path} holds no pictures or PDF files")
        return path, found
    if not path.exists():
        raise FileNotFoundError(f"there is no input {str(path)!r}")
    if not _is_wanted(path.name):
        raise ValueError(f"{path}: give a folder, a pattern, a picture, or a file .pdf, .jsonl or .parquet")
    if path.suffix.lower() == PDF_SUFFIX:
        count_pages(str(path))  # alone, a PDF that cannot be read is an error of the command
    return path.parent, [path.name]


def _is_wanted(name: str) -> bool:
    return name.lower().endswith((*PICTURE_SUFFIXES, PDF_SUFFIX))


def _raise(error: OSError) -> None:
    raise error


class FileSource:
    """Files, of which a PDF is as many items as it has pages, and one if it cannot be read.

    Fields of the prompt: `path` (as the item's id begins), `name`, `stem`; of PDF files `page` (from 1) and `pages`.

    Args:
        folder: what names are relative to.
        names: of the files.
        template: of the question.
        pdf_dpi: pixels an inch that pages are drawn with.

    Raises:
        ValueError: the prompt has other fields.
        ImportError: there is a PDF, and pypdfium2 is not installed.
    """

    def __init__(self, folder: Path, names: Sequence[str], template: PromptTemplate, pdf_dpi: int) -> None:
        self.folder = folder
        self.names = list(names)
        self.template = template
        self.pdf_dpi = pdf_dpi
        self.problems: dict[int, str] = {}
        has_pdf = any(_is_pdf(name) for name in self.names)
        counts = [
            self._count(number, name)
            for number, name in enumerate(tqdm(self.names, desc="Open", unit="file", disable=not has_pdf))
        ]
        self.ends = list(accumulate(counts))
        digest = hashlib.sha256()
        for name, count in zip(self.names, counts, strict=True):
            digest.update(f"{_printable(name)}\n{count}\n".encode())
        self.digest = digest.hexdigest()
        known = self._fields(self.names[0], 0, 1) | ({"page": 1, "pages": 1} if has_pdf else {})
        unknown = sorted(template.fields - known.keys())
        if unknown:
            raise ValueError(f"the prompt's field {{{unknown[0]}}} is not known; there is: {', '.join(known)}")

    def __len__(self) -> int:
        return self.ends[-1]

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """See `Source`."""
        for index in range(start, stop):
            number = bisect.bisect_right(self.ends, index)
            first = self.ends[number - 1] if number else 0
            yield self._item(index, number, index - first)

    def _count(self, number: int, name: str) -> int:
        if not _is_pdf(name):
            return 1
        try:
            return count_pages(str(self.folder / name))
        except (ValueError, OSError) as error:
            self.problems[number] = describe_error(error)
            return 1

    def _item(self, index: int, number: int, page: int) -> Item:
        name = self.names[number]
        num_pages = self.ends[number] - (self.ends[number - 1] if number else 0)
        is_page = _is_pdf(name) and number not in self.problems
        path = str(self.folder / name)
        item_id = _printable(name) + (f"#page={page + 1}" if is_page else "")
        if number in self.problems:
            return Item(index, item_id, problem=self.problems[number])
        picture: ItemPicture = PdfPage(path, page, self.pdf_dpi) if is_page else path
        try:
            prompt = self.template.fill(self._fields(name, page, num_pages))
            return Item(index, item_id, ask_about(prompt, (picture,)), (picture,))
        except ValueError as error:
            return Item(index, item_id, problem=describe_error(error))

    def _fields(self, name: str, page: int, num_pages: int) -> dict[str, Any]:
        path = Path(_printable(name))
        fields: dict[str, Any] = {"path": path.as_posix(), "name": path.name, "stem": path.stem}
        return fields | ({"page": page + 1, "pages": num_pages} if _is_pdf(name) else {})


def _is_pdf(name: str) -> bool:
    return name.lower().endswith(PDF_SUFFIX)


def _printable(name: str) -> str:
    """The name in Unicode; Linux allows other bytes in it, too."""
    return os.fsencode(name).decode("utf-8", "replace")
