"""Trains nano: `python -m deepseek_vl2.nano --folder runs/nano`."""

import logging
import sys
from pathlib import Path

from deepseek_vl2.nano.train import REPEATED_STAGES, NanoTrainer, TrainingSettings
from deepseek_vl2.utils.command_line import OneLineParser
from deepseek_vl2.utils.errors import run_command


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; a run that was stopped goes on where its last saved state is.

    Returns:
        The exit code: 0, 2 after an error that the user can mend, 130 when interrupted.
    """
    parser = OneLineParser(prog="python -m deepseek_vl2.nano", description="Train nano.")
    parser.add_argument("--folder", type=Path, default=Path("runs/nano"), help="states and log; default: runs/nano")
    parser.add_argument("--checkpoint", type=Path, help="where the model goes; default: FOLDER/checkpoint")
    parser.add_argument(
        "--share", type=float, default=1.0, help="part of each stage's batches, for a trial; default: 1"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        help=f"how often {', '.join(REPEATED_STAGES)} are gone through, for better reading; a training that has ended "
        "goes on with a higher number; default: 1",
    )
    parser.add_argument("--start_from", type=Path, help="checkpoint of an earlier edition to grow; default: nothing")
    parser.add_argument("--num_threads", type=int, default=TrainingSettings.num_threads)
    parser.add_argument("--seed", type=int, default=TrainingSettings.seed, help="of the starting weights")
    options = parser.parse_args(arguments)
    if not 0 < options.share <= 1 or min(options.num_threads, options.rounds) < 1:
        parser.error("--share must be above 0 and at most 1, --num_threads and --rounds at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    numbers = {"num_threads": options.num_threads, "seed": options.seed}
    settings = (
        TrainingSettings.of_growth(options.start_from, **numbers) if options.start_from else TrainingSettings(**numbers)
    ).scaled(options.share)
    checkpoint = options.checkpoint or options.folder / "checkpoint"
    return run_command(
        parser.prog,
        lambda: _train(NanoTrainer(settings, options.folder, options.rounds), checkpoint),
        interrupted="interrupted; the same command goes on from the last saved state",
    )


def _train(trainer: NanoTrainer, checkpoint: Path) -> int:
    trainer.run()
    trainer.save_checkpoint(checkpoint)
    print(f"nano is saved in {checkpoint}. Measure it: python -m deepseek_vl2.nano.evaluate --model_path {checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
