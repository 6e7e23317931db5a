"""Errors in one line: files by name, memory with a way out, everything else without line breaks."""

import sys
from pathlib import Path

import pytest
import torch

from deepseek_vl2.utils.errors import (
    FAULT_CODE,
    describe_error,
    end_faults_with_own_code,
    is_out_of_memory,
    naming_file,
    run_command,
)

CPU_MEMORY = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.png"), "No such file or directory: a.png"),
        (OSError("cannot identify\n  the picture"), "cannot identify the picture"),
        (ValueError("first\n\tsecond  third"), "first second third"),
        (MemoryError(), "there is not enough memory; try less"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GB"), "there is not enough memory; try less"),
        (CPU_MEMORY, "there is not enough memory; try less"),
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
        (CPU_MEMORY, 2, "program: error: there is not enough memory; try less\n"),
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


def test_pytorchs_own_words_for_too_little_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("a fault"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_fault_has_an_exit_code_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    end_faults_with_own_code()
    with pytest.raises(SystemExit) as stop:
        sys.excepthook(KeyError, KeyError("a fault"), None)
    assert stop.value.code == FAULT_CODE == 70
    assert "KeyError: 'a fault'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), "No space left on device: out.jsonl"),
        (OSError("[Errno 28] Error writing bytes to file"), "out.jsonl: [Errno 28] Error writing bytes to file"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), "No such file or directory: a.png"),
    ],
)
def test_errors_of_writing_name_the_file(error, line):
    with pytest.raises(OSError) as caught, naming_file(Path("out.jsonl")):
        raise error
    assert describe_error(caught.value) == line
