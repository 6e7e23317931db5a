"""The folder of a run: settings that must stay, records that are on the disk, lines that may be cut off."""

import errno
import json
import os

import pytest

from deepseek_vl2 import nano
from deepseek_vl2.utils.run_folder import (
    SETTINGS_FILE,
    append_records,
    begin_or_resume,
    file_digest,
    folder_digest,
    lock_folder,
    model_digest,
    read_records,
)

RECORDS_FILE = "records.jsonl"
SETTINGS = {"task": "docvqa", "model": "nano", "data_digest": "abc", "limit": None}


def test_a_run_goes_on_with_the_same_settings(tmp_path):
    folder = tmp_path / "new" / "run"
    begin_or_resume(folder, SETTINGS, RECORDS_FILE)
    assert json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")) == SETTINGS
    begin_or_resume(folder, SETTINGS, RECORDS_FILE)


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
    begin_or_resume(tmp_path, SETTINGS, RECORDS_FILE)
    with pytest.raises(ValueError, match="other settings") as refused:
        begin_or_resume(tmp_path, {**SETTINGS, **change}, RECORDS_FILE)
    assert said in str(refused.value)
    assert json.loads((tmp_path / SETTINGS_FILE).read_text(encoding="utf-8")) == SETTINGS


def test_records_without_settings_and_damaged_settings_are_refused(tmp_path):
    (tmp_path / RECORDS_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"no settings\.json"):
        begin_or_resume(tmp_path, SETTINGS, RECORDS_FILE)
    for content in ("{", "[]", "5"):
        (tmp_path / SETTINGS_FILE).write_text(content)
        with pytest.raises(ValueError, match="damaged"):
            begin_or_resume(tmp_path, SETTINGS, RECORDS_FILE)


def test_records_come_back_with_the_places_of_their_lines(tmp_path):
    path = tmp_path / RECORDS_FILE
    assert list(read_records(path)) == []
    records = [{"id": "0", "answer": "ä"}, {"id": "1"}]
    for record in records:
        with path.open("ab", buffering=0) as file:
            append_records(file, [record])
    content = path.read_bytes()
    assert list(read_records(path)) == [(0, records[0]), (content.index(b"\n") + 1, records[1])]
    path.write_bytes(content + b'{"id": "2", "answer": "\xc3')
    assert [record["id"] for _, record in read_records(path)] == ["0", "1"]
    assert path.read_bytes() == content
    path.write_bytes(b'{"id": "0"}\n{broken\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        list(read_records(path))


def test_what_the_system_writes_only_in_part_is_written_on(tmp_path, monkeypatch):
    class Slow:
        name = "slow"

        def __init__(self, file):
            self.file = file
            self.fileno = file.fileno

        def write(self, content):
            return self.file.write(content[:3])

    path = tmp_path / RECORDS_FILE
    with path.open("ab", buffering=0) as file:
        append_records(Slow(file), [{"id": "0"}, {"id": "1"}])
    assert [record["id"] for _, record in read_records(path)] == ["0", "1"]


def test_a_full_disk_names_the_file():
    """/dev/full is a disk that is always full."""
    with open("/dev/full", "ab", buffering=0) as file, pytest.raises(OSError, match="/dev/full") as raised:  # noqa: PTH123
        append_records(file, [{"id": "0"}])
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.strerror == os.strerror(errno.ENOSPC)


def test_the_digest_of_a_model_is_that_of_its_folder():
    assert model_digest("nano") == model_digest(nano.path()) is not None
    assert model_digest("deepseek-ai/deepseek-vl2-tiny") is None


def test_a_model_card_is_no_part_of_a_models_digest(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = folder_digest(tmp_path)
    (tmp_path / "README.md").write_text("# A model")
    (tmp_path / "curves.png").write_bytes(b"PNG")
    assert folder_digest(tmp_path) == before
    (tmp_path / "merges.txt").write_text("a b")
    assert folder_digest(tmp_path) != before


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


@pytest.mark.parametrize(
    ("size", "start", "num_bytes"),
    [
        (4 * 2**20, 1_234_567, 1),  # digested whole
        (9 * 2**20 + 3, 5_000_000, 2 * 9 * 2**10),  # one part of a larger model was trained
        (9 * 2**20 + 3, 0, 1),
        (9 * 2**20 + 3, 9 * 2**20 + 2, 1),
    ],
)
def test_other_weights_of_the_same_size_have_another_digest(tmp_path, size, start, num_bytes):
    content = bytearray(size)
    (tmp_path / "model.safetensors").write_bytes(content)
    before = folder_digest(tmp_path)
    content[start : start + num_bytes] = b"x" * num_bytes
    (tmp_path / "model.safetensors").write_bytes(content)
    assert len(content) == size
    assert folder_digest(tmp_path) != before


def test_a_locked_folder_is_refused_until_it_is_free(tmp_path):
    folder = tmp_path / "new"
    with lock_folder(folder):
        second = lock_folder(folder)
        with pytest.raises(BlockingIOError, match=rf"another run is at work in .* \(process {os.getpid()}\)"):
            second.__enter__()
    with lock_folder(folder):
        pass
