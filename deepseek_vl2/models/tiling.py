"""Dynamic tiling: how a picture is cut into views, and how many tokens that makes. Pure geometry, no tensors.

Sizes are (width, height) in pixels, as Pillow gives them. The source is section 3 of the DeepSeek-VL2 paper
(arXiv 2412.10302): a picture is shown once as a whole (the global view) and once, enlarged to the best of the
candidate resolutions, as a grid of tiles.
"""

from collections.abc import Sequence
from typing import NamedTuple

# From this number of pictures on, none is cut: each is one tile, so that the context is not used up.
MAX_TILED_IMAGES = 2


class TileGrid(NamedTuple):
    """Tiles of one picture, as `images_spatial_crop` stores them."""

    columns: int
    rows: int

    @property
    def num_tiles(self) -> int:
        """Tiles in the grid, the global view not counted."""
        return self.columns * self.rows

    @property
    def num_views(self) -> int:
        """Views of the picture: the global view and the tiles."""
        return 1 + self.num_tiles


class Letterbox(NamedTuple):
    """Where a picture lies on a canvas that it was fitted to. Pixels of the canvas."""

    left: int
    top: int
    width: int
    height: int


def select_best_resolution(
    image_size: tuple[int, int], candidate_resolutions: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """Choose the canvas that keeps most of a picture.

    The effective resolution of a canvas is the area of the picture fitted into it, at most the picture's own area.
    The largest wins; among equals the one with the least unused area; among equals again the first.

    Args:
        image_size: (width, height) of the picture.
        candidate_resolutions: canvases to choose from, (width, height) each.

    Raises:
        ValueError: no candidates, or a side of the picture is below 1.
    """
    width, height = image_size
    if width < 1 or height < 1:
        raise ValueError(f"a picture needs at least one pixel a side, got {width}x{height}")
    if not candidate_resolutions:
        raise ValueError("candidate_resolutions is empty: give at least one (width, height)")

    def merit(candidate: Sequence[int]) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - candidate[0] * candidate[1]

    best = max(candidate_resolutions, key=merit)  # max keeps the first of equals
    return best[0], best[1]


def choose_grid(
    image_size: tuple[int, int], num_images: int, tile_size: int, candidate_resolutions: Sequence[Sequence[int]]
) -> TileGrid:
    """Choose the tiles of one picture among `num_images` of the same conversation.

    Args:
        image_size: (width, height) of the picture.
        num_images: pictures in the whole conversation; 3 or more switch tiling off.
        tile_size: side of a view in pixels (S).
        candidate_resolutions: canvases to choose from, (width, height), multiples of `tile_size`.
    """
    if num_images > MAX_TILED_IMAGES:
        return TileGrid(1, 1)
    width, height = select_best_resolution(image_size, candidate_resolutions)
    return TileGrid(width // tile_size, height // tile_size)


def num_image_tokens(grid: TileGrid, tokens_per_side: int) -> int:
    """Count the image tokens of one picture.

    The global view has G rows of G tokens, the mosaic of tiles G * rows rows of G * columns tokens. A newline token
    ends every row, and one separator stands between the two.

    Args:
        grid: tiles of the picture.
        tokens_per_side: image tokens along a side of one view (G).
    """
    columns, rows = grid
    global_view = tokens_per_side * (tokens_per_side + 1)
    mosaic = (rows * tokens_per_side) * (columns * tokens_per_side + 1)
    return global_view + 1 + mosaic


def tile_boxes(grid: TileGrid, tile_size: int) -> list[tuple[int, int, int, int]]:
    """List the tiles' boxes (left, top, right, bottom) on the enlarged picture, row by row."""
    return [
        (column * tile_size, row * tile_size, (column + 1) * tile_size, (row + 1) * tile_size)
        for row in range(grid.rows)
        for column in range(grid.columns)
    ]


def letterbox(image_size: tuple[int, int], canvas_size: tuple[int, int]) -> Letterbox:
    """Fit a picture into a canvas, aspect ratio kept, centred. Rounds as Pillow's `ImageOps.pad` does.

    A picture so thin that its short side would round to nothing keeps one pixel.
    """
    width, height = image_size
    canvas_width, canvas_height = canvas_size
    fit_width, fit_height = canvas_width, canvas_height
    if width / height > canvas_width / canvas_height:
        fit_height = max(1, round(height / width * canvas_width))
    elif width / height < canvas_width / canvas_height:
        fit_width = max(1, round(width / height * canvas_height))
    # Only one of the two margins is above zero.
    return Letterbox(
        left=round((canvas_width - fit_width) * 0.5),
        top=round((canvas_height - fit_height) * 0.5),
        width=fit_width,
        height=fit_height,
    )
