"""JSON lines of lmms-eval: what `--log_samples` writes, `{"doc_id": ..., "doc": {...}, "target": ...}`, or documents.

A document carries `question`, `answers` (or `answer`, `label`), `image` (or `image_path`, `images`, or `image_1` to
`image_7`: paths), `options` (a list, or fields A, B, ...) and `category`. What has "image" in its name is left out by
`--log_samples`: paths have to be put back. The answer to a choice is a letter, an option's text, or its place in the
list, counted from 0; a letter in `target` goes before. Where a number may be both, it is the place if it stands there
as a number, as in ScienceQA, or the list is called `options`, as in AI2D; in `choices` it is the text, as in MathVista.
Open questions of MMMU (`question_type`) become a choice between their answers and "Other Answers", as in VLMEvalKit's
file. A document with `bbox` is a referring expression, in `answer`: its box is x1, y1, x2, y2 in shares of the picture,
as lmms-eval's RefCOCO has it, or else x, y, width, height in pixels.
"""

import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_vl2.evaluate.readers.common import (
    MAX_OVERHANG,
    ReadOptions,
    as_mapping,
    first_of,
    is_number,
    letter_of,
    lettered,
    listed,
    question_of,
    read_box,
    texts,
)
from deepseek_vl2.evaluate.samples import PixelBox, Sample
from deepseek_vl2.utils.data_files import parse_json, picture_path

# As MMMU names them.
MAX_NUMBERED_PICTURES = 7
OPEN = "open"
OTHER_ANSWERS = "Other Answers"


def lmms_eval_sample(line: bytes, where: str, options: ReadOptions) -> Sample:
    """Builds the sample of a line.

    Raises:
        ValueError: no JSON object, no question, or a picture that is none.
        OSError: a picture is not there.
    """
    fields = as_mapping(parse_json(line), "a line")
    document = as_mapping(fields.get("doc", fields), "'doc'")
    names = _picture_names(document)
    pictures = tuple(picture_path(name, options.picture_root) for name in names)
    sizes = options.sizes_of(pictures)
    choices = _options(document)
    answers = _answers(document, fields, choices)
    if document.get("question_type") == OPEN and not choices:
        choices, answers = _as_choice(answers)
    question, boxes = _asked(document, sizes)
    return Sample(
        id=_id(document, fields, where, is_choice=bool(choices)),
        where=where,
        question=question,
        pictures=pictures,
        sizes=sizes,
        answers=answers,
        boxes=boxes,
        options=choices,
        hint=str(document.get("hint")) if _is_filled(document.get("hint")) else "",
        category=str(first_of(document, "category", "question_type", "subfield") or ""),
        split=str(document.get("split") or ""),
    )


def _id(document: Mapping[str, Any], fields: Mapping[str, Any], where: str, *, is_choice: bool) -> str:
    """A log numbers its lines; of documents, the expressions for one object have the same id.

    The index of a multiple choice goes before: MMBench's says which lines are of one question.
    """
    if is_choice and str(document.get("index", "")).isdecimal():
        return str(document["index"])
    if fields.get("doc_id") is not None:
        return str(fields["doc_id"])
    own = first_of(document, "question_id", "questionId", "id", "index")
    return str(where if own is None or document.get("bbox") is not None else own)


def _asked(document: Mapping[str, Any], sizes: tuple[tuple[int, int], ...]) -> tuple[str, tuple[PixelBox, ...] | None]:
    """The question; of a referring expression, which has a box, the expression and the box."""
    values = document.get("bbox")
    if values is None:
        return question_of(document, "question"), None
    expressions = texts(first_of(document, "answer", "caption"))
    if len(expressions) != 1 or not expressions[0].strip():
        raise ValueError(f"{len(expressions)} referring expressions in 'answer', one is needed: write a line for each")
    if not sizes:
        raise ValueError("a box needs a picture, there is none")
    width, height = sizes[-1]
    largest_share = 1 + MAX_OVERHANG / min(width, height)
    if isinstance(values, list) and all(is_number(value) and abs(value) <= largest_share for value in values):
        values = [value * side for value, side in zip(values, (width, height) * 2, strict=False)]
        return expressions[0].strip(), (read_box(values, "xyxy", sizes[-1]),)
    return expressions[0].strip(), (read_box(values, "xywh", sizes[-1]),)


def _as_choice(answers: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """An open question of MMMU as VLMEvalKit asks it: its answers, and "Other Answers"."""
    choices = dict(zip(string.ascii_uppercase, (*answers, OTHER_ANSWERS), strict=False))
    return choices, tuple(choices)[: len(answers)]


def _is_filled(value: Any) -> bool:
    """Whether a cell holds something; tables that pandas wrote have "nan" where it does not."""
    return value not in (None, "", [], "nan") and not (isinstance(value, float) and math.isnan(value))


def _picture_names(document: Mapping[str, Any]) -> list[Any]:
    names = listed(first_of(document, "image", "image_path", "images"))
    numbered = (document.get(f"image_{number}") for number in range(1, MAX_NUMBERED_PICTURES + 1))
    return names or [name for name in numbered if _is_filled(name)]


def _options(document: Mapping[str, Any]) -> dict[str, str]:
    values = lettered(first_of(document, "options", "choices"))
    if not values:
        values = {letter: document.get(letter) for letter in string.ascii_uppercase}
    return {letter: str(value) for letter, value in values.items() if _is_filled(value)}


def _answers(document: Mapping[str, Any], fields: Mapping[str, Any], options: Mapping[str, str]) -> tuple[str, ...]:
    """What counts as right; of multiple choice, letters.

    Raises:
        ValueError: an answer is no text, or can be meant in two ways.
    """
    answer = first_of(document, "answers", "answer", "label")
    target = texts(first_of(fields, "target"))
    if target and all(text in options for text in target):
        return target
    letters = string.ascii_uppercase if listed(first_of(document, "options", "choices")) else ""
    counts = isinstance(answer, int) or bool(listed(document.get("options")))
    return tuple(_letter(text, options, letters, counts, bool(target)) for text in texts(answer) or target)


def _letter(answer: str, options: Mapping[str, str], letters: Sequence[str], counts: bool, has_target: bool) -> str:
    """The letter of an answer that is given as an option's text, or as its place among `letters`.

    Args:
        answer: as the file has it.
        options: text by letter.
        letters: of a list of options; empty if they are not listed.
        counts: whether a number that may be both is rather the place.
        has_target: whether a log says, too, what is right, but not by a letter.

    Raises:
        ValueError: text and place are two options, and a log has a target of its own.
    """
    letter = letter_of(answer, options)
    if letter in options:
        return letter
    named = next((letter for letter, option in options.items() if option == answer), None)
    is_place = answer.isascii() and answer.isdecimal() and int(answer) < len(letters)
    placed = letters[int(answer)] if is_place and letters[int(answer)] in options else None
    # Beside a log's target the answer is as the task's program reads it, which may be either.
    if has_target and named and placed and named != placed:
        raise ValueError(
            f"the answer {answer!r} may be option {named}, whose text it is, or option {placed}, counted from 0; "
            "write its letter"
        )
    found = (placed, named) if counts else (named, placed)
    return next(filter(None, found), answer)
