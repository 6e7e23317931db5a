"""`examples/finetune`, very small: that it runs from drawing to measuring, and that inference.py takes its adapter."""

import importlib.util
import json

import pytest
from PIL import Image
from programs import Program, run_file

from deepseek_vl2.nano.questions import split_rng
from deepseek_vl2.nano.scenes import HELD_OUT_WORDS

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def example(repository):
    spec = importlib.util.spec_from_file_location("new_color", repository / "examples" / "finetune" / "new_color.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_and_inference_takes_its_adapter(example, repository, tmp_path, capsys, monkeypatch):
    # One measured task of each kind: measuring is what takes long.
    monkeypatch.setattr(example, "NEW_TASKS", {task: example.NEW_TASKS[task] for task in ("new_locate", "new_color")})
    monkeypatch.setattr(example, "TAUGHT_TASKS", ("new_color",))
    monkeypatch.setattr(example, "OLD_TASKS", ("locate_all", "count"))
    small = ["--num_new", "3", "--num_old", "1", "--num_scenes", "1"]
    steps = ["--set", "max_steps=2", "batch_size=2", "device=cpu"]
    assert example.main(["--folder", str(tmp_path), *small, *steps]) == 0
    document = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    # The same command again, as after one that was killed while it merged.
    (tmp_path / "merged").rename(tmp_path / "merged.tmp")
    (tmp_path / "merged.tmp" / "config.json").unlink()
    for _ in range(2):
        assert example.main(["--folder", str(tmp_path), *small, *steps]) == 0
        assert json.loads(capsys.readouterr().out.strip().split("\n")[-1]) == document
    assert document["steps"] == 2
    tasks = {*example.NEW_TASKS, *example.OLD_TASKS}
    assert document["before"].keys() == document["after"].keys() == tasks
    assert all(0 <= value <= 1 for value in document["before"].values())
    ability = document["new_ability"]
    assert (ability["before"], ability["after"]) == tuple(
        document[when][ability["task"]] for when in ("before", "after")
    )
    losses = [document["before"][task] - document["after"][task] for task in example.OLD_TASKS]
    assert document["largest_loss"] == max(losses)

    question = [
        "--image",
        str(tmp_path / "data" / "pictures" / "000000_1.png"),
        "--prompt",
        "What shape is the brown object?",
        "--json",
    ]
    adapter = ["--adapter", tmp_path / "adapter"]
    done = Program(run_file, repository / "inference.py", *adapter, *question, folder=tmp_path).finish()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["new_tokens"] > 0


def test_inference_refuses_what_is_no_adapter_in_one_line(repository, tmp_path):
    done = Program(run_file, repository / "inference.py", "--adapter", tmp_path, folder=tmp_path).finish()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"inference.py: error: {tmp_path} has no adapter_config.json")
    assert len(done.stderr.splitlines()) == 1


def test_the_new_ability_needs_the_new_word(example):
    for number in range(20):
        assert "brown" in example.new_example(split_rng("test-ability", number), example.NEW_ABILITY).answer


def test_other_colors_are_asked_for_beside_the_new_one(example):
    answers = []
    for number in range(60):
        found = example.other_color_example(split_rng("test-other-color", number))
        (scene,) = found.scenes
        assert example.NEW_COLOR in {item.color for item in scene.objects}
        answers.append(found.answer)
    assert example.NEW_COLOR not in answers
    assert answers.count(example.SIMILAR_COLOR) > 20
    assert len(set(answers)) > 4


def test_every_new_question_is_about_the_new_color_and_is_painted_so(example):
    examples = list(example.training_examples(9, 3))
    assert len(examples) == 12
    for found in examples[:9]:
        (scene,) = found.scenes
        items = [scene.objects[target.number] for piece in found.pieces for target in piece.targets]
        assert items and all(item.color == "brown" for item in items)
        assert "brown" in found.question + found.answer or items[0].name in found.question + found.answer
        picture = scene.draw()
        assert isinstance(picture, Image.Image)
        colors = [color for _, color in picture.getcolors(10**6)]
        near = [max(abs(a - b) for a, b in zip(color, items[0].rgb, strict=True)) for color in colors]
        assert min(near) == 0


def test_old_questions_are_mixed_as_told_and_hold_no_words_kept_for_measuring(example):
    processor = example.nano_processor()
    found = [example.old_example(split_rng("test-old", number), processor) for number in range(150)]
    tasks = [question.task for question in found]
    # Among any others there are some of these, too.
    for task in ("locate_all", "count"):
        assert example.OLD_SHARES[task] * len(tasks) * 0.6 < tasks.count(task)
    assert len(set(tasks)) >= 8
    printed = {text.name for question in found for scene in question.scenes for text in scene.texts}
    assert printed and printed.isdisjoint(HELD_OUT_WORDS)
