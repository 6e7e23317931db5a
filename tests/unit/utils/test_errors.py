"""Errors in one line: files by name, memory with a way out, everything else without line breaks."""

import pytest
import torch

from deepseek_vl2.utils.errors import describe_error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.png"), "No such file or directory: a.png"),
        (OSError("cannot identify\n  the picture"), "cannot identify the picture"),
        (ValueError("first\n\tsecond  third"), "first second third"),
        (MemoryError(), "there is not enough memory; try less"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GB"), "there is not enough memory; try less"),
    ],
)
def test_one_line(error, line):
    assert describe_error(error, more_memory="less") == line


def test_memory_without_advice_keeps_its_own_words():
    assert describe_error(torch.OutOfMemoryError("CUDA out of\nmemory")) == "CUDA out of memory"
