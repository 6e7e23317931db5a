"""nano's evaluation: the files it writes, that expected answers are judged right, and what it puts into a card."""

import json

import pytest
import torch

from deepseek_vl2.evaluate.readers import read_samples
from deepseek_vl2.evaluate.tasks import TASKS as JUDGES
from deepseek_vl2.models.special_tokens import ASSISTANT, IMAGE, USER
from deepseek_vl2.nano import evaluate
from deepseek_vl2.nano.architecture import nano_config, nano_processor, untrained_nano
from deepseek_vl2.nano.evaluate import (
    MAX_NEW_TOKENS,
    TABLE_END,
    TABLE_START,
    format_rows,
    messages_of,
    update_card,
    write_examples,
)
from deepseek_vl2.nano.tasks import EVAL_SPLIT, TASKS, example_at
from deepseek_vl2.train.data import ConversationEncoder
from deepseek_vl2.train.data import read_samples as read_training_samples

NUM_EXAMPLES = 12


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Folder of a nano that has learnt nothing."""
    folder = tmp_path_factory.mktemp("untrained")
    processor = nano_processor()
    processor.save_pretrained(folder)
    untrained_nano(processor.tokenizer, seed=1).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_question_comes_behind_its_picture():
    example = example_at(EVAL_SPLIT, 0, "color")
    assert messages_of(example, ["a.png"]) == [
        {"role": USER, "content": f"{IMAGE}\n{example.question}", "images": ["a.png"]},
        {"role": ASSISTANT, "content": example.answer},
    ]


def test_a_second_question_comes_behind_the_first_answer():
    example = example_at(EVAL_SPLIT, 0, "follow_up")
    (first,) = example.history
    messages = messages_of(example, ["a.png"])
    contents = [message["content"] for message in messages]
    assert contents == [f"{IMAGE}\n{first.question}", first.answer, example.question, example.answer]
    assert [message.get("images") for message in messages] == [["a.png"], None, None, None]


def test_a_further_picture_comes_with_its_question():
    example = example_at(EVAL_SPLIT, 0, "second_picture")
    (first,) = example.history
    messages = messages_of(example, ["a.png", "b.png"])
    assert [message.get("images") for message in messages] == [["a.png"], None, ["b.png"], None]
    assert messages[0]["content"] == f"{IMAGE}\n{first.question}"
    assert messages[2]["content"] == f"{IMAGE}\n{example.question}"


def test_three_pictures_are_introduced_by_number_or_not():
    example = example_at(EVAL_SPLIT, 0, "compare")
    names = ["a.png", "b.png", "c.png"]
    plain, numbered = (messages_of(example, names, is_numbered)[0]["content"] for is_numbered in (False, True))
    assert plain == f"{IMAGE}\n{IMAGE}\n{IMAGE}\n{example.question}"
    marks = "\n".join(f"This is image_{number}: {IMAGE}" for number in (1, 2, 3))
    assert numbered == f"{marks}\n{example.question}"


@pytest.mark.parametrize("task", list(TASKS))
def test_the_expected_answer_is_judged_right_and_has_room(tmp_path, task):
    examples = [example_at(EVAL_SPLIT, index, task) for index in range(NUM_EXAMPLES)]
    path = write_examples(examples, tmp_path)
    judge = JUDGES[TASKS[task].judge]
    data = read_samples(path, "conversations", judge.prepare)
    assert not data.problems and len(data.samples) == NUM_EXAMPLES
    tokenizer = nano_processor().tokenizer
    for example, sample in zip(examples, data.samples, strict=True):
        assert sample.sizes == tuple(scene.size for scene in example.scenes)
        assert judge.judge(sample, example.answer).score == 1
        assert judge.judge(sample, "nothing of the kind").score == 0
        assert len(tokenizer.encode(example.answer)) < MAX_NEW_TOKENS


def test_training_reads_the_same_file(tmp_path):
    examples = [example_at("test", 0, task) for task in TASKS]
    processor = nano_processor()
    language_config = nano_config(processor.tokenizer).language_config
    samples = read_training_samples(write_examples(examples, tmp_path), ConversationEncoder(processor, language_config))
    assert len(samples) == len(examples)


RESULTS = {
    "locate": {
        "metric": "Acc@0.5 IoU",
        "overall": {"score": 98.8, "mean_iou": 91.64, "interval": {"low": 97.4, "high": 99.45}},
    },
    "small": {"metric": "exact match", "overall": {"score": 90.0, "interval": {"low": 87.1, "high": 92.3}}},
    "small_untiled": {"metric": "exact match", "overall": {"score": 50.0, "interval": {"low": 45.6, "high": 54.4}}},
}


def test_rows_of_a_card():
    lines = format_rows(RESULTS).splitlines()
    assert lines[2] == "| locate: one object | Acc@0.5 IoU | 0.988 | 0.974 to 0.995 | 0.916 |"
    assert lines[3] == f"| small: {TASKS['small'].title} | exact match | 0.900 | 0.871 to 0.923 |  |"
    assert (
        lines[4] == "| small_untiled: the same with the global view alone | exact match | 0.500 | 0.456 to 0.544 |  |"
    )


def test_a_card_keeps_what_stands_around_the_table(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(f"before\n{TABLE_START}\nold\n{TABLE_END}\nafter\n", encoding="utf-8")
    update_card(card, "new")
    update_card(card, "newer")
    assert card.read_text(encoding="utf-8") == f"before\n{TABLE_START}\nnewer\n{TABLE_END}\nafter\n"
    rows = [f"| {task}: what it is | {number} |" for number, task in enumerate(("locate", "small", "word"))]
    update_card(card, "\n".join(["| task | score |", *rows]))
    update_card(card, "| task | score |\n| small: what it is | 7 |\n| bar: what it is | 8 |")
    expected = ["| task | score |", rows[0], "| small: what it is | 7 |", rows[2], "| bar: what it is | 8 |"]
    assert card.read_text(encoding="utf-8").splitlines()[2:-2] == expected
    card.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md has no place for the table"):
        update_card(card, "new")
    assert card.read_text(encoding="utf-8") == "no marks"


def test_the_command_measures_and_fills_a_card(untrained, tmp_path, capsys):
    card = tmp_path / "card.md"
    card.write_text(f"{TABLE_START}{TABLE_END}", encoding="utf-8")
    options = ["--model_path", str(untrained), "--output", str(tmp_path / "run"), "--num_scenes", "2"]
    options += ["--first_scene", "7", "--batch_size", "2", "--device", "cpu", "--tasks", "color", "small"]
    assert evaluate.main([*options, "--card", str(card)]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(numbers) == ["color", "small", "small_untiled"]
    assert all(own["num_samples"] == 2 and 0 <= own["score"] <= 100 for own in numbers.values())
    assert card.read_text(encoding="utf-8").count("\n| ") == 4  # head and three rows
    questions = (tmp_path / "run" / "color" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(questions[0])["conversations"][0]["content"].endswith(example_at(EVAL_SPLIT, 7, "color").question)
    settings = json.loads((tmp_path / "run" / "small" / "run_untiled" / "results.json").read_text())["settings"]
    assert settings["no_tiling"] is True


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    missing = ["--model_path", str(tmp_path / "none"), "--output", str(tmp_path / "run"), "--num_scenes", "1"]
    assert evaluate.main([*missing, "--tasks", "color"]) == 2
    assert "none" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--num_scenes", "0"])
    assert stop.value.code == 2
