"""Errors in a user's words."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

# What a user can mend: a bad value, a file, a missing package, too little memory.
USER_ERRORS = (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError)
# What PyTorch says in a plain RuntimeError where memory is short: on CPUs, on CPUs under Windows, on the other devices.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
# EX_SOFTWARE of sysexits.h.
FAULT_CODE = 70


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, of the machine or of a device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def can_be_mended(error: BaseException, errors: tuple[type[Exception], ...] = USER_ERRORS) -> bool:
    """Whether an error is one of those that the user can mend, or of too little memory; others are faults."""
    return isinstance(error, errors) or is_out_of_memory(error)


def describe_error(error: Exception, more_memory: str = "") -> str:
    """One line on what went wrong.

    Args:
        error: what was raised.
        more_memory: what to try when there is not enough memory.
    """
    if more_memory and is_out_of_memory(error):
        return f"there is not enough memory; try {more_memory}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split())


def run_command(
    program: str,
    command: Callable[[], int],
    more_memory: str = "",
    interrupted: str = "interrupted",
    errors: tuple[type[Exception], ...] = USER_ERRORS,
) -> int:
    """Runs a command; what the user can mend is told in one line on standard error.

    Args:
        program: how the command is called.
        command: the work; returns the exit code.
        more_memory: see `describe_error`.
        interrupted: what to say after an interrupt.
        errors: that the user can mend, beside too little memory; others are faults of the program and pass through.

    Returns:
        The exit code: that of the work, 2 after such an error, 130 when interrupted.
    """
    caught: tuple[type[Exception], ...] = (RuntimeError, *errors)
    try:
        return command()
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{program}: {interrupted}\n")
        return 130
    except caught as error:
        if not can_be_mended(error, errors):
            raise
        sys.stderr.write(f"{program}: error: {describe_error(error, more_memory)}\n")
        return 2


def end_faults_with_own_code() -> None:
    """Lets a fault of the program end the process with `FAULT_CODE`, for codes below to keep their meaning.

    Python itself ends with 1 after a traceback.
    """
    sys.excepthook = _tell_and_exit


def _tell_and_exit(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    raise SystemExit(FAULT_CODE)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Puts a file's name into the errors of writing it: a full disk is told without one.

    Raises:
        OSError: as in the block.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
