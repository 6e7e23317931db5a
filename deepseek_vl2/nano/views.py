"""Sizes of nano's views, and how large a picture appears in its tiles."""

from deepseek_vl2.models.tiling import choose_grid, letterbox

VIEW_SIDE = 112
PATCH_SIDE = 14
CANDIDATE_RESOLUTIONS = ((112, 112), (112, 224), (224, 112), (224, 224))


def tile_scale(size: tuple[int, int]) -> float:
    """Pixels of a tile for one pixel of a picture of a size (width, height)."""
    grid = choose_grid(size, 1, VIEW_SIDE, CANDIDATE_RESOLUTIONS)
    fitted = letterbox(size, (grid.columns * VIEW_SIDE, grid.rows * VIEW_SIDE))
    return min(fitted.width / size[0], fitted.height / size[1])
