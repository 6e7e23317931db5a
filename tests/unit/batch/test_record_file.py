"""Records of a run that goes on, and its output."""

import json

import pytest
from pyarrow import parquet

from deepseek_vl2.batch.items import Item
from deepseek_vl2.batch.output import check_output, write_output
from deepseek_vl2.batch.preparing import PreparedItem
from deepseek_vl2.batch.record_file import RECORDS_FILE, RecordFile, drop_failed
from deepseek_vl2.batch.records import answer_record, error_record
from deepseek_vl2.serve.batch_generation import BatchAnswer


def record(index, error=None):
    return {"index": index, "id": f"ä{index}", "error": error}


def filled(folder, *records, num_items=5):
    with RecordFile(folder, num_items) as file:
        for entry in records:
            file.append([entry])
    return folder / RECORDS_FILE


def test_records_are_found_by_index_and_come_in_order(tmp_path):
    with RecordFile(tmp_path, 4) as file:
        file.append([record(2), record(0, "broken")])
        assert (file.num_done, file.num_failed) == (2, 1)
        with pytest.raises(ValueError, match="2 of 4 records are missing"):
            list(file.in_order())
    with RecordFile(tmp_path, 4) as file:
        assert [file.is_done(index) for index in range(4)] == [True, False, True, False]
        file.append([record(3)])
        file.append([record(1)])
        assert list(file.in_order()) == [record(0, "broken"), record(1), record(2), record(3)]
        assert (file.num_done, file.num_failed, len(file)) == (4, 1, 4)


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_line_is_answered_again(tmp_path, cut):
    path = filled(tmp_path, record(1), record(3))
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    with RecordFile(tmp_path, 5) as file:
        assert file.is_done(1) and not file.is_done(3)
        file.append([record(3)])
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "said"),
    [(record(1), "two records of item 1"), (record(5), r"no item \(5\)"), ({}, r"no item \(None\)"), ("{", "damaged")],
)
def test_a_file_of_another_run_is_refused(tmp_path, line, said):
    path = filled(tmp_path, record(1))
    with path.open("a") as file:
        file.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(ValueError, match=said):
        RecordFile(tmp_path, 5)


def test_failed_records_can_be_dropped(tmp_path):
    path = filled(tmp_path, record(1), record(2, "x"), record(3), record(4, "y"))
    assert drop_failed(tmp_path) == 2
    assert [json.loads(line)["index"] for line in path.read_text(encoding="utf-8").splitlines()] == [1, 3]
    assert [file.name for file in tmp_path.iterdir()] == [RECORDS_FILE]


def answered():
    prepared = PreparedItem(
        Item(0, "a.png", ({"role": "user", "content": "<image>\nWhere is the star?"},), ("a.png",)), sizes=((200, 100),)
    )
    text = "<|ref|>star<|/ref|><|det|>[[0, 0, 999, 500]]<|/det|> and <|det|>[[1]]<|/det|>"
    return answer_record(prepared, BatchAnswer(text, 9, True), 0.123456)


def test_a_record_has_boxes_in_pixels_and_says_what_is_malformed():
    made = answered()
    assert made["boxes"] == [{"picture": 1, "label": "star", "box": [0, 0, 999, 500], "pixels": [0, 0, 200, 50]}]
    assert len(made["box_problems"]) >= 1
    assert (made["index"], made["id"], made["new_tokens"], made["is_cut_off"]) == (0, "a.png", 9, True)
    assert made["seconds"] == 0.1235
    assert made["error"] is None


def test_an_error_has_the_same_fields():
    made = error_record(PreparedItem(Item(1, "b.png", problem="x"), problem="no file \udcff"))
    assert list(made) == list(answered())
    assert (made["text"], made["error"], made["boxes"], made["new_tokens"]) == (None, "no file ?", [], 0)
    unreadable = Item(1, "b.png", ({"role": "user", "content": 5},))
    assert error_record(PreparedItem(unreadable, problem="x"))["error"] == "x"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_output_is_written_at_once(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    records = [answered(), error_record(PreparedItem(Item(1, "b.png"), problem="ä"))]
    write_output(records, path, tmp_path)
    if suffix == ".parquet":
        assert parquet.read_table(path).to_pylist() == records
    else:
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == records
    before = path.read_bytes()

    def fail():
        yield records[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        write_output(fail(), path, tmp_path)
    assert caught.value.filename == str(tmp_path / f"output{suffix}.tmp")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "said"),
    [("out.txt", "ends in .jsonl or .parquet"), ("gone/out.jsonl", "does not exist"), ("folder.jsonl", "is a folder")],
)
def test_outputs_that_cannot_be_written(tmp_path, name, said):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=said):
        check_output(tmp_path / name)
