"""Errors in a user's words."""

import torch


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
