"""Predictions of a run: lines that may be cut off, and that must belong to the samples."""

import json

import pytest

from deepseek_vl2.evaluate.predictions import PREDICTIONS_FILE, read_predictions
from deepseek_vl2.evaluate.samples import Sample

SAMPLES = [Sample(str(number), f"line {number}", "q") for number in range(3)]


def test_a_half_written_line_is_cut_off(tmp_path):
    assert read_predictions(tmp_path, SAMPLES) == []
    path = tmp_path / PREDICTIONS_FILE
    whole = b'{"id": "0", "answer": "\xc3\xa4"}\n{"id": "1"}\n'
    path.write_bytes(whole + b'{"id": "2", "answer": "\xc3')
    assert [record["id"] for record in read_predictions(tmp_path, SAMPLES)] == ["0", "1"]
    assert path.read_bytes() == whole
    path.write_bytes(b'{"id": "0"')
    assert read_predictions(tmp_path, SAMPLES) == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize("ids", [["1"], ["0", "2"], ["0", "1", "2", "3"]])
def test_predictions_of_other_samples_are_refused(tmp_path, ids):
    (tmp_path / PREDICTIONS_FILE).write_text("".join(json.dumps({"id": name}) + "\n" for name in ids))
    with pytest.raises(ValueError, match="do not belong"):
        read_predictions(tmp_path, SAMPLES)


@pytest.mark.parametrize("line", ["{broken", "5", "null"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / PREDICTIONS_FILE).write_text(f'{{"id": "0"}}\n{line}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_predictions(tmp_path, SAMPLES)
