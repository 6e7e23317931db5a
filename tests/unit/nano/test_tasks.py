"""nano's abilities: repeatable questions, other ones in each split, and words in evaluation that training never saw."""

import itertools
import re
from collections import Counter

import pytest

from deepseek_vl2.evaluate.tasks import TASKS as EVALUATIONS
from deepseek_vl2.models.tiling import TileGrid, choose_grid
from deepseek_vl2.nano.architecture import CANDIDATE_RESOLUTIONS, VIEW_SIDE, nano_processor
from deepseek_vl2.nano.batches import ask
from deepseek_vl2.nano.drawing import LARGER_GRIDS, ONE_TILE, draw_scene
from deepseek_vl2.nano.questions import MAX_COUNT, num_new_pictures, split_rng
from deepseek_vl2.nano.scenes import HELD_OUT_WORDS, TRAIN_WORDS
from deepseek_vl2.nano.tasks import EVAL_SPLIT, TASKS, TRAIN_SPLIT, NanoTask, example_at

READING_TASKS = ("word", "number", "read_all")


def examples(task, split=EVAL_SPLIT, number=60):
    return [example_at(split, index, task) for index in range(number)]


def words_of(scene):
    return [item.name for item in scene.objects if item.kind == "word"]


def grid_of(scene):
    return choose_grid(scene.size, 1, VIEW_SIDE, CANDIDATE_RESOLUTIONS)


@pytest.mark.parametrize("task", TASKS)
def test_examples_repeat_and_splits_differ(task):
    held_out = examples(task, number=20)
    assert held_out == examples(task, number=20)
    # In another order, too: each has a seed of its own.
    assert example_at(EVAL_SPLIT, 13, task) == held_out[13]
    scenes = {example.scenes for example in held_out}
    assert len(scenes) == 20
    assert not scenes & {example.scenes for example in examples(task, TRAIN_SPLIT, 20)}
    assert len({example.question for example in held_out}) > 1


def test_no_two_tasks_share_pictures():
    scenes = [example_at(EVAL_SPLIT, index, task).scenes for task in TASKS for index in range(10)]
    assert len(set(scenes)) == len(scenes)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_judged_is_there(task):
    """Boxes where they are compared; else one answer in words."""
    judge = TASKS[task].judge
    assert judge in EVALUATIONS and TASKS[task].title
    for example in examples(task, number=15):
        assert example.answer and example.question.strip()
        assert bool(example.boxes) == (judge != "exact_match") == ("<|det|>" in example.answer)
        if judge == "refcoco":
            assert len(example.boxes) == 1
        num_pictures = {"in_context": 2, "second_picture": 2, "compare": 3}.get(task, 1)
        assert len(example.scenes) == num_pictures
        assert len(example.history) == (task in ("follow_up", "second_question", "second_picture"))
        # Each task's questions are of its own kind; small objects are asked by the shape, texts by theirs.
        assert example.task == {"small": "shape", "second_question": "locate", "second_picture": "locate"}.get(
            task, task
        )


@pytest.mark.parametrize("task", READING_TASKS)
def test_evaluation_prints_words_that_are_held_out(task):
    printed = [word for example in examples(task) for scene in example.scenes for word in words_of(scene)]
    assert len(set(printed)) > 8 and set(printed) <= set(HELD_OUT_WORDS)
    answered = {line for example in examples(task) for line in example.answer.split("\n") if line.isalpha()}
    assert answered <= set(HELD_OUT_WORDS) and (len(answered) > 8) == (task != "number")


@pytest.mark.parametrize("grid", [ONE_TILE, LARGER_GRIDS[-1]])
def test_training_never_prints_or_asks_held_out_words(grid):
    """Scenes of all kinds and questions about them, as training draws them."""
    processor = nano_processor()
    rng = split_rng("test-tasks", 0)
    printed, answered = set(), set()
    for _ in range(350):
        scene = draw_scene(rng, processor, grid, (1, MAX_COUNT))
        printed.update(words_of(scene))
        for example in ask(rng, scene, 4):
            answered.update(re.findall(r"\b[A-Z]{3,}\b", example.answer))
    assert len(printed & set(TRAIN_WORDS)) > 20 and len(answered & set(TRAIN_WORDS)) > 10
    assert not (printed | answered) & set(HELD_OUT_WORDS)


def test_small_objects_are_under_a_twelfth_of_the_side():
    shown = set()
    for example in examples("small", number=200):
        (scene,) = example.scenes
        assert grid_of(scene) == TileGrid(2, 2)
        for item in scene.objects:
            width, height = item.box[2] - item.box[0], item.box[3] - item.box[1]
            # Rounded to pixels a side can be a twelfth exactly.
            assert 12 * max(width, height) <= min(scene.size)
        (target,) = example.pieces[0].targets
        assert example.answer == scene.objects[target.number].name
        shown.add(example.answer)
    assert len(shown) == 6


@pytest.mark.parametrize("task", READING_TASKS)
def test_texts_to_read_are_in_pictures_of_several_tiles(task):
    grids = {grid_of(scene) for example in examples(task, number=80) for scene in example.scenes}
    assert ONE_TILE not in grids


def test_counts_are_even():
    answers = Counter(int(example.answer) for example in examples("count", "test", 500))
    assert set(answers) == set(range(MAX_COUNT + 1))
    assert 0.05 < answers[0] / 500 < 0.2
    assert all(answers[number] / 500 > 0.07 for number in range(1, MAX_COUNT + 1))


def test_follow_up_is_answered_in_words():
    kinds = {(example.history[0].task, "shape" in example.question) for example in examples("follow_up")}
    assert kinds == set(itertools.product(["locate"], [True, False]))


@pytest.mark.parametrize(("task", "num_new"), [("second_question", [1, 0]), ("second_picture", [1, 1])])
def test_conversations_begin_with_any_question(task, num_new):
    found = examples(task, number=80)
    assert {example.history[0].task for example in found} >= {"locate", "locate_zh", "count", "color", "describe"}
    for example in found:
        assert num_new_pictures(example.turns) == num_new
        assert example.history[0].question != example.question or task == "second_picture"
        last = len(example.scenes) - 1
        targets = [target for piece in example.pieces for target in piece.targets]
        assert targets and {target.picture for target in targets} == {last}
        assert {example.scenes[last].objects[target.number].box for target in targets} == set(example.boxes)


def test_bad_requests_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"'sing'.*locate, locate_zh"):
        example_at(EVAL_SPLIT, 0, "sing")
    never = NanoTask("nothing", lambda rng: None, "refcoco")
    monkeypatch.setattr("deepseek_vl2.nano.tasks.TASKS", {"never": never})
    with pytest.raises(RuntimeError, match="'never' question fits 200"):
        example_at(EVAL_SPLIT, 0, "never")


def test_an_unfit_drawing_is_drawn_again(monkeypatch):
    drawn = []

    def draw(rng):
        drawn.append(rng.random())
        return "found" if len(drawn) == 5 else None

    fifth = NanoTask("the fifth drawing", draw, "refcoco")
    monkeypatch.setattr("deepseek_vl2.nano.tasks.TASKS", {"fifth": fifth})
    assert example_at(EVAL_SPLIT, 0, "fifth") == "found"
    assert len(set(drawn)) == 5
