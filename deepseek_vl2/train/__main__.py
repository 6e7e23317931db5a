"""Fine-tunes a model: `python -m deepseek_vl2.train --config FILE`."""

import argparse
import logging
import sys
from pathlib import Path

from deepseek_vl2.train.config import explain_keys, read_config
from deepseek_vl2.train.trainer import TrainResult, train
from deepseek_vl2.utils.command_line import OneLineParser
from deepseek_vl2.utils.errors import USER_ERRORS, can_be_mended, describe_error

MORE_MEMORY = "a smaller batch_size, gradient_checkpointing: true, precision: bf16_weights, or language: lora"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; a run that was stopped goes on from its newest checkpoint.

    Returns:
        The exit code: 0, 2 after an error that the user can mend, 130 when interrupted.
    """
    parser = OneLineParser(
        prog="python -m deepseek_vl2.train",
        description="Fine-tune a DeepSeek-VL2 model.",
        epilog=f"keys of the configuration, with their defaults:\n{explain_keys()}".replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML or JSON file")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="replace values of the file"
    )
    parser.add_argument(
        "--skip-bad", "--skip_bad", action="store_true", help="go on without lines that are bad: --set skip_bad=true"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = [*options.set, *(["skip_bad=true"] if options.skip_bad else [])]
    try:
        config = read_config(options.config, overrides)
        result = train(config)
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)  # of bad data a line each
        return 2
    except (RuntimeError, *USER_ERRORS) as error:
        if not can_be_mended(error):
            raise
        print(f"{parser.prog}: error: {describe_error(error, MORE_MEMORY)}", file=sys.stderr)
        return 2
    print(describe(result, config.model_path if config.uses_lora else None))
    return 0


def describe(result: TrainResult, model_path: str | None) -> str:
    """What came of a run, and how to use it.

    Args:
        result: of the run.
        model_path: what the adapter belongs to; None for a whole model.
    """
    losses = {"loss": result.train_loss, "loss on what was not learnt": result.eval_loss}
    measured = "".join(f", {name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
    use = f"--model_path {result.output_dir}"
    if model_path is not None:
        use = f"--model_path {model_path} --adapter {result.output_dir}"
    return f"{result.num_steps} steps{measured}. Ask it: python inference.py {use}"


if __name__ == "__main__":
    sys.exit(main())
