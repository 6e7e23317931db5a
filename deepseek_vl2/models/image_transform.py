"""From a PIL picture to normalised views."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from deepseek_vl2.models.tiling import TileGrid, letterbox, tile_boxes


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB; what is transparent becomes white, 16-bit greys keep their high byte."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (255, 255, 255, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")


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
        self._mean = torch.tensor(self.mean).view(3, 1, 1)
        self._std = torch.tensor(self.std).view(3, 1, 1)

    @property
    def fill_color(self) -> tuple[int, ...]:
        """The mean as an RGB colour, for the margins of a letterbox."""
        return tuple(int(value * 255) for value in self.mean)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the picture as float32 [3, height, width]."""
        pixels = torch.from_numpy(np.array(to_rgb(image)))
        values = pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return values.sub_(self._mean).div_(self._std) if self.normalize else values

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
