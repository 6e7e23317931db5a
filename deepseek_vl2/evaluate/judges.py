"""From the model's text to a judgement, by kind of task. An unreadable answer is wrong, and counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from deepseek_vl2.evaluate.choices import choose_option
from deepseek_vl2.evaluate.metrics import (
    IOU_THRESHOLD,
    BoxCounts,
    count_boxes,
    exact_match,
    intersection_over_union,
    match_boxes,
    ocrbench_score,
)
from deepseek_vl2.evaluate.samples import PixelBox, Sample
from deepseek_vl2.serve.grounding import read_grounding

FORMULA_CATEGORY = "Handwritten Mathematical Expression Recognition"


@dataclass(frozen=True)
class Judgement:
    """What an answer is worth.

    Attributes:
        score: 0 to 1.
        is_readable: whether the answer has the form that was asked for.
        understood: what was read from the answer.
        boxes: boxes of the answer in pixels.
        iou: of the box; where several are asked for the mean over the expected ones, 0 for those not found.
        counts: of boxes, where several are asked for.
    """

    score: float
    is_readable: bool
    understood: str
    boxes: tuple[PixelBox, ...] = ()
    iou: float | None = None
    counts: BoxCounts | None = None


Judge: TypeAlias = Callable[[Sample, str], Judgement]


def plain_answer(answer: str) -> str:
    """The answer without space around it and the final full stop, as VLMEvalKit takes it from DeepSeek-VL2."""
    return answer.strip().rstrip(".").rstrip()


def _judge_text(metric: Callable[[str, Sequence[str]], float], sample: Sample, answer: str) -> Judgement:
    text = plain_answer(answer)
    # What is expected may end in a full stop itself: "Philip Morris Inc."
    score = max(metric(other, sample.answers) for other in (text, answer.strip())) if text else 0.0
    return Judgement(score, bool(text), text)


def judge_text(metric: Callable[[str, Sequence[str]], float]) -> Judge:
    """A judge that compares texts by a metric. An empty answer is unreadable."""
    return partial(_judge_text, metric)


def judge_exact_match(sample: Sample, answer: str) -> Judgement:
    """Judges by equality. The final full stop goes from both sides: what is expected may be a sentence, too."""
    text = plain_answer(answer)
    expected = [plain_answer(other) or other for other in sample.answers]
    return Judgement(exact_match(text, expected) if text else 0.0, bool(text), text)


def judge_ocrbench(sample: Sample, answer: str) -> Judgement:
    """Judges by containment; the category says whether it is a formula."""
    metric = partial(ocrbench_score, is_formula=sample.category == FORMULA_CATEGORY)
    return _judge_text(metric, sample, answer)


def judge_choice(sample: Sample, answer: str) -> Judgement:
    """Judges a multiple choice by the letter that the answer means."""
    letter = choose_option(plain_answer(answer), sample.options)
    return Judgement(float(letter in sample.answers), letter is not None, letter or "")


def judge_box(sample: Sample, answer: str) -> Judgement:
    """Judges the first box of the answer: right with an IoU of at least 0.5."""
    boxes = found_boxes(sample, answer)
    iou = intersection_over_union(boxes[0], sample.boxes[0]) if boxes and sample.boxes else 0.0
    return Judgement(float(iou >= IOU_THRESHOLD), bool(boxes), describe_boxes(boxes), boxes, iou=iou)


def judge_boxes(sample: Sample, answer: str) -> Judgement:
    """Judges all boxes of the answer by F1. Without a box it is unreadable, unless none is expected."""
    boxes, expected = found_boxes(sample, answer), sample.boxes or ()
    counts = count_boxes(boxes, expected)
    iou = sum(match_boxes(boxes, expected)) / len(expected) if expected else None
    return Judgement(counts.f1, bool(boxes) or not expected, describe_boxes(boxes), boxes, iou=iou, counts=counts)


def found_boxes(sample: Sample, answer: str) -> tuple[PixelBox, ...]:
    """The well-formed boxes of an answer in pixels of the last picture, not rounded to whole ones."""
    return tuple(box.scale_to(*sample.sizes[-1]) for box in read_grounding(answer).boxes)


def describe_boxes(boxes: Sequence[PixelBox]) -> str:
    """Boxes as text, in whole pixels."""
    return "; ".join(", ".join(f"{value:.0f}" for value in box) for box in boxes)
