"""What the tests of evaluation share."""

import pytest
from benchmark_files import HEIGHT, WIDTH
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    """Two pictures, and one that is broken."""
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (WIDTH, HEIGHT), color).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    return tmp_path
