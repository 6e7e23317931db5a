"""The page's log. Imports no heavy library, so that the page comes up at once."""

import logging
import os
import sys

LOGGER_NAME = "gradio_logger"
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure_logger(log_file: str | os.PathLike[str] | None = None, level: int = logging.INFO) -> logging.Logger:
    """Set up the web page's logger, `gradio_logger`: on standard error, and into a file if one is given.

    Calling it again replaces the set-up. Nothing that users write or upload belongs in this log.

    Raises:
        OSError: the file cannot be written.
    """
    logger = logging.getLogger(LOGGER_NAME)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file is not None:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_LOG_FORMAT))
        logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return logger
