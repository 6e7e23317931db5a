"""The folder of a run: settings that must stay, lines that may be cut off."""

import json

import pytest

from deepseek_vl2.evaluate.predictions import (
    PREDICTIONS_FILE,
    SETTINGS_FILE,
    begin_or_resume,
    file_digest,
    folder_digest,
    read_predictions,
)
from deepseek_vl2.evaluate.samples import Sample

SETTINGS = {"task": "docvqa", "model": "nano", "data_digest": "abc", "limit": None}
SAMPLES = [Sample(str(number), f"line {number}", "q") for number in range(3)]


def test_a_run_goes_on_with_the_same_settings(tmp_path):
    folder = tmp_path / "new" / "run"
    begin_or_resume(folder, SETTINGS)
    assert json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")) == SETTINGS
    begin_or_resume(folder, SETTINGS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "chartqa"}, "task was 'docvqa', is 'chartqa'"),
        ({"data_digest": "xyz"}, "data_digest was 'abc', is 'xyz'"),
        ({"limit": 5, "model": "other"}, "model was 'nano', is 'other'; limit was None, is 5"),
        ({"new": 1}, "new was None, is 1"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, change, said):
    begin_or_resume(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="other settings") as refused:
        begin_or_resume(tmp_path, {**SETTINGS, **change})
    assert said in str(refused.value)
    assert json.loads((tmp_path / SETTINGS_FILE).read_text(encoding="utf-8")) == SETTINGS


def test_predictions_without_settings_and_damaged_settings_are_refused(tmp_path):
    (tmp_path / PREDICTIONS_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"no settings\.json"):
        begin_or_resume(tmp_path, SETTINGS)
    (tmp_path / SETTINGS_FILE).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        begin_or_resume(tmp_path, SETTINGS)


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


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / PREDICTIONS_FILE).write_text('{"id": "0"}\n{broken\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_predictions(tmp_path, SAMPLES)


def test_digests_follow_the_content(tmp_path):
    # SHA-256 of "abc", from FIPS 180-2, appendix B.1
    (tmp_path / "config.json").write_text("abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(tmp_path / "config.json") == known
    before = folder_digest(tmp_path)
    assert folder_digest(tmp_path) == before
    (tmp_path / "config.json").write_text("abd")
    changed = folder_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(2**20 + 1))
    assert len({before, changed, folder_digest(tmp_path)}) == 3
