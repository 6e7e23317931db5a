"""From a PIL picture to normalised views."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from deepseek_vl2.models.tiling import TileGrid, letterbox, tile_boxes


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to a new RGB picture, transparency on white, 16 bits and floats scaled.

    Raises:
        ValueError: the mode has no conversion, or its numbers are outside the known range.
    """
    if image.mode.startswith(("I", "F")):
        return _scalar_to_rgb(image)
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    except ValueError as error:
        raise ValueError(f"cannot convert a picture of mode {image.mode!r} to RGB: {error}") from error
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _scalar_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 16-bit (`I;16`, `I`) and float (`F`) greys; a grey marked as transparent becomes white."""
    values = np.asarray(image)
    if image.mode == "F":
        grey = scale_to_bytes(values)
    else:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(f"a picture of mode {image.mode!r} must lie in 0..65535, this one spans {low}..{high}")
        grey = scale_to_bytes(values.astype(np.uint16))
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def scale_to_bytes(array: np.ndarray) -> np.ndarray:
    """Scale an array to uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # either byte order
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0.0 and high <= 1.0):  # also refuses NaN
            raise ValueError(f"an array of floats must lie in 0..1 to be a picture, this one spans {low:g}..{high:g}")
        return (array.astype(np.float32) * 255.0 + 0.5).astype(np.uint8)
    raise ValueError(f"cannot read an array of {array.dtype} as a picture: give uint8, uint16, bool, or floats 0..1")


class ImageTransform:
    """Normalise a picture: [0, 255] to [0, 1], then minus the mean, divided by the standard deviation.

    Args:
        mean: one value a channel, of values in [0, 1].
        std: one value a channel.
        normalize: false leaves the values in [0, 1].

    Raises:
        ValueError: mean or std do not have three values, or a std is 0.
    """

    def __init__(
        self,
        mean: Sequence[float] | None = (0.5, 0.5, 0.5),
        std: Sequence[float] | None = (0.5, 0.5, 0.5),
        normalize: bool = True,
    ) -> None:
        self.mean = tuple(mean or (0.5, 0.5, 0.5))
        self.std = tuple(std or (0.5, 0.5, 0.5))
        self.normalize = normalize
        if len(self.mean) != 3 or len(self.std) != 3 or not all(self.std):
            raise ValueError(f"mean and std need 3 values and no std of 0, got mean={self.mean}, std={self.std}")
        # What each of the 256 levels of a channel becomes, [3, 256].
        self._levels = np.tile(np.arange(256, dtype=np.float32) / np.float32(255), (3, 1))
        if normalize:
            means, stds = np.array([self.mean, self.std], np.float32)[:, :, None]
            self._levels = (self._levels - means) / stds

    @property
    def fill_color(self) -> tuple[int, ...]:
        """The mean as an RGB colour, for the margins of a letterbox."""
        return tuple(int(value * 255) for value in self.mean)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the picture as float32 [3, height, width]."""
        # Looked up with numpy, as pictures are prepared in several threads: torch would start its own in each of them.
        pixels = np.asarray(to_rgb(image))
        values = np.empty((3, *pixels.shape[:2]), np.float32)
        for channel, levels in enumerate(self._levels):
            np.take(levels, pixels[..., channel], out=values[channel], mode="clip")  # "raise" would copy the output
        return torch.from_numpy(values)

    def fit(self, image: Image.Image, canvas_size: tuple[int, int]) -> Image.Image:
        """Fit an RGB picture into a canvas (width, height), the margins in the mean colour."""
        box = letterbox(image.size, canvas_size)
        resized = image.resize((box.width, box.height), Image.Resampling.BICUBIC)
        if resized.size == canvas_size:
            return resized
        canvas = Image.new("RGB", canvas_size, self.fill_color)
        canvas.paste(resized, (box.left, box.top))
        return canvas

    def views(self, image: Image.Image, grid: TileGrid, size: int) -> list[torch.Tensor]:
        """Cut a picture into its views: the global view, then the tiles row by row, each [3, S, S].

        Args:
            image: a picture of any mode and size.
            grid: tiles to cut.
            size: side of a view in pixels (S).
        """
        rgb = to_rgb(image)
        global_view = self(self.fit(rgb, (size, size)))
        if grid == (1, 1):
            return [global_view, global_view]  # a single tile shows the same as the global view
        mosaic = self(self.fit(rgb, (grid.columns * size, grid.rows * size)))
        tiles = [mosaic[:, top:bottom, left:right] for left, top, right, bottom in tile_boxes(grid, size)]
        return [global_view, *tiles]
