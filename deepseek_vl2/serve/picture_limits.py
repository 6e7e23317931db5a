"""What pictures from strangers may be: the limits that the page and the API server share."""

from dataclasses import dataclass

MEGABYTE = 2**20


@dataclass(frozen=True)
class PictureLimits:
    """Limits of one question.

    Attributes:
        max_image_mb: size of a file.
        max_pixels: width times height of a picture.
        max_pictures: pictures of one question.
    """

    max_image_mb: float = 20
    max_pixels: int = 40_000_000
    max_pictures: int = 10

    @property
    def max_bytes(self) -> int:
        """Size of a file in bytes."""
        return int(self.max_image_mb * MEGABYTE)
