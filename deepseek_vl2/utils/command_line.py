"""What the commands share about their command lines. Imports nothing heavy, so that mistakes are told at once."""

import argparse
from typing import NoReturn

# What can be chosen; the modules behind these names import torch.
DTYPES = ("auto", "bfloat16", "float16", "float32")
QUANTIZATIONS = ("int8", "int4")


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists all options)\n")
