"""The curves of a training: what is read from a log, and that a picture comes of it."""

import json
import math

import pytest
from PIL import Image

from deepseek_vl2.nano import curves
from deepseek_vl2.nano.curves import ANSWERS, MAX_GAP, TOKENS, WINDOW, read_log, smoothed


def write_log(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_batches_learnt_twice_count_once_and_stages_come_in_order(tmp_path):
    lines = [
        {"stage": "answers", "batch": 20, "words": 3.0},
        {"stage": "views", "batch": 40, "dense_boxes": 2.0},
        {"stage": "views", "batch": 20, "dense_boxes": 9.0},
        {"stage": "views", "batch": 20, "dense_boxes": 4.0},  # after a stop
    ]
    read = read_log(write_log(tmp_path / "log.jsonl", lines))
    assert [(line["stage"], line["batch"]) for line in read] == [("views", 20), ("views", 40), ("answers", 20)]
    assert read[0]["dense_boxes"] == 4.0


def test_rounds_come_one_after_the_other(tmp_path):
    positions = [(2, "print", 20), (1, "counts", 20), (2, "finish", 20), (1, "print", 20)]
    lines = [{"round": number, "stage": stage, "batch": batch} for number, stage, batch in positions]
    read = read_log(write_log(tmp_path / "log.jsonl", lines))
    assert [(line["round"], line["stage"]) for line in read] == [
        (1, "print"),
        (1, "counts"),
        (2, "print"),
        (2, "finish"),
    ]


def test_means_run_over_what_a_batch_holds():
    lines = [{"place": number, "words": float(number)} for number in range(1, WINDOW + 3)]
    lines.insert(2, {"place": 2.5, "words": 0.0})  # a batch without words
    places, means = smoothed(lines, "words")
    assert places == list(range(1, WINDOW + 3))
    assert means[0] == 1.0 and means[1] == 1.5
    assert means[-1] == pytest.approx(sum(range(3, WINDOW + 3)) / WINDOW)


def test_a_line_is_interrupted_where_a_stage_has_no_such_loss():
    lines = [{"place": place, "words": 2.0} for place in (20, 40, 40 + MAX_GAP, 41 + 2 * MAX_GAP)]
    places, means = smoothed(lines, "words")
    assert places == [20, 40, 40 + MAX_GAP, 41 + 2 * MAX_GAP, 41 + 2 * MAX_GAP]
    assert [math.isnan(mean) for mean in means] == [False, False, False, True, False]


def test_the_command_draws_a_picture(tmp_path, capsys):
    stages = {"views": ["dense_boxes"], "answers": [*ANSWERS, *TOKENS], "together": [*ANSWERS, *TOKENS]}
    lines = [
        {"stage": stage, "batch": 20 * number, **dict.fromkeys(names, 1 / number)}
        for stage, names in stages.items()
        for number in (1, 2, 3)
    ]
    log, output = write_log(tmp_path / "log.jsonl", lines), tmp_path / "curves.png"
    assert curves.main(["--log", str(log), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    with Image.open(output) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(10**6)) > 50  # lines of several colours, not an empty sheet


@pytest.mark.parametrize("content", [None, ""])
def test_a_log_that_is_missing_or_empty_is_named(tmp_path, capsys, content):
    log = tmp_path / "log.jsonl"
    if content is not None:
        log.write_text(content)
    assert curves.main(["--log", str(log), "--output", str(tmp_path / "curves.png")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and str(log) in errors[0]
