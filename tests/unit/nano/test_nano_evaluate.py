"""nano's evaluation: how answers are judged, and the command that measures a checkpoint."""

import json

import pytest
import torch

from deepseek_vl2.nano import evaluate
from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.nano.evaluate import (
    MAX_NEW_TOKENS,
    answer_examples,
    evaluate_task,
    judge,
    summarize,
)
from deepseek_vl2.nano.questions import EVAL_SPLIT, TASKS, Example, example_at, format_grounding
from deepseek_vl2.nano.scenes import Background, Scene

SCENE = Scene(200, 100, Background("plain", (255, 255, 255), (255, 255, 255), True, 8), ())


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """Model, processor and folder of a nano that has learnt nothing."""
    folder = tmp_path_factory.mktemp("untrained")
    processor = nano_processor()
    model = untrained_nano(processor.tokenizer, seed=1).eval()
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return model, processor, folder


def box_answer(*boxes):
    return format_grounding("red star", boxes, SCENE.size)


@pytest.mark.parametrize(
    ("answer", "accuracy", "iou"),
    [
        (box_answer((20, 10, 60, 50)), 1, 1),
        (box_answer((20, 10, 60, 35)), 1, 25 / 40),
        (box_answer((20, 10, 60, 29)), 0, 19 / 40),
        (box_answer((120, 60, 160, 90)), 0, 0),
        (box_answer((20, 10, 60, 50), (120, 60, 160, 90)), 0, 1),  # one too many
        ("", 0, 0),
        ("The red star is on the left.", 0, 0),
        ("<|ref|>red star<|/ref|><|det|>[[100, 100, 300", 0, 0),  # cut off
        ("<|ref|>red star<|/ref|><|det|>[[300, 500, 100, 100]]<|/det|>", 0, 0),
    ],
)
def test_judging_boxes(answer, accuracy, iou):
    example = Example("locate", "", box_answer((20, 10, 60, 50)), [(20, 10, 60, 50)], (), SCENE)
    scores = judge(example, answer)
    assert scores["accuracy"] == accuracy
    assert scores["iou"] == pytest.approx(iou, abs=0.03)  # whole thousandths of the picture


@pytest.mark.parametrize(
    ("expected", "answer", "accuracy"),
    [
        ("3", "3", 1),
        ("3", " 3.", 1),
        ("3", "13", 0),
        ("3", "", 0),
        ("red", "Red", 1),
        ("red", "red circle", 0),
        ("SHIP", "ship", 1),
        ("SHIP", "SHI", 0),
    ],
)
def test_judging_words(expected, answer, accuracy):
    assert judge(Example("read", "", expected, [], (), SCENE), answer) == {"accuracy": accuracy}


@pytest.mark.parametrize("task", list(TASKS))
def test_the_expected_answer_is_right_and_has_room(nano, task):
    for index in range(150):
        example = example_at(EVAL_SPLIT, index, {task: 1.0})
        scores = judge(example, example.answer)
        assert scores["accuracy"] == 1
        assert scores.get("iou", 1) > 0.85
        assert len(nano[1].encode(example.answer, bos=False, eos=True)) <= MAX_NEW_TOKENS


def test_summary_has_means_by_task():
    records = [
        {"task": "locate", "accuracy": 1.0, "iou": 0.9},
        {"task": "count", "accuracy": 1.0},
        {"task": "locate", "accuracy": 0.0, "iou": 0.2},
        {"task": "locate", "accuracy": 1.0, "iou": 0.7},
    ]
    assert summarize(records) == {
        "locate": {"scenes": 3, "accuracy": 0.6667, "iou": 0.6},
        "count": {"scenes": 1, "accuracy": 1.0},
    }
    assert summarize([]) == {}


def test_a_batch_gives_each_questions_own_answer(nano, monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 6)
    model, processor, _ = nano
    examples = [example_at(EVAL_SPLIT, index, {"locate": 1.0}) for index in (0, 1, 2)]
    together = answer_examples(model, processor, examples)
    assert together == [answer_examples(model, processor, [example])[0] for example in examples]
    assert all(together)


def test_an_answer_ends_at_eos(nano, monkeypatch):
    model, processor, _ = nano
    first, second = processor.encode("red", bos=False)[0], processor.encode("star", bos=False)[0]

    def generate(input_ids, **options):
        ends = [[first, processor.eos_id, processor.pad_id], [first, second, processor.eos_id]]
        return torch.cat((input_ids, torch.tensor(ends)), dim=1)

    monkeypatch.setattr(model, "generate", generate)
    examples = [example_at(EVAL_SPLIT, index, {"color": 1.0}) for index in (0, 1)]
    assert answer_examples(model, processor, examples) == ["red", "redstar"]


def test_records_do_not_depend_on_the_batch_size(nano, monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 3)
    model, processor, _ = nano
    records = list(evaluate_task(model, processor, "count", 3, batch_size=2, first=4))
    assert [record["scene"] for record in records] == [4, 5, 6]
    for record in records:
        example = example_at(EVAL_SPLIT, record["scene"], {"count": 1.0})
        assert (record["question"], record["expected"]) == (example.question, example.answer)
        assert record["accuracy"] == judge(example, record["answer"])["accuracy"]
    assert records == list(evaluate_task(model, processor, "count", 3, batch_size=3, first=4))


def test_command_prints_a_table_and_json(nano, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 3)
    output = tmp_path / "answers.jsonl"
    arguments = ["--model_path", str(nano[2]), "--num_scenes", "2", "--tasks", "locate", "count", "--dtype", "float32"]
    assert evaluate.main([*arguments, "--device", "cpu", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "scenes", "accuracy", "mean", "IoU"]
    assert [line.split()[:2] for line in lines[1:3]] == [["locate", "2"], ["count", "2"]]
    summary = json.loads(lines[-1])
    assert set(summary) == {"locate", "count"} and len(lines) == 4
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(record["task"], record["scene"]) for record in records] == [(t, i) for t in summary for i in (0, 1)]
    assert summarize(records) == summary


def test_command_asks_all_tasks_of_nano_by_default(nano, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 1)
    monkeypatch.setattr("deepseek_vl2.nano.path", lambda: str(nano[2]))
    assert evaluate.main(["--num_scenes", "1", "--device", "cpu"]) == 0
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])) == list(TASKS)


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_command_names_a_bad_model_path_in_one_line(kind, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    if kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_text("no folder")
    assert evaluate.main(["--model_path", str(folder), "--num_scenes", "2"]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and "error:" in lines[0] and str(folder) in lines[0]
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments", [["--num_scenes", "0"], ["--batch_size", "0"], ["--first_scene", "-1"], ["--tasks", "dance"]]
)
def test_command_refuses_options_out_of_range(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err
