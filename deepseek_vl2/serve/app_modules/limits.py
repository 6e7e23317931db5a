"""What uploads may be, checked on the server whatever the browser has checked."""

from pathlib import Path

from deepseek_vl2.serve.app_modules.texts import UserError
from deepseek_vl2.serve.picture_limits import MEGABYTE, PictureLimits


class UploadLimits(PictureLimits):
    """Limits of one question on the page, with messages in its users' languages."""

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
