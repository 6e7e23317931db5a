"""Errors in one line: files by name, memory with a way out, everything else without line breaks."""

import pytest
import torch

from deepseek_vl2.utils.errors import describe_error, run_command


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


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 7, ""),
        (ValueError("two\nlines"), 2, "program: error: two lines\n"),
        (ImportError("no peft"), 2, "program: error: no peft\n"),
        (MemoryError(), 2, "program: error: there is not enough memory; try less\n"),
        (KeyboardInterrupt(), 130, "\nprogram: stopped\n"),
    ],
)
def test_a_command_ends_with_a_line_and_a_code(capsys, error, code, line):
    def command():
        if error is not None:
            raise error
        return 7

    assert run_command("program", command, more_memory="less", interrupted="stopped") == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line)


def test_faults_of_the_program_pass_through_a_command():
    def command():
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        run_command("program", command)
    assert run_command("program", command, errors=(RuntimeError,)) == 2
