"""nano's abilities by name: what pictures each is asked about and how its answers are judged."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from deepseek_vl2.nano import questions, several
from deepseek_vl2.nano.layouts import chart_scene, reading_scene, table_scene, text_scene
from deepseek_vl2.nano.questions import Example, counting_scene, split_rng
from deepseek_vl2.nano.scenes import HELD_OUT_WORDS, LARGE_SIZES, Scene, random_scene, random_size, small_scene

TRAIN_SPLIT = "train"
EVAL_SPLIT = "eval"
MAX_ATTEMPTS = 200

Draw = Callable[[random.Random], Example | None]


@dataclass(frozen=True)
class NanoTask:
    """An ability.

    Attributes:
        title: What is asked, in a few words.
        draw: Draws pictures and a question; None where the pictures have no fit one.
        judge: Task of `deepseek_vl2.evaluate` by which answers are judged.
    """

    title: str
    draw: Draw
    judge: str


def _about(scene: Callable[[random.Random], Scene], make: Callable[[random.Random, Scene], Example | None]) -> Draw:
    return lambda rng: make(rng, scene(rng))


def _draw_count(rng: random.Random) -> Example | None:
    wanted = questions.wanted_count(rng)
    if rng.random() < 0.25:
        return questions.make_count(rng, random_scene(rng), wanted)
    return questions.make_count(rng, counting_scene(rng, wanted or rng.randint(0, 3)), wanted)


def _draw_follow_up(rng: random.Random) -> Example | None:
    """A second question that is answered in words."""
    example = questions.make_follow_up(rng, random_scene(rng))
    return None if example is None or example.boxes else example


# What conversations begin with before an object is asked for.
_OPENINGS = (
    questions.make_locate,
    questions.make_locate_zh,
    questions.make_count,
    questions.make_color,
    questions.make_shape,
    questions.make_describe,
)


def _draw_second_question(rng: random.Random) -> Example | None:
    scene = random_scene(rng)
    first, second = rng.choice(_OPENINGS)(rng, scene), questions.make_locate(rng, scene)
    return second.after(first) if first and second and first.question != second.question else None


def _draw_second_picture(rng: random.Random) -> Example | None:
    first = rng.choice(_OPENINGS)(rng, random_scene(rng))
    second = questions.make_locate(rng, random_scene(rng))
    return second.about_a_further_picture(first) if first and second else None


def _large_reading_scene(rng: random.Random, kind: str) -> Scene:
    """A scene with a text in a picture that is cut into tiles and is not much wider than high, or the reverse."""
    while True:
        size = random_size(rng)
        if min(size) >= 180:
            return reading_scene(rng, kind, size=size, words=HELD_OUT_WORDS)


def _draw_read_all(rng: random.Random) -> Example | None:
    return questions.make_read_all(rng, text_scene(rng, size=rng.choice(LARGE_SIZES), words=HELD_OUT_WORDS))


TASKS: Mapping[str, NanoTask] = MappingProxyType(
    {
        "locate": NanoTask("one object", _about(random_scene, questions.make_locate), "refcoco"),
        "locate_zh": NanoTask("one object, in Chinese", _about(random_scene, questions.make_locate_zh), "refcoco"),
        "locate_all": NanoTask(
            "every object of a kind", _about(random_scene, questions.make_locate_all), "grounding_f1"
        ),
        "in_context": NanoTask(
            "the kind of thing marked in another picture",
            lambda rng: several.make_in_context(rng, several.in_context_scenes(rng)),
            "refcoco",
        ),
        "ground": NanoTask("what meets a wish", _about(random_scene, questions.make_ground), "refcoco"),
        "describe": NanoTask(
            "every object with its box", _about(random_scene, questions.make_describe), "grounding_f1"
        ),
        "parts": NanoTask("a description part by part", _about(random_scene, questions.make_parts), "exact_match"),
        "count": NanoTask("how many there are", _draw_count, "exact_match"),
        "color": NanoTask("of an object", _about(random_scene, questions.make_color), "exact_match"),
        "shape": NanoTask("of an object", _about(random_scene, questions.make_shape), "exact_match"),
        "small": NanoTask(
            "shape of an object under a twelfth of the side", _about(small_scene, questions.make_shape), "exact_match"
        ),
        "word": NanoTask(
            "a printed word of 3 to 6 letters",
            lambda rng: questions.make_read(rng, _large_reading_scene(rng, "word"), "word"),
            "exact_match",
        ),
        "number": NanoTask(
            "a printed number of 1 to 4 digits",
            lambda rng: questions.make_read(rng, _large_reading_scene(rng, "number"), "number"),
            "exact_match",
        ),
        "read_all": NanoTask("all of several texts", _draw_read_all, "exact_match"),
        "table": NanoTask("a cell of a table", _about(table_scene, questions.make_table), "exact_match"),
        "bar": NanoTask("the value of a bar", _about(chart_scene, questions.make_bar), "exact_match"),
        "compare": NanoTask(
            "about three pictures",
            lambda rng: several.make_compare(rng, several.compared_scenes(rng)),
            "exact_match",
        ),
        "follow_up": NanoTask("a second question about the same object", _draw_follow_up, "exact_match"),
        "second_question": NanoTask("one object, after another question", _draw_second_question, "refcoco"),
        "second_picture": NanoTask(
            "one object, in a picture that comes after a question about another", _draw_second_picture, "refcoco"
        ),
    }
)


def example_at(split: str, index: int, task: str) -> Example:
    """Example `index` of a task in a split (`TRAIN_SPLIT`, `EVAL_SPLIT`): the same on every machine.

    Raises:
        ValueError: If the task is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}. Choose one of {', '.join(TASKS)}.")
    rng = split_rng(f"{split}-{task}", index)
    for _ in range(MAX_ATTEMPTS):
        example = TASKS[task].draw(rng)
        if example is not None:
            return example
    raise RuntimeError(f"no {task!r} question fits {MAX_ATTEMPTS} drawings")
