"""Pictures of items: their sizes first, to plan batches, and their pixels when their turn comes."""

from PIL import Image

from deepseek_vl2.batch.items import ItemPicture
from deepseek_vl2.batch.pdf import PdfPage, draw_page, page_size
from deepseek_vl2.models.picture_files import read_image_size
from deepseek_vl2.utils.io import load_image


def item_picture_size(picture: ItemPicture) -> tuple[int, int]:
    """Width and height in pixels.

    Raises:
        ValueError: it is no picture, or given by an address on the network.
        OSError: it is not there.
    """
    if isinstance(picture, PdfPage):
        return page_size(picture)
    _refuse_address(picture)
    return read_image_size(picture)


def load_item_picture(picture: ItemPicture) -> Image.Image:
    """The picture in RGB.

    Raises:
        ValueError: it is broken.
        OSError: it is not there.
    """
    return draw_page(picture) if isinstance(picture, PdfPage) else load_image(picture)


def _refuse_address(picture: str | bytes) -> None:
    """What an address gives may change between a run and its resumption.

    Raises:
        ValueError: it is an address on the network.
    """
    if isinstance(picture, str) and picture.lower().startswith(("http:", "https:")):
        raise ValueError(f"a batch run fetches nothing: download {picture!r:.80} first, and give its path")
