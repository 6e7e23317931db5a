"""Writes a model with its adapter merged.

python -m deepseek_vl2.train.merge --model_path MODEL --adapter ADAPTER --output FOLDER
"""

import argparse
import sys
from pathlib import Path

from deepseek_vl2.utils.command_line import DTYPES, OneLineParser
from deepseek_vl2.utils.errors import run_command
from deepseek_vl2.utils.io import load_pretrained_model


def merge(model_path: str, adapter: str, output: Path, dtype: str = "auto") -> None:
    """Writes a whole checkpoint with its processor, which loads like any other.

    Args:
        model_path: the model that the adapter was trained on, see `load_pretrained_model`.
        adapter: its folder.
        output: a new or empty folder.
        dtype: of merging and of the result; `auto` for the model's own.

    Raises:
        ValueError: the adapter does not fit, or the output folder holds something.
        OSError: a folder is missing or cannot be written.
        ImportError: peft is not installed.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} must be a new or empty folder")
    _, processor, model = load_pretrained_model(model_path, dtype, device="cpu", adapter=adapter)
    model.save_pretrained(output)
    processor.save_pretrained(output)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit code: 0, or 2 after an error that the user can mend.
    """
    parser = OneLineParser(prog="python -m deepseek_vl2.train.merge", description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", required=True, help="the model that the adapter was trained on")
    parser.add_argument("--adapter", required=True, help="folder of the adapter")
    parser.add_argument("--output", required=True, type=Path, help="folder for the merged model")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="default: auto, the model's own")
    options = parser.parse_args(arguments)
    return run_command(parser.prog, lambda: _merge_and_tell(options))


def _merge_and_tell(options: argparse.Namespace) -> int:
    merge(options.model_path, options.adapter, options.output, options.dtype)
    print(f"The merged model is saved in {options.output}. Ask it: python inference.py --model_path {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
