"""Pictures of requests: from data URIs, and from public addresses where that is allowed, within limits."""

import math

from PIL import Image

from deepseek_vl2.models.download import data_uri_bytes
from deepseek_vl2.serve.api.public_fetch import PublicFetcher
from deepseek_vl2.serve.picture_limits import PictureLimits
from deepseek_vl2.utils.io import load_image


class PictureLoader:
    """Loads the pictures that requests name.

    Args:
        limits: of a request's pictures.
        fetcher: downloads from addresses; None where addresses are not allowed.
    """

    def __init__(self, limits: PictureLimits, fetcher: PublicFetcher | None) -> None:
        self.limits = limits
        self._fetcher = fetcher

    def fetch_deadline(self) -> float:
        """When the pictures of a request that begins now must have come, in the time of `time.monotonic`."""
        return math.inf if self._fetcher is None else self._fetcher.deadline()

    def load(self, url: str, deadline: float) -> Image.Image:
        """Loads a picture, upright and in RGB.

        Args:
            url: data URI, or `http:` or `https:` address.
            deadline: of what is fetched, see `fetch_deadline`.

        Raises:
            ValueError: another or a refused address, no picture, a broken or too large one.
            TimeoutError: the address did not answer in time.
            ConnectionError: it cannot be reached.
        """
        content = self._content(url, deadline)
        if len(content) > self.limits.max_bytes:
            raise ValueError(f"the picture is larger than {self.limits.max_image_mb:g} MB")
        try:
            return load_image(content, max_pixels=self.limits.max_pixels)
        except ValueError as error:
            raise ValueError(str(error).replace(", or raise max_pixels= if it is meant", "")) from error

    def _content(self, url: str, deadline: float) -> bytes:
        scheme = url.partition(":")[0].strip().lower()
        if scheme == "data":
            return data_uri_bytes(url.strip())
        if scheme not in ("http", "https"):
            raise ValueError("a picture is given as data:image/...;base64,... or as an https: address")
        if self._fetcher is None:
            raise ValueError(
                "this server does not fetch addresses (it was started without --allow_url_fetch): "
                "send the picture as data:image/...;base64,..."
            )
        return self._fetcher.fetch(url, deadline)
