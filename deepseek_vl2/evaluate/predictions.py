"""The predictions of a run, line by line, so that a stopped run goes on where it was."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_vl2.evaluate.samples import Sample
from deepseek_vl2.utils.run_folder import read_records

PREDICTIONS_FILE = "predictions.jsonl"


def read_predictions(folder: Path, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Reads what is there, in the samples' order; a last line without an end is cut off the file.

    Raises:
        ValueError: a line is damaged, or belongs to no or another sample.
    """
    path = folder / PREDICTIONS_FILE
    records = [record for _, record in read_records(path)]
    expected = [sample.id for sample in samples[: len(records)]]
    if [record.get("id") for record in records] != expected:
        raise ValueError(f"the lines of {path} do not belong to the samples of the data file; take another folder")
    return records
