"""An endpoint compared with the library: equal where it is our own server, and told apart where it is not."""

import json
import shutil

import pytest

from deepseek_vl2.serve import compare
from deepseek_vl2.serve.compare import compare_answers, find_pictures, main, summarize

BOX = "<|ref|>a<|/ref|><|det|>[[0, 0, 100, 100]]<|/det|>"


@pytest.fixture
def folder(repository, tmp_path):
    for name in ("visual_grounding_1.jpeg", "vqa_1.jpeg"):
        shutil.copy(repository / "images" / name, tmp_path)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.fixture
def loaded_once(nano, monkeypatch):
    monkeypatch.setattr(compare, "load_pretrained_model", lambda *arguments: nano)


def run(capsys, *arguments):
    code = main([*map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_our_own_server_says_the_same(nano_server, loaded_once, folder, capsys):
    options = ("--endpoint", f"{nano_server.url}/v1", "--model", "nano", "--folder", folder, "--max_new_tokens", 40)
    code, out, err = run(capsys, *options, "--prompt", "<|ref|>The red star.<|/ref|>.")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["num_pictures"] == 2
    assert result["exact_match"] == result["mean_box_iou"] == 1.0
    assert result["num_boxes"] >= 1
    assert result["differences"] == 0


def test_differences_are_listed(nano_server, loaded_once, folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "own_answer", lambda *arguments: "something else")
    output = tmp_path / "result.json"
    options = ("--endpoint", f"{nano_server.url}/v1/", "--model", "nano", "--folder", folder, "--max_new_tokens", 3)
    code, out, _ = run(capsys, *options, "--limit", 1, "--output", output)
    assert code == 0
    assert "library:  something else" in out
    assert json.loads(out.splitlines()[-1])["exact_match"] == 0
    (difference,) = json.loads(output.read_text())["differences"]
    assert difference["picture"] == "visual_grounding_1.jpeg"


def test_the_endpoint_refuses(nano_server, loaded_once, folder, capsys):
    options = ("--endpoint", f"{nano_server.url}/v1", "--model", "other", "--folder", folder)
    code, _, err = run(capsys, *options)
    assert code == 2
    assert "HTTP 404" in err.splitlines()[-1]


def test_no_endpoint_and_no_pictures(loaded_once, folder, tmp_path, capsys):
    code, _, err = run(capsys, "--endpoint", "http://127.0.0.1:9/v1", "--model", "nano", "--folder", folder)
    assert (code, "refused" in err) == (2, True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no pictures"):
        find_pictures(tmp_path / "empty")


def test_comparing():
    half = "<|ref|>b<|/ref|><|det|>[[0, 0, 100, 50], [500, 500, 600, 600]]<|/det|>"
    answer = compare_answers("x.png", BOX, half)
    assert answer.ious == [0.5, 0.0]  # the second box only the endpoint has
    assert compare_answers("x.png", half, BOX).ious == [0.5, 0.0]
    assert not answer.is_equal
    same = compare_answers("y.png", BOX, f"{BOX}\n")
    result = summarize([answer, same])
    assert result["exact_match"] == 0.5
    assert result["num_boxes"] == 3
    assert result["mean_box_iou"] == 0.5
    assert [difference["picture"] for difference in result["differences"]] == ["x.png"]
    assert summarize([compare_answers("z", "a", "a")])["mean_box_iou"] is None
