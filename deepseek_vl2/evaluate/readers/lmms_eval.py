"""JSON lines of lmms-eval: what `--log_samples` writes, `{"doc_id": ..., "doc": {...}, "target": ...}`, or documents.

A document carries `question`, `answers` (or `answer`, `label`), `image` (or `image_path`, `images`, `image_1` to
`image_7`, or RefCOCO's `file_name`: paths), `options` (a list, or fields A, B, ...) and `category`. What has "image" in
its name is left out by `--log_samples`: paths have to be put back. Without options of its own, a document may have them
at the end of its question, as those of MMStar do. The answer to a choice is a letter ("B", "(B)", "B.", "B)"), an
option's text, or its place in the list, counted from 0; a letter in `target` goes before. Where a number may be both,
it is the place if it stands there as a number, as in ScienceQA, or the list is called `options`, as in AI2D; in
`choices` it is the text, as in MathVista. Open questions of MMMU (`question_type`) become a choice between their
answers and "Other Answers", as in VLMEvalKit's file. A document with `bbox` is a referring expression, in `answer`: its
box is x1, y1, x2, y2 in shares of the picture, as lmms-eval's RefCOCO has it, or else x, y, width, height in pixels.
"""

import math
import re
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
    written_letter,
)
from deepseek_vl2.evaluate.samples import PixelBox, Sample
from deepseek_vl2.utils.data_files import parse_json, picture_path

# As MMMU names them.
MAX_NUMBERED_PICTURES = 7
OPEN = "open"
OTHER_ANSWERS = "Other Answers"
# MMStar has its options in a line, "Options: A: x, B: y"; those from MathVista in lines, "(A) x" below "Choices:".
_OPTIONS_BEGIN = re.compile(r"\n[^\S\n]*(?:Options|Choices):\s*(?=A:\s|\(A\)\s)")
_COLON_MARK = re.compile(r"(?:^|,\s+|\n\s*)([A-Z]):(?=\s|$)")
_BRACKET_MARK = re.compile(r"(?:^|\n\s*)\(([A-Z])\)(?=\s|$)")


def lmms_eval_sample(line: bytes, where: str, options: ReadOptions) -> Sample:
    """Builds the sample of a line.

    Raises:
        ValueError: no JSON object, no question, options or an answer that can be meant in several ways, or a picture
            that is none.
        OSError: a picture is not there.
    """
    fields = as_mapping(parse_json(line), "a line")
    document = as_mapping(fields.get("doc", fields), "'doc'")
    names = _picture_names(document)
    pictures = tuple(picture_path(name, options.picture_root) for name in names)
    sizes = options.sizes_of(pictures)
    choices = _options(document)
    question, boxes = _asked(document, sizes)
    if not choices and boxes is None:
        question, choices = _without_options(question)
    answers = _answers(document, fields, choices)
    if document.get("question_type") == OPEN and not choices:
        choices, answers = _as_choice(answers)
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
    return names or [name for name in numbered if _is_filled(name)] or listed(document.get("file_name"))


def _options(document: Mapping[str, Any]) -> dict[str, str]:
    values = lettered(first_of(document, "options", "choices"))
    if not values:
        values = {letter: document.get(letter) for letter in string.ascii_uppercase}
    return {letter: str(value) for letter, value in values.items() if _is_filled(value)}


def _without_options(question: str) -> tuple[str, dict[str, str]]:
    """A question without the options at its end, and these; none if A, B, ... do not follow each other there.

    Other letters may stand in an option as if they began one: "A: H: 11 %, O: 89 %, B: ...".

    Raises:
        ValueError: a letter begins an option more than once.
    """
    begins = list(_OPTIONS_BEGIN.finditer(question))
    if not begins:
        return question, {}
    stem, tail = question[: begins[-1].start()].strip(), question[begins[-1].end() :]
    marks = list((_BRACKET_MARK if tail.startswith("(") else _COLON_MARK).finditer(tail))
    taken: list[re.Match[str]] = []
    for mark in marks:
        if mark[1] == string.ascii_uppercase[len(taken) :][:1]:
            taken.append(mark)
    if not stem or len(taken) < 2:
        return question, {}
    letters = [mark[1] for mark in taken]
    twice = [mark[1] for mark in marks if mark[1] in letters and mark not in taken]
    if twice:
        raise ValueError(
            f"option {twice[0]} begins more than once in the question's {tail!r:.80}: write the options into 'options'"
        )
    ends = [*(mark.start() for mark in taken[1:]), len(tail)]
    values = {mark[1]: tail[mark.end() : end].strip() for mark, end in zip(taken, ends, strict=True)}
    return stem, {letter: value for letter, value in values.items() if _is_filled(value)}


def _answers(document: Mapping[str, Any], fields: Mapping[str, Any], options: Mapping[str, str]) -> tuple[str, ...]:
    """What counts as right; of multiple choice, letters.

    Raises:
        ValueError: an answer is no text, or can be meant in two ways.
    """
    answer = first_of(document, "answers", "answer", "label")
    target = texts(first_of(fields, "target"))
    if target and all(written_letter(text, options) for text in target):
        return tuple(letter_of(text, options) for text in target)
    letters = string.ascii_uppercase if listed(first_of(document, "options", "choices")) else ""
    counts = isinstance(answer, int) or bool(listed(document.get("options")))
    # An option may look like a list: "[1, 2]".
    found = texts(answer, reads_text=answer not in options.values()) or target
    return tuple(_letter(text, options, letters, counts, bool(target)) for text in found)


def _letter(answer: str, options: Mapping[str, str], letters: Sequence[str], counts: bool, has_target: bool) -> str:
    """The letter of an answer that is given by letter, as an option's text, or as its place among `letters`.

    Args:
        answer: as the file has it.
        options: text by letter.
        letters: of a list of options; empty if they are not listed.
        counts: whether a number that may be both is rather the place.
        has_target: whether a log says, too, what is right, but not by a letter.

    Raises:
        ValueError: it names several options; or text and place are two, and a log has a target of its own.
    """
    is_place = answer.isascii() and answer.isdecimal() and int(answer) < len(letters)
    placed = letters[int(answer)] if is_place and letters[int(answer)] in options else None
    if placed is not None and counts and not has_target:
        return placed
    named = letter_of(answer, options)
    if placed is None or named == placed:
        return named
    # Beside a log's target the answer is as the task's program reads it, which may be either.
    if has_target and named in options:
        raise ValueError(
            f"the answer {answer!r} may be option {named}, whose text it is, or option {placed}, counted from 0; "
            "write its letter"
        )
    return named if named in options else placed
