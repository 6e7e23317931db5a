"""How large a picture appears in nano's tiles, beside what the processor does with it."""

import pytest
import torch
from PIL import Image

from deepseek_vl2.nano.architecture import nano_processor
from deepseek_vl2.nano.views import tile_scale


@pytest.mark.parametrize("size", [(112, 112), (56, 56), (100, 60), (224, 224), (640, 480), (448, 224), (200, 390)])
def test_a_square_is_as_large_in_a_tile_as_the_scale_says(size):
    """A black square on white: its ink in all tiles together is its area times the square of the scale."""
    side = min(size) // 4
    picture = Image.new("RGB", size, "white")
    empty = Image.new("RGB", size, "white")
    # Away from the borders between tiles, which are at halves.
    picture.paste("black", (size[0] // 8, size[1] // 8, size[0] // 8 + side, size[1] // 8 + side))
    processor = nano_processor()
    drawn, blank = (
        torch.stack(processor.tokenize_with_images("<image>", [image], bos=True, eos=False, cropping=True).images)[1:]
        for image in (picture, empty)
    )
    ink = float((blank - drawn)[:, 0].sum()) / 2  # white is 1, black -1
    assert ink == pytest.approx((side * tile_scale(size)) ** 2, rel=0.02)
