"""JSON lines of lmms-eval: what `--log_samples` writes, `{"doc_id": ..., "doc": {...}, "target": ...}`, or documents.

A document carries `question`, `answers` (or `answer`), `image` (or `image_path`, `images`: paths), `options` (a list,
or fields A, B, ...) and `category`.
"""

import string
from collections.abc import Mapping
from typing import Any

from deepseek_vl2.evaluate.readers.common import (
    ReadOptions,
    as_mapping,
    first_of,
    listed,
    question_of,
    texts,
)
from deepseek_vl2.evaluate.samples import Sample
from deepseek_vl2.utils.data_files import parse_json, picture_path


def lmms_eval_sample(line: bytes, where: str, options: ReadOptions) -> Sample:
    """Builds the sample of a line.

    Raises:
        ValueError: no JSON object, no question, or a picture that is none.
        OSError: a picture is not there.
    """
    fields = as_mapping(parse_json(line), "a line")
    document = as_mapping(fields.get("doc", fields), "'doc'")
    names = listed(first_of(document, "image", "image_path", "images"))
    pictures = tuple(picture_path(name, options.picture_root) for name in names)
    choices = _options(document)
    answers = texts(first_of(document, "answers", "answer", "label") or first_of(fields, "target"))
    sample_id = first_of(document, "question_id", "questionId", "id", "index")
    return Sample(
        id=str(fields.get("doc_id", where) if sample_id is None else sample_id),
        where=where,
        question=question_of(document, "question"),
        pictures=pictures,
        sizes=options.sizes_of(pictures),
        answers=tuple(_letter(answer, choices) for answer in answers),
        options=choices,
        hint=str(first_of(document, "hint") or ""),
        category=str(first_of(document, "category", "question_type", "subfield") or ""),
    )


def _options(document: Mapping[str, Any]) -> dict[str, str]:
    listed_options = listed(document.get("options"))
    if listed_options:
        return dict(zip(string.ascii_uppercase, map(str, listed_options), strict=False))
    return {
        letter: str(document[letter]) for letter in string.ascii_uppercase if document.get(letter) not in (None, "")
    }


def _letter(answer: str, options: Mapping[str, str]) -> str:
    """The letter of an answer that is given as an option's text."""
    if answer in options:
        return answer
    return next((letter for letter, option in options.items() if option == answer), answer)
