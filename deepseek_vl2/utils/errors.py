"""Errors in a user's words."""

import sys
from collections.abc import Callable

import torch

# What a user can mend: a bad value, a file, a missing package, too little memory.
USER_ERRORS = (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError)


def describe_error(error: Exception, more_memory: str = "") -> str:
    """One line on what went wrong.

    Args:
        error: what was raised.
        more_memory: what to try when there is not enough memory.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) and more_memory:
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
        errors: that the user can mend; others are faults of the program and pass through.

    Returns:
        The exit code: that of the work, 2 after such an error, 130 when interrupted.
    """
    try:
        return command()
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{program}: {interrupted}\n")
        return 130
    except errors as error:
        sys.stderr.write(f"{program}: error: {describe_error(error, more_memory)}\n")
        return 2
