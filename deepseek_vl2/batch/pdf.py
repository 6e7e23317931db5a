"""Pages of PDF files as pictures, by PDFium."""

import atexit
import math
from collections import OrderedDict
from contextlib import closing
from dataclasses import dataclass
from threading import Lock
from typing import Any

from PIL import Image

from deepseek_vl2.models.picture_files import DEFAULT_MAX_PIXELS

POINTS_PER_INCH = 72
DEFAULT_DPI = 144
_MAX_OPEN_FILES = 4

# PDFium may be used by one thread at a time. Pages and bitmaps are closed under the lock, too: left to the garbage
# collector, they would call PDFium whenever and wherever that runs.
_lock = Lock()
_opened: OrderedDict[str, Any] = OrderedDict()


@dataclass(frozen=True)
class PdfPage:
    """A page of a PDF file.

    Attributes:
        path: the file.
        number: of the page, from 0.
        dpi: pixels an inch that it is drawn with.
    """

    path: str
    number: int
    dpi: int = DEFAULT_DPI


def count_pages(path: str) -> int:
    """Pages of a PDF file.

    Raises:
        ValueError: it is none, broken, encrypted, or has no pages.
        OSError: it is not there.
        ImportError: pypdfium2 is not installed.
    """
    with _lock:
        num_pages = len(_open(path))
    if not num_pages:
        raise ValueError(f"the PDF {path} has no pages")
    return num_pages


def page_size(page: PdfPage) -> tuple[int, int]:
    """Width and height in pixels that `draw_page` gives a page.

    Raises:
        ValueError: the page is broken or too large; see also `count_pages`.
        OSError: the file is not there.
    """
    with _lock, closing(_page(page)) as opened:
        return _pixels(opened, page)


def draw_page(page: PdfPage) -> Image.Image:
    """Draws a page in RGB, on white.

    Raises:
        ValueError: the page is broken or too large; see also `count_pages`.
        OSError: the file is not there.
    """
    pdfium = _require_pdfium()
    with _lock, closing(_page(page)) as opened:
        _pixels(opened, page)
        try:
            with closing(opened.render(scale=page.dpi / POINTS_PER_INCH)) as bitmap:
                return bitmap.to_pil().convert("RGB")  # a copy: the bitmap belongs to PDFium
        except pdfium.PdfiumError as error:
            raise ValueError(f"page {page.number + 1} of {page.path} cannot be drawn: {error}") from error


def _require_pdfium() -> Any:
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("PDF files need the package pypdfium2: pip install 'deepseek_vl2[batch]'") from error
    return pypdfium2


def _open(path: str) -> Any:
    """The file, of which few are kept open: the pages of one follow each other."""
    pdfium = _require_pdfium()
    if path in _opened:
        _opened.move_to_end(path)
        return _opened[path]
    with open(path, "rb"):  # noqa: PTH123 - the system's own error, where it is not there or may not be read
        pass
    try:
        document = pdfium.PdfDocument(path)
    except pdfium.PdfiumError as error:
        if "password" in str(error).lower():
            raise ValueError(f"the PDF {path} is encrypted; save it without its password first") from None
        raise ValueError(f"{path} is no PDF that can be read, or it is broken ({error})") from error
    if not _opened:
        atexit.register(_close_all)  # before PDFium's own end, which complains of open files
    _opened[path] = document
    if len(_opened) > _MAX_OPEN_FILES:
        _opened.popitem(last=False)[1].close()
    return document


def _close_all() -> None:
    while _opened:
        _opened.popitem()[1].close()


def _page(page: PdfPage) -> Any:
    pdfium = _require_pdfium()
    document = _open(page.path)
    try:
        return document[page.number]
    except (pdfium.PdfiumError, IndexError) as error:
        raise ValueError(f"page {page.number + 1} of {page.path} cannot be read: {error}") from error


def _pixels(opened: Any, page: PdfPage) -> tuple[int, int]:
    width, height = (math.ceil(side * page.dpi / POINTS_PER_INCH) for side in opened.get_size())
    if not 0 < width * height <= DEFAULT_MAX_PIXELS:
        raise ValueError(
            f"page {page.number + 1} of {page.path} has {width}x{height} pixels at {page.dpi} dpi, and the limit is "
            f"{DEFAULT_MAX_PIXELS}; draw with fewer: --pdf_dpi"
        )
    return width, height
