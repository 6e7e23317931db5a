"""What uploads may be, checked on the server whatever the browser has checked."""

from dataclasses import dataclass
from pathlib import Path

from deepseek_vl2.serve.app_modules.texts import UserError

MEGABYTE = 2**20


@dataclass(frozen=True)
class UploadLimits:
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

    def check_number(self, num_pictures: int) -> None:
        """Refuse too many pictures.

        Raises:
            UserError: there are more than `max_pictures`.
        """
        if num_pictures > self.max_pictures:
            raise UserError("too_many_pictures", count=num_pictures, limit=self.max_pictures)

    def check_bytes(self, path: str) -> None:
        """Refuse files that are too large or gone.

        Raises:
            UserError: the file is not there, or larger than `max_image_mb`.
        """
        file = Path(path)
        if not file.is_file():
            raise UserError("picture_gone", name=file.name)
        size = file.stat().st_size
        if size > self.max_bytes:
            raise UserError(
                "picture_too_big", name=file.name, size=f"{size / MEGABYTE:.1f}", limit=f"{self.max_image_mb:g}"
            )
